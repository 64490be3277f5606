"""Clips: frames in and out by PyAV, whose wheels bring FFmpeg. Sound is passed on as it is, and so are the times.

An extra: `pip install -r requirements-extras.txt`. What cannot be taken is refused before any work with a `UserError`;
what breaks on the way ends the clip there, and what was written until then plays.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.errors import UserError
from utils.files import temporary_path

EXTENSIONS = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".mts", ".m2ts", ".ts", ".wmv", ".flv", ".3gp"}
)
WRITTEN = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm"}  # others become .mp4
ENCODERS = {"webm": ("libvpx-vp9",)}  # by container; of others:
H264 = ("libx264", "libopenh264", "mpeg4")
OPTIONS = {
    "libx264": {"preset": "veryfast"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "6", "row-mt": "1", "b": "0"},
}
HDR = {16: "PQ (HDR10, Dolby Vision)", 18: "HLG"}  # by their transfer function
BT709, BT601, UNSPECIFIED, FULL = 1, 5, 2, 2


def is_clip(path: str | Path) -> bool:
    """Does the name say that it is a clip?"""
    return Path(path).suffix.lower() in EXTENSIONS


def library() -> Any:
    """PyAV. Raises `UserError` where it is not installed."""
    try:
        import av
    except ImportError as error:
        raise UserError("clips are read by PyAV, which is not here; pip install -r requirements-extras.txt") from error
    av.logging.set_level(None)  # what matters is told by us
    return av


class UnwrittenError(UserError):
    """A clip cannot be written, so that there is nothing to finish."""


class Frame(NamedTuple):
    """A frame upright, (1,3,H,W) in [0,1], and what says when it is shown."""

    pixels: Tensor
    pts: int
    duration: int


class Reader:
    """A clip to be read once, in order: `Frame`s and, between them, the packets of its sound.

    ``remarks`` tell what is not passed on, ``broken`` what was wrong on the way. Raises `UserError` for what is no
    clip, and for HDR, whose colours would need a tone mapping first.
    """

    def __init__(self, path: Path):
        self.path, self.remarks, self.broken = path, [], []
        self.av = library()
        if not os.path.isfile(path):
            raise UserError(f"{path}: is no file; name a clip")
        try:
            self.container = self.av.open(str(path), metadata_errors="replace")
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise UserError(f"{path}: cannot be read as a clip ({why}); put a whole one in its place") from error
        cover = self.av.stream.Disposition.attached_pic
        moving = [each for each in self.container.streams.video if not each.disposition & cover]
        if not moving:
            others = self._others()
            self.container.close()
            raise UserError(f"{path}: has no video, only {others}; name a clip with images")
        self.stream, self.sound = moving[0], list(self.container.streams.audio)
        self.stream.thread_type = "AUTO"
        self.time_base, self.rate = self.stream.time_base, self.stream.average_rate or Fraction(25)
        self.total = self.stream.frames or self._frames_by_time()
        self.first = self._first()
        self._look(self.first)

    def _others(self) -> str:
        return " and ".join(sorted({each.type for each in self.container.streams})) or "an empty file"

    def _frames_by_time(self) -> int | None:
        seconds = self.container.duration and self.container.duration / self.av.time_base
        return round(seconds * self.rate) if seconds else None

    def _first(self) -> Any:
        """The first frame that can be decoded; what it is says more than the header does."""
        try:
            frame = next(self.container.decode(self.stream), None)
            self.container.seek(0)
        except (OSError, ValueError):
            frame = None
        if frame is None:
            self.container.close()
            raise UserError(f"{self.path}: no frame of it can be decoded; put a whole clip in its place")
        return frame

    def _look(self, frame: Any) -> None:
        """Refuse what cannot be taken, note what is lost."""
        transfer = int(frame.color_trc or self.stream.codec_context.color_trc or UNSPECIFIED)
        if transfer in HDR:
            self.container.close()
            raise UserError(
                f"{self.path}: is HDR, {HDR[transfer]}; convert it to SDR first: ffmpeg -i IN -vf zscale=t=linear,"
                f"tonemap=hable,zscale=t=bt709:m=bt709:p=bt709,format=yuv420p OUT.mp4"
            )
        parts, (height, width) = frame.format.components, self.size
        if max(part.bits for part in parts) > 8:
            self.remarks.append(f"{max(part.bits for part in parts)} bits a channel, taken and written as 8")
        if len(parts) in (2, 4):
            self.remarks.append("its transparency is left out")
        if height % 2 or width % 2:
            even = f"{width + width % 2}x{height + height % 2}"
            self.remarks.append(f"{width}x{height} has an odd side, which H.264 cannot have: written as {even}")
        if others := {each.type for each in self.container.streams} - {"video", "audio"}:
            self.remarks.append(f"{' and '.join(sorted(others))} left out")
        if len(self.container.streams.video) > 1:
            self.remarks.append("of several videos in it the first is taken")

    @property
    def turned(self) -> int:
        """Quarter turns, counterclockwise, that make it upright."""
        return round(self.first.rotation / 90) % 4

    @property
    def size(self) -> tuple[int, int]:
        """(H, W), upright."""
        size = (self.first.height, self.first.width)
        return size[::-1] if self.turned % 2 else size

    @property
    def matrix(self) -> int:
        """How YUV becomes RGB, as the file says; where it does not, as players take it: by the height."""
        told = int(self.first.colorspace)
        if told in (BT709, 4, BT601, 6, 7, 9):
            return BT601 if told == 6 else told
        return BT709 if self.first.height >= 720 else BT601

    def __iter__(self) -> Iterator[Any]:
        """`Frame`s, and packets of sound."""
        last, seen, lost = None, 0, 0
        packets = self.container.demux([self.stream, *self.sound])
        while True:
            try:
                packet = next(packets, None)
                frames = packet.decode() if packet is not None and packet.stream is self.stream else []
            except (OSError, ValueError):
                lost += 1
                if lost > 1000:  # nothing but ruins follow
                    break
                continue
            if packet is None:
                break
            if packet.stream is not self.stream:
                if packet.dts is not None:
                    yield packet
                continue
            for frame in frames:
                lost += frame.is_corrupt
                step = max(1, round(1 / (self.rate * self.time_base)))
                pts = frame.pts if frame.pts is not None else 0 if last is None else last + step
                last, seen = pts if last is None else max(pts, last + 1), seen + 1
                yield Frame(self._pixels(frame), last, frame.duration or step)
        if lost:
            self.broken.append(f"{lost} of its packets are damaged: images may be missing or spoilt")
        if self.stream.frames and seen < 0.98 * self.stream.frames - 1:
            self.broken.append(f"cut short: it holds {seen} of {self.stream.frames} frames")

    def _pixels(self, frame: Any) -> Tensor:
        size = (self.first.width, self.first.height)
        rgb = frame.reformat(*size, "rgb24", **_exact(self.av), src_colorspace=self.matrix, dst_color_range=FULL)
        pixels = np.ascontiguousarray(np.rot90(rgb.to_ndarray(), self.turned))
        return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255

    def close(self) -> None:
        self.container.close()


class Writer:
    """A clip like that of ``reader`` with other images, in ``path``, which appears when it is closed.

    H.264 (VP9 in WebM) of constant quality ``crf``, with the times, the sound, the colours and the titles of the
    other. Raises `UserError` if it cannot be written.
    """

    def __init__(self, path: Path, reader: Reader, crf: int, size: tuple[int, int]):
        self.path, self.reader, self.av = path, reader, reader.av
        self.part = temporary_path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = WRITTEN[path.suffix.lower()]
        try:
            self.container = self.av.open(str(self.part), "w", format=kind)
            self.container.metadata.update(reader.container.metadata)
            self.stream = self._video(kind, crf, size)
            self.sound = {each.index: self.container.add_stream_from_template(each) for each in reader.sound}
        except (OSError, ValueError) as error:
            self._fail(error)

    def _video(self, kind: str, crf: int, size: tuple[int, int]) -> Any:
        names = ENCODERS.get(kind, H264)
        name = next((name for name in names if name in self.av.codecs_available), None)
        if name is None:
            raise UserError(f"this PyAV has none of the encoders {', '.join(names)}; pip install av brings them")
        reader, options = self.reader, OPTIONS.get(name, {}) | {"crf": str(crf)}
        stream = self.container.add_stream(name, rate=reader.rate, options=options)
        context = stream.codec_context
        context.height, context.width = (side + side % 2 for side in size)
        context.pix_fmt, context.time_base = "yuv420p", reader.time_base
        context.colorspace, context.color_range = reader.matrix, 1
        context.color_primaries = reader.first.color_primaries
        context.color_trc = reader.first.color_trc
        if ratio := reader.stream.sample_aspect_ratio:
            context.sample_aspect_ratio = 1 / ratio if reader.turned % 2 else ratio
        return stream

    def write(self, pixels: Tensor, pts: int, duration: int) -> None:
        """An image (3 or 1,H,W) in [0,1]; an odd side is grown by repeating its last line."""
        rgb = pixels.expand(3, -1, -1).mul(255).round_().clamp_(0, 255).byte().permute(1, 2, 0).cpu().numpy()
        rgb = np.pad(rgb, ((0, rgb.shape[0] % 2), (0, rgb.shape[1] % 2), (0, 0)), mode="edge")
        frame = self.av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
        colours = {"dst_colorspace": self.reader.matrix, "src_color_range": FULL, "dst_color_range": 1}
        frame = frame.reformat(format="yuv420p", **_exact(self.av), **colours)
        frame.pts, frame.time_base, frame.duration = pts, self.reader.time_base, duration
        self._mux(lambda: self.stream.encode(frame))

    def pass_on(self, packet: Any) -> None:
        """A packet of sound, as it is."""

        def moved() -> Any:
            packet.stream = self.sound[packet.stream.index]
            return packet

        self._mux(moved)

    def close(self) -> None:
        """Finish the file and let it appear."""
        self._mux(lambda: self.stream.encode(None))
        try:
            self.container.close()
            os.replace(self.part, self.path)
        except OSError as error:
            self._fail(error)

    def _mux(self, make: Any) -> None:
        try:
            self.container.mux(make())
        except (OSError, ValueError) as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.part.unlink(missing_ok=True)
        why = getattr(error, "strerror", None) or error
        raise UnwrittenError(f"{self.path}: cannot be written ({why}); check rights and space") from error


def name(path: Path, reader: Reader) -> str:
    """The file name of a clip made of ``path``: of the same kind, where that is written and takes its sound."""
    kind = path.suffix.lower() if path.suffix.lower() in WRITTEN else ".mp4"
    if kind != ".mkv" and reader.sound:
        taken = _takes(reader.av, WRITTEN[kind])
        if any(each.codec_context.name not in taken for each in reader.sound):
            kind = ".mkv"  # takes any
    return path.stem + kind


def _takes(av: Any, kind: str) -> set[str]:
    with av.open(os.devnull, "w", format=kind) as container:
        return set(container.supported_codecs)


def _exact(av: Any) -> dict[str, Any]:
    """Slower and right to a level: without it colours drift by two."""
    kinds = av.video.reformatter.Interpolation
    return {"interpolation": kinds.BICUBIC | kinds.ACCURATE_RND}
