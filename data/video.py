"""Reading and writing clips with PyAV, whose wheels include FFmpeg. Sound and frame times are copied unchanged.

Optional: `pip install -r requirements-extras.txt`. An unsupported clip raises a `UserError` before any work; an error
while reading ends the clip there, and the part written so far can be played.
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
ENCODERS = {"webm": ("libvpx-vp9",)}  # by container; for all others `H264`
H264 = ("libx264", "libopenh264", "mpeg4")
OPTIONS = {
    "libx264": {"preset": "veryfast"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "6", "row-mt": "1", "b": "0"},
}
HDR = {16: "PQ (HDR10, Dolby Vision)", 18: "HLG"}  # by transfer function
BT709 = 1  # colour matrices, by FFmpeg's numbers
BT601 = 5
UNSPECIFIED = 2  # transfer function
FULL = 2  # colour range


def is_clip(path: str | Path) -> bool:
    """Whether the extension is that of a clip."""
    return Path(path).suffix.lower() in EXTENSIONS


def library() -> Any:
    """PyAV. Raises `UserError` where it is not installed."""
    try:
        import av
    except ImportError as error:
        raise UserError("clips need PyAV, which is not installed; pip install -r requirements-extras.txt") from error
    av.logging.set_level(None)  # errors are reported here
    return av


class UnwrittenError(UserError):
    """A clip cannot be written at all, so its `Writer` is not closed."""


class Frame(NamedTuple):
    """An upright frame (1,3,H,W) in [0,1], with its time stamp and duration in units of the clip's time base."""

    pixels: Tensor
    pts: int
    duration: int


class Reader:
    """A clip that is read once, in order: `Frame`s and, between them, its audio packets.

    ``remarks`` list what is not kept, ``broken`` the damage met while reading. Raises `UserError` for files that are
    not clips, and for HDR, which needs tone mapping first.
    """

    def __init__(self, path: Path):
        self.path = path
        self.remarks: list[str] = []
        self.broken: list[str] = []
        self.av = library()
        if not os.path.isfile(path):
            raise UserError(f"{path}: not a file; name a clip")
        try:
            self.container = self.av.open(str(path), metadata_errors="replace")
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise UserError(f"{path}: cannot be read as a clip ({why}); replace it with a complete copy") from error
        cover = self.av.stream.Disposition.attached_pic
        videos = [stream for stream in self.container.streams.video if not stream.disposition & cover]
        if not videos:
            types = self._stream_types()
            self.container.close()
            raise UserError(f"{path}: has no video, only {types}; name a clip with images")
        self.stream = videos[0]
        self.sound = list(self.container.streams.audio)
        self.stream.thread_type = "AUTO"
        self.time_base = self.stream.time_base
        self.rate = self.stream.average_rate or Fraction(25)
        self.total = self.stream.frames or self._estimated_frames()
        self.first = self._first_frame()
        self._check_format(self.first)

    def _stream_types(self) -> str:
        return " and ".join(sorted({each.type for each in self.container.streams})) or "an empty file"

    def _estimated_frames(self) -> int | None:
        seconds = self.container.duration and self.container.duration / self.av.time_base
        return round(seconds * self.rate) if seconds else None

    def _first_frame(self) -> Any:
        """The first frame that can be decoded; its properties are more reliable than the header's."""
        try:
            frame = next(self.container.decode(self.stream), None)
            self.container.seek(0)
        except (OSError, ValueError):
            frame = None
        if frame is None:
            self.container.close()
            raise UserError(f"{self.path}: no frame of it can be decoded; replace it with a complete copy")
        return frame

    def _check_format(self, frame: Any) -> None:
        """Refuse HDR, and record in ``remarks`` what is lost."""
        transfer = int(frame.color_trc or self.stream.codec_context.color_trc or UNSPECIFIED)
        if transfer in HDR:
            self.container.close()
            raise UserError(
                f"{self.path}: is HDR, {HDR[transfer]}; convert it to SDR first: ffmpeg -i IN -vf zscale=t=linear,"
                f"tonemap=hable,zscale=t=bt709:m=bt709:p=bt709,format=yuv420p OUT.mp4"
            )
        channels = frame.format.components
        height, width = self.size
        if max(channel.bits for channel in channels) > 8:
            self.remarks.append(f"{max(channel.bits for channel in channels)} bits a channel, read and written as 8")
        if len(channels) in (2, 4):
            self.remarks.append("its transparency is left out")
        if height % 2 or width % 2:
            even = f"{width + width % 2}x{height + height % 2}"
            self.remarks.append(f"{width}x{height} has an odd side, which H.264 cannot have: written as {even}")
        if others := {each.type for each in self.container.streams} - {"video", "audio"}:
            self.remarks.append(f"{' and '.join(sorted(others))} left out")
        if len(self.container.streams.video) > 1:
            self.remarks.append("holds several videos, of which the first is used")

    @property
    def quarter_turns(self) -> int:
        """Counterclockwise quarter turns that make the frames upright."""
        return round(self.first.rotation / 90) % 4

    @property
    def size(self) -> tuple[int, int]:
        """(H, W), upright."""
        size = (self.first.height, self.first.width)
        return size[::-1] if self.quarter_turns % 2 else size

    @property
    def matrix(self) -> int:
        """The matrix from YUV to RGB that the file states; if it states none, by the height, as players do."""
        stated = int(self.first.colorspace)
        if stated in (BT709, 4, BT601, 6, 7, 9):
            return BT601 if stated == 6 else stated
        return BT709 if self.first.height >= 720 else BT601

    def __iter__(self) -> Iterator[Any]:
        """`Frame`s and audio packets."""
        last = None  # the time stamp of the last frame
        seen = 0
        damaged = 0
        packets = self.container.demux([self.stream, *self.sound])
        while True:
            try:
                packet = next(packets, None)
                frames = packet.decode() if packet is not None and packet.stream is self.stream else []
            except (OSError, ValueError):
                damaged += 1
                if damaged > 1000:  # the rest is unreadable
                    break
                continue
            if packet is None:
                break
            if packet.stream is not self.stream:
                if packet.dts is not None:
                    yield packet
                continue
            for frame in frames:
                damaged += frame.is_corrupt
                step = max(1, round(1 / (self.rate * self.time_base)))
                pts = frame.pts if frame.pts is not None else 0 if last is None else last + step
                last = pts if last is None else max(pts, last + 1)
                seen += 1
                yield Frame(self._pixels(frame), last, frame.duration or step)
        if damaged:
            self.broken.append(f"{damaged} of its packets are damaged: images may be missing or damaged")
        if self.stream.frames and seen < 0.98 * self.stream.frames - 1:
            self.broken.append(f"cut short: it holds {seen} of {self.stream.frames} frames")

    def _pixels(self, frame: Any) -> Tensor:
        size = (self.first.width, self.first.height)
        rgb = frame.reformat(*size, "rgb24", **_accurate(self.av), src_colorspace=self.matrix, dst_color_range=FULL)
        pixels = np.ascontiguousarray(np.rot90(rgb.to_ndarray(), self.quarter_turns))
        return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255

    def close(self) -> None:
        self.container.close()


class Writer:
    """Writes a clip with new images to ``path``, which appears when the writer is closed.

    H.264 (VP9 in WebM) of constant quality ``crf``, with the frame times, sound, colour space and metadata of
    ``reader``. Raises `UserError` if it cannot be written.
    """

    def __init__(self, path: Path, reader: Reader, crf: int, size: tuple[int, int]):
        self.path = path
        self.reader = reader
        self.av = reader.av
        self.part = temporary_path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        container = WRITTEN[path.suffix.lower()]
        try:
            self.container = self.av.open(str(self.part), "w", format=container)
            self.container.metadata.update(reader.container.metadata)
            self.stream = self._video_stream(container, crf, size)
            self.sound = {each.index: self.container.add_stream_from_template(each) for each in reader.sound}
        except (OSError, ValueError) as error:
            self._fail(error)

    def _video_stream(self, container: str, crf: int, size: tuple[int, int]) -> Any:
        names = ENCODERS.get(container, H264)
        name = next((name for name in names if name in self.av.codecs_available), None)
        if name is None:
            raise UserError(f"this PyAV has none of the encoders {', '.join(names)}; pip install av has them")
        reader = self.reader
        options = OPTIONS.get(name, {}) | {"crf": str(crf)}
        stream = self.container.add_stream(name, rate=reader.rate, options=options)
        context = stream.codec_context
        context.height, context.width = (side + side % 2 for side in size)
        context.pix_fmt = "yuv420p"
        context.time_base = reader.time_base
        context.colorspace = reader.matrix
        context.color_range = 1
        context.color_primaries = reader.first.color_primaries
        context.color_trc = reader.first.color_trc
        if ratio := reader.stream.sample_aspect_ratio:
            context.sample_aspect_ratio = 1 / ratio if reader.quarter_turns % 2 else ratio
        return stream

    def write(self, pixels: Tensor, pts: int, duration: int) -> None:
        """Write an image (3 or 1,H,W) in [0,1]; an odd side is made even by repeating its last line."""
        rgb = pixels.expand(3, -1, -1).mul(255).round_().clamp_(0, 255).byte().permute(1, 2, 0).cpu().numpy()
        rgb = np.pad(rgb, ((0, rgb.shape[0] % 2), (0, rgb.shape[1] % 2), (0, 0)), mode="edge")
        frame = self.av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
        colours = {"dst_colorspace": self.reader.matrix, "src_color_range": FULL, "dst_color_range": 1}
        frame = frame.reformat(format="yuv420p", **_accurate(self.av), **colours)
        frame.pts = pts
        frame.time_base = self.reader.time_base
        frame.duration = duration
        self._mux(lambda: self.stream.encode(frame))

    def pass_on(self, packet: Any) -> None:
        """Write an audio packet unchanged."""

        def redirected() -> Any:
            packet.stream = self.sound[packet.stream.index]
            return packet

        self._mux(redirected)

    def close(self) -> None:
        """Finish the file and move it to ``path``."""
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
        raise UnwrittenError(f"{self.path}: cannot be written ({why}); check permissions and space") from error


def extension(path: Path) -> str:
    """The extension of a clip made from ``path``: the same, if that can be written, else .mp4."""
    return path.suffix.lower() if path.suffix.lower() in WRITTEN else ".mp4"


def name(path: Path, reader: Reader) -> str:
    """The file name of a clip made from ``path``, with `extension`, or .mkv if that cannot hold its sound."""
    ending = extension(path)
    if ending != ".mkv" and reader.sound:
        supported = _supported_codecs(reader.av, WRITTEN[ending])
        if any(stream.codec_context.name not in supported for stream in reader.sound):
            ending = ".mkv"  # holds any codec
    return path.stem + ending


def _supported_codecs(av: Any, container: str) -> set[str]:
    with av.open(os.devnull, "w", format=container) as file:
        return set(file.supported_codecs)


def _accurate(av: Any) -> dict[str, Any]:
    """Options for accurate colour conversion, within one level; the faster default is off by up to two."""
    flags = av.video.reformatter.Interpolation
    return {"interpolation": flags.BICUBIC | flags.ACCURATE_RND}
