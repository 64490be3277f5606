"""Clips through test.py: frames, sound and times kept, steady over time, and what is refused or breaks on the way."""

import errno
import itertools
import os
import re
import signal
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_scoring_command import command

import models
from data import images, paths
from models import temporal
from utils import config, errors, physics

av = pytest.importorskip("av", reason="PyAV, an extra (requirements-extras.txt), is not installed")

QUICK = ("--model", "dcp", "dcp.guided_filter=false", "--output", "out")
RATE = 25


def scene() -> tuple[torch.Tensor, torch.Tensor]:
    """A clear image of the sample set with its depth, (1,3,H,W), and the same behind known haze."""
    clear = images.read(paths.resolve("sample:train/clear") / "motorcycle_left.png")[None]
    depth = images.read_depth(paths.resolve("sample:train/depth") / "motorcycle_left.png")[None]
    airlight = torch.tensor([0.84, 0.87, 0.9]).view(1, 3, 1, 1)
    return clear, physics.scatter(clear, physics.transmission(depth, torch.tensor(1.3)), airlight)


def pan(count: int, step: int, height: int = 200, width: int = 280) -> list[torch.Tensor]:
    """A crop that moves over the hazy scene by ``step`` pixels a frame, in 8 bit."""
    hazy = scene()[1].mul(255).round() / 255
    return [hazy[..., 20 : 20 + height, 10 + k * step : 10 + k * step + width] for k in range(count)]


def write(path, frames, pts=None, sound=False, codec="libx264", pix_fmt="yuv420p", tags=None, turn=0):
    """A clip of frames (1,3,H,W) or (H,W,C) uint8, at 25 a second or shown at ``pts`` hundredths of a second."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=RATE, options={"crf": "8"} if codec == "libx264" else {})
        first = pixels(frames[0])
        stream.height, stream.width, stream.pix_fmt = *first.shape[:2], pix_fmt
        stream.codec_context.time_base = Fraction(1, 100)
        for key, value in (tags or {}).items():
            setattr(stream.codec_context, key, value)
        if turn:
            stream.set_display_rotation(turn)
        track = out.add_stream("aac", rate=48000, layout="mono") if sound else None
        for k, each in enumerate(frames):
            shown = pixels(each)
            frame = av.VideoFrame.from_ndarray(shown, format="rgba" if shown.shape[2] == 4 else "rgb24")
            frame = frame.reformat(format=pix_fmt, dst_colorspace=(tags or {}).get("colorspace", 5), dst_color_range=1)
            frame.pts, frame.time_base = (pts[k] if pts else 4 * k), Fraction(1, 100)
            out.mux(stream.encode(frame))
            if track:
                tone = 0.3 * np.sin(np.arange(1920 * k, 1920 * (k + 1)) / 20).astype(np.float32)[None]
                heard = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
                heard.sample_rate, heard.pts, heard.time_base = 48000, 1920 * k, Fraction(1, 48000)
                out.mux(track.encode(heard))
        out.mux(stream.encode(None))
        if track:
            out.mux(track.encode(None))
    return path


def pixels(frame) -> np.ndarray:
    if isinstance(frame, torch.Tensor):
        return np.ascontiguousarray(frame[0].mul(255).round().byte().permute(1, 2, 0).numpy())
    return frame


def read(path):
    """Times in seconds, frames (H,W,3), and the sound of a clip."""
    with av.open(str(path)) as clip:
        shown = [(float(f.pts * f.time_base), f.to_ndarray(format="rgb24")) for f in clip.decode(video=0)]
    with av.open(str(path)) as clip:
        heard = [f.to_ndarray() for f in clip.decode(audio=0)] if clip.streams.audio else []
    return [each[0] for each in shown], [each[1] for each in shown], heard


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            errors.run(lambda: command.main([*QUICK, *map(str, argv)]))
        return end.value.code, *capsys.readouterr()

    return run


def test_frames_sound_and_times_are_kept(run, tmp_path):
    frames = pan(8, 2, 64, 96)
    write(tmp_path / "a.mp4", frames, sound=True)
    status, out, err = run("--hazy", "a.mp4", "test.smoothing=0")
    assert (status, err) == (0, "")
    assert "8 frames done in " in out
    times, shown, heard = read(tmp_path / "out/videos/a.mp4")
    assert times == pytest.approx([k / RATE for k in range(8)])
    before = read(tmp_path / "a.mp4")[2]
    assert len(heard) == len(before) > 5
    assert all(map(np.array_equal, heard, before))
    dcp = models.build(config.load("dcp", models.settings_types(), overrides=["dcp.guided_filter=false"]))
    expected = [255 * dcp.dehaze(frame)[0].permute(1, 2, 0).numpy() for frame in frames]
    for k, found in enumerate(shown):
        apart = [np.abs(found - each).mean() for each in expected]
        assert np.argmin(apart) == k
        assert apart[k] < 8  # twice through H.264, and what it does to dark pixels is made larger between


def test_varying_times_and_odd_sides(run, tmp_path):
    shown_at = [0, 3, 10, 11, 30, 90]
    write(
        tmp_path / "a.mkv", [pixels(f)[:63, :95] for f in pan(6, 0, 64, 96)], pts=shown_at, codec="ffv1", pix_fmt="bgr0"
    )
    status, _, err = run("--hazy", "a.mkv")
    assert (status, err.strip()) == (0, "a.mkv: 95x63 has an odd side, which H.264 cannot have: written as 96x64")
    times, shown, _ = read(tmp_path / "out/videos/a.mkv")
    assert times == pytest.approx([t / 100 for t in shown_at])
    assert shown[0].shape == (64, 96, 3)


@pytest.mark.parametrize("tags", [{"colorspace": 1, "color_range": 1}, {"colorspace": 5, "color_range": 1}, {}])
def test_colours_come_through(run, tmp_path, tags):
    """By whatever matrix the file has them: with strength 0 nothing but two codecs is in between."""
    flat = np.zeros((64, 96, 3), np.uint8)
    flat[:, :48], flat[:, 48:] = (200, 60, 90), (40, 180, 220)
    write(tmp_path / "a.mp4", [flat] * 3, tags=tags)
    assert run("--hazy", "a.mp4", "--strength", 0)[0] == 0
    with av.open(str(tmp_path / "out/videos/a.mp4")) as clip:
        frame = next(clip.decode(video=0))
        found = frame.reformat(format="rgb24", src_colorspace=tags.get("colorspace", 5)).to_ndarray().astype(int)
    assert np.abs(found[20, 20] - flat[20, 20]).max() <= 5
    assert np.abs(found[20, 80] - flat[20, 80]).max() <= 5


def test_a_rotated_clip_is_upright(run, tmp_path):
    frame = np.zeros((64, 96, 3), np.uint8)
    frame[:16] = 200  # bright above, which a quarter turn counterclockwise takes to the left
    write(tmp_path / "a.mp4", [frame] * 2, turn=90)
    with av.open(str(tmp_path / "a.mp4")) as clip:
        turned = next(clip.decode(video=0)).rotation
    assert run("--hazy", "a.mp4", "--strength", 0)[0] == 0
    shown = read(tmp_path / "out/videos/a.mp4")[1][0]
    assert shown.shape == (96, 64, 3)
    left, right = shown[:, :8].mean(), shown[:, -8:].mean()
    assert (left > right) == (turned == 90)
    assert abs(left - right) > 150


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "message"),
    [
        ("libx265", "yuv420p10le", "10 bits a channel, read and written as 8"),
        ("png", "rgba", "its transparency is left out"),
    ],
)
def test_what_the_output_clip_cannot_keep_is_reported(run, tmp_path, codec, pix_fmt, message):
    frames = [np.dstack([pixels(f), np.full((64, 96), 128, np.uint8)]) for f in pan(2, 0, 64, 96)]
    write(tmp_path / "a.mov", frames, codec=codec, pix_fmt=pix_fmt)
    status, _, err = run("--hazy", "a.mov")
    assert status == 0
    assert message in err
    assert len(read(tmp_path / "out/videos/a.mov")[1]) == 2


def test_unsuitable_clips_are_refused(run, tmp_path):
    write(tmp_path / "hdr.mp4", pan(2, 0, 64, 96), pix_fmt="yuv420p10le", codec="libx265", tags={"color_trc": 16})
    (tmp_path / "text.mp4").write_text("no clip")
    (tmp_path / "empty.mp4").touch()
    whole = write(tmp_path / "whole.mp4", pan(3, 0, 64, 96), sound=True)
    (tmp_path / "half.mp4").write_bytes(whole.read_bytes()[:2000])
    head, packets, index = re.split(b"(?<=mdat)|(?=.{4}moov)", whole.read_bytes(), flags=re.DOTALL)
    (tmp_path / "zeros.mp4").write_bytes(head + bytes(len(packets)) + index)
    (tmp_path / "folder.mp4").mkdir()
    with av.open(str(tmp_path / "sound.mp4"), "w") as out:
        track = out.add_stream("aac", rate=48000, layout="mono")
        heard = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        heard.sample_rate, heard.pts, heard.time_base = 48000, 0, Fraction(1, 48000)
        out.mux(track.encode(heard))
        out.mux(track.encode(None))
    for name, message in {
        "hdr": "is HDR, PQ",
        "text": "cannot be read as a clip",
        "empty": "cannot be read as a clip",
        "half": "cannot be read as a clip",
        "zeros": "no frame of it can be decoded",
        "folder": "not a file; name a clip",
        "sound": "has no video, only audio",
    }.items():
        status, out, err = run("--hazy", f"{name}.mp4")
        assert (status, out, err.count("error")) == (2, "", 1), name
        assert message in err
        assert not list((tmp_path / "out").rglob("*.mp4"))
    status, out, err = run("--hazy", "text.mp4", "whole.mp4")  # one that is bad does not keep the others
    assert (status, "3 frames done" in out, "text.mp4" in err) == (2, True, True)
    assert (
        "in two commands" in run("--hazy", "whole.mp4", "a.png")[2]
        or "neither an existing path" in run("--hazy", "whole.mp4", "a.png")[2]
    )


def test_clips_whose_results_would_have_one_name_are_refused(run, tmp_path):
    for name in ("one/a.mp4", "two/a.mp4", "one/a.avi", "one/a.mkv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, pan(2, 0, 64, 96))
    for twice in (("one/a.mp4", "two/a.mp4"), ("one/a.mp4", "one/a.avi")):
        status, _, err = run("--hazy", *twice, "--output", "out")
        assert (status, "would both be written as a.mp4; rename one" in err) == (2, True)
    assert run("--hazy", "one/a.mp4", "one/a.mkv", "--output", "out")[0] == 0
    status, _, err = run("--model", "nedr", "dcp", "--hazy", "one/a.mp4", "--output", "b.mp4")
    assert (status, "b.mp4: one file for 2 methods; name a folder" in err) == (2, True)
    status, _, err = run("--hazy", "one/a.mp4", "--output", "new", "test.self_ensemble=true")
    assert (status, "test.self_ensemble=true: of single images" in err) == (2, True)
    assert not (tmp_path / "b.mp4").exists()


def test_a_clip_that_cannot_be_written_leaves_nothing(run, tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write(tmp_path / "a.mp4", pan(3, 0, 64, 96))
    monkeypatch.setattr(os, "replace", full)
    status, _, err = run("--hazy", "a.mp4")
    assert status == 2
    assert "a.mp4: cannot be written (No space left on device); check permissions and space" in err
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_a_truncated_clip_keeps_its_readable_frames(run, tmp_path):
    whole = write(tmp_path / "whole.mkv", [f + 0.1 * torch.rand_like(f) * (1 - f) for f in pan(20, 3, 64, 96)])
    (tmp_path / "a.mkv").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    status, out, _ = run("--hazy", "a.mkv")
    assert status in (0, 2)  # a Matroska file does not say how many frames it has
    count = len(read(tmp_path / "out/videos/a.mkv")[1])
    assert 3 < count < 20
    assert f"{count} frames done" in out


def test_an_interrupted_run_leaves_a_playable_file(run, tmp_path, monkeypatch):
    write(tmp_path / "a.mp4", pan(20, 1, 64, 96), sound=True)
    own, count = temporal.TemporalFilter.dehaze_next, itertools.count()

    def dehaze_next(self, *args):
        if next(count) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return own(self, *args)

    monkeypatch.setattr(temporal.TemporalFilter, "dehaze_next", dehaze_next)
    status, out, _ = run("--hazy", "a.mp4")
    assert status == 130
    assert "of 20 frames done" in out
    assert ", stopped; see out/videos/a.mp4" in out
    assert 5 <= len(read(tmp_path / "out/videos/a.mp4")[1]) < 20
    assert [path.name for path in (tmp_path / "out/videos").iterdir()] == ["a.mp4"]


def test_output_names_and_existing_files(run, tmp_path):
    write(tmp_path / "a.mp4", pan(2, 0, 64, 96))
    assert run("--hazy", "a.mp4", "--suffix", "_clear", "--show", "side_by_side")[0] == 0
    assert read(tmp_path / "out/videos/a_clear.mp4")[1][0].shape == (64, 192, 3)
    status, out, _ = run("--hazy", "a.mp4", "--suffix", "_clear")
    assert (status, "is there already and left as it is" in out) == (0, True)
    assert run("--hazy", "a.mp4", "--output", "b.mkv")[0] == 0
    assert len(read(tmp_path / "b.mkv")[1]) == 2
    assert "clips are dehazed, not scored" in run("--hazy", "a.mp4", "--clear", "a.mp4")[2]


def test_without_pyav(run, tmp_path, monkeypatch):
    (tmp_path / "a.mp4").touch()
    monkeypatch.setitem(sys.modules, "av", None)
    status, _, err = run("--hazy", "a.mp4")
    assert (status, err) == (
        2,
        "error: clips need PyAV, which is not installed; pip install -r requirements-extras.txt\n",
    )


def flicker(frames, step: int, **options) -> tuple[float, float]:
    """Mean change of the airlight and of a still scene's pixels from frame to frame, of 255."""
    steady, last, changes = temporal.TemporalFilter(models.load(), **options), None, []
    for frame in frames:
        found = steady(frame)
        if last is not None:
            now, then = found["clear"][..., : -step or None], last["clear"][..., step:]
            changes.append([(found["airlight"] - last["airlight"]).abs().mean(), (now - then).abs().mean()])
        last = found
    return tuple(255 * torch.tensor(changes).mean(0))


@pytest.mark.parametrize("step", [0, 3])
def test_flicker(step):
    """On a moving crop, and on a still one with the noise of a sensor."""
    frames = pan(10, step)
    if not step:
        frames = [(f + 3 / 255 * torch.randn_like(f)).clamp(0, 1) for f in frames]
    alone, steady = flicker(frames, step, seconds=0), flicker(frames, step, seconds=0.5, every=2)
    assert steady[0] < alone[0] / 4
    assert steady[1] < alone[1] * (0.97 if not step else 0.7)  # of a still scene most is the noise itself


def test_motion_is_estimated_and_cuts_are_detected():
    first, last = pan(2, 5)
    down, right = temporal.movement(first.mean(1), last.mean(1))
    assert (down, right) == pytest.approx((0, -5), abs=0.3)
    coffee = images.read(paths.resolve("sample:test/hazy") / "coffee_2.png")[None]
    other = [coffee[..., 10 + k : 210 + k, 60:340] for k in range(5)]
    steady = temporal.TemporalFilter(models.load(), 0.5, every=2)
    for frame in [*pan(5, 3), *other]:
        found = steady(frame)
    assert steady.cuts == 1
    began = temporal.TemporalFilter(models.load(), 0.5, every=2)
    for frame in [F.pad(other[0], (0, 0, 0, 0)), *other[1:]]:
        alone = began(frame)
    assert (found["airlight"] - alone["airlight"]).abs().max() < 0.02  # nothing of the scene before is in it


def test_a_folder_of_frames(run, tmp_path):
    for k, frame in enumerate(pan(4, 2, 64, 96)):
        images.write(tmp_path / f"frames/{k}.png", frame[0])
    argv = ("--hazy", "frames", "test.temporal=true", "dcp.guided_filter=false")
    assert run(*argv)[0] == 0
    steady = temporal.TemporalFilter(
        models.build(config.load("dcp", models.settings_types(), overrides=["dcp.guided_filter=false"])), 0.5, every=2
    )
    for path in paths.find("frames"):
        expected = steady(images.read(path)[None])["clear"][0]
        assert (images.read(tmp_path / "out/pictures" / path.name) - expected).abs().max() <= 0.5 / 255 + 1e-6
    status, _, err = run(*argv)
    assert (status, "4 of 4 exist already, and test.temporal=true needs all" in err) == (2, True)
    assert run(*argv, "--overwrite")[0] == 0
