"""A folder of good and bad files through test.py: all that can be done is done, the rest is told, again is cheap."""

import errno
import os

import numpy as np
import pytest
import torch
from PIL import Image
from test_scoring_command import command

from data import images
from utils import errors

KINDS = ("png", "jpg", "tif", "webp", "bmp", "ppm")


@pytest.fixture
def run(capfd, tmp_path, monkeypatch):
    """Run test.py on the folder ``in``; -> exit status, output, errors, of C libraries too."""
    monkeypatch.chdir(tmp_path)

    def run(*argv, hazy=("in",)):
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            errors.run(lambda: command.main(["--model", "dcp", "--output", "out", *argv, "--hazy", *map(str, hazy)]))
        return end.value.code, *capfd.readouterr()

    return run


def fill(folder, count: int) -> tuple[dict[str, bytes], list[str]]:
    """``count`` images, in two folders; a third of them is cut short. -> the whole ones by name, names of the bad."""
    rng, whole, bad = np.random.default_rng(0), {}, []
    (folder / "deep").mkdir(parents=True)
    for n in range(count):
        name = f"{'deep/' if n % 2 else ''}{n:04}.{KINDS[n % len(KINDS)]}"
        Image.fromarray(rng.integers(90, 255, (9, 12, 3), dtype=np.uint8)).save(folder / name)
        whole[name] = (folder / name).read_bytes()
        if n % 3 == 0:
            (folder / name).write_bytes(whole[name][: len(whole[name]) // 2])
            bad.append(name)
    return whole, bad


def made(tmp_path) -> dict[str, int]:
    """The images that were made, without their endings, and when."""
    folder = tmp_path / "out" / "pictures"
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder).with_suffix("")): path.stat().st_mtime_ns for path in files}


def stems(names) -> set[str]:
    return {name.rpartition(".")[0] for name in names}


@pytest.mark.parametrize("count", [36, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_repeated_batch_dehazes_only_what_is_missing(run, tmp_path, count):
    whole, bad = fill(tmp_path / "in", count)
    status, out, err = run()
    *skipped, last = err.splitlines()
    listed = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    assert status == 2
    assert [f"skipped: {line}" for line in listed] == skipped
    assert sorted(line.split(": ")[0] for line in listed) == sorted(f"in/{name}" for name in bad)
    assert last == f"error: {len(bad)} images could not be used; they are listed above and in out/skipped.txt"
    assert out.startswith(f"{count - len(bad)} images done")
    before = made(tmp_path)
    assert before.keys() == stems(whole.keys() - set(bad))
    (tmp_path / "in" / bad[0]).write_bytes(whole[bad[0]])
    status, out, err = run()
    assert (status, len(err.splitlines())) == (2, len(bad))
    assert out.startswith("1 image done")
    assert f"{count - len(bad)} images existed already" in out
    assert before.items() < made(tmp_path).items()
    for name in bad:
        (tmp_path / "in" / name).write_bytes(whole[name])
    assert run()[0] == 0
    assert made(tmp_path).keys() == stems(whole)
    assert not (tmp_path / "out" / "skipped.txt").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are of POSIX")
def test_odd_names_links_pipes_and_large_headers_cost_one_line_each(run, tmp_path, monkeypatch):
    good = ["a.png", "n" * 240 + ".png", os.fsdecode(b"na\xefve.png"), "z.png", "line\nbreak.png"]
    for name in good:
        images.write(tmp_path / "in" / "x.png", torch.rand(3, 8, 9))
        (tmp_path / "in" / "x.png").rename(tmp_path / "in" / name)
    (tmp_path / "in" / "loop.png").symlink_to("pool.png")
    (tmp_path / "in" / "pool.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "in" / "pipe.png")
    (tmp_path / "in" / "claim.ppm").write_bytes(b"P6\n22000 22000\n255\nabc")
    monkeypatch.setattr("utils.memory.free_memory", lambda device: 2**31)
    for hazy in (["in"], sorted((tmp_path / "in").iterdir())):
        status, out, err = run("--overwrite", hazy=hazy)
        assert status == 2
        assert len(err.splitlines()) == 5
        assert all(line.isprintable() and len(line) < 300 for line in err.splitlines())
        assert out.startswith("5 images done")
    assert len(made(tmp_path)) == 5


def test_missing_files_of_a_list_are_reported_and_the_rest_is_dehazed(run, tmp_path):
    images.write(tmp_path / "in" / "a.png", torch.rand(3, 8, 9))
    lines = [b"in/a.png", b"x" * 5000, b"~nouser/a.png", b"a\0b.png", b"na\xefve.png"]
    (tmp_path / "x.flist").write_bytes(b"\n".join(lines))
    status, out, err = run(hazy=["x.flist"])
    assert (status, out[:12]) == (2, "1 image done")
    *skipped, last = err.splitlines()
    assert [line.partition(": ")[2].startswith("x.flist, line ") for line in skipped] == [True] * 4
    assert all(line.isprintable() and len(line) < 300 for line in skipped)
    assert last.startswith("error: 4 images could not be used")
    assert len((tmp_path / "out" / "skipped.txt").read_text().splitlines()) == 4


def test_a_failed_write_skips_one_image_unless_the_disk_is_full(run, tmp_path, monkeypatch):
    for name in ("a.png", "b" * 245 + ".png", "c.png"):
        images.write(tmp_path / "in" / name, torch.rand(3, 8, 9))
    status, out, err = run("--suffix", "_dehazed")
    assert (status, out[:13]) == (2, "2 images done")
    assert "File name too long" in err
    assert made(tmp_path).keys() == {"a_dehazed", "c_dehazed"}

    def full(source, target):
        if str(target).endswith(".png"):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    replace = os.replace
    monkeypatch.setattr(os, "replace", full)
    status, out, err = run("--overwrite")
    assert (status, err.count("\n")) == (2, 1)
    assert "a.png: cannot be written (No space left on device)" in err


@pytest.mark.parametrize("place", ["to_8bit", "read"])
def test_running_out_of_memory_skips_one_image(run, tmp_path, monkeypatch, place):
    """While it is read, and while it is written."""
    for name in ("a.png", "b.png", "c.png"):
        images.write(tmp_path / "in" / name, torch.rand(3, 8, 9))
    own, calls = getattr(images, place), []

    def fail(*given):
        calls.append(given)
        if len(calls) == 2:
            raise MemoryError
        return own(*given)

    monkeypatch.setattr(images, place, fail)
    status, out, err = run()
    assert (status, out[:13]) == (2, "2 images done")
    assert "skipped: " in err
    assert "b.png: " in err
    assert "memory" in err


def test_a_clip_among_images_is_refused_with_the_remedy(run, tmp_path):
    images.write(tmp_path / "in" / "a.png", torch.rand(3, 8, 9))
    (tmp_path / "in" / "clip.mp4").touch()
    status, _, err = run()
    assert status == 0
    assert "passed over 1 MP4" in err
    assert "to dehaze a clip, name it itself: --hazy CLIP" in err
