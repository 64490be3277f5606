import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import haze, images
from utils.errors import UserError

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 40)


@settings(max_examples=40, deadline=None)
@given(seeds, sizes, sizes)
def test_smooth_depth_is_a_depth(seed, height, width):
    depth = haze.smooth_depth(height, width, np.random.default_rng(seed))
    assert depth.shape == (1, height, width)
    assert depth.dtype == torch.float32
    assert depth.min() > 0
    assert depth.max() == 1


def test_smooth_depth_recedes_and_is_smooth():
    for seed in range(20):
        depth = haze.smooth_depth(200, 300, np.random.default_rng(seed))[0]
        assert depth[:50].mean() > depth[-50:].mean()
        assert depth.diff(dim=0).abs().max() < 0.05
        assert depth.diff(dim=1).abs().max() < 0.05


@settings(max_examples=40, deadline=None)
@given(seeds, st.floats(0, 10), st.floats(0, 1))
def test_haze_is_the_closed_form(seed, beta, grey):
    generator = torch.Generator().manual_seed(seed)
    clear, depth = torch.rand(3, 4, 5, generator=generator), torch.rand(1, 4, 5, generator=generator)
    hazy, t = haze.add_haze(clear, depth, beta, torch.full((3,), grey))
    want_t = np.exp(-beta * depth.numpy())
    np.testing.assert_allclose(t.numpy(), want_t, atol=1e-6)
    np.testing.assert_allclose(hazy.numpy(), clear.numpy() * want_t + grey * (1 - want_t), atol=1e-6)
    assert hazy.min() >= 0
    assert hazy.max() <= 1


def test_no_haze_and_dense_haze():
    clear, depth, light = torch.rand(3, 6, 6), torch.rand(1, 6, 6) + 0.1, torch.tensor([0.8, 0.9, 1.0])
    torch.testing.assert_close(haze.add_haze(clear, depth, 0.0, light)[0], clear)
    torch.testing.assert_close(haze.add_haze(clear, depth, 1e4, light)[0], light.view(3, 1, 1).expand(3, 6, 6))


@settings(max_examples=40, deadline=None)
@given(seeds, st.floats(0, 0.3), st.booleans())
def test_random_haze_keeps_its_ranges(seed, colour, given_depth):
    clear = torch.rand(3, 8, 9)
    depth = torch.rand(1, 8, 9) if given_depth else None
    item = haze.random_haze(clear, depth, np.random.default_rng(seed), (0.5, 1.0), (0.6, 0.9), colour)
    assert {key: tuple(value.shape) for key, value in item.items()} == {
        "hazy": (3, 8, 9),
        "clear": (3, 8, 9),
        "transmission": (1, 8, 9),
        "airlight": (3, 1, 1),
        "density": (1,),
    }
    assert all(value.dtype == torch.float32 and value.min() >= 0 and value.max() <= 1 for value in item.values())
    assert 0.5 <= item["density"] <= 1.0
    assert item["airlight"].max() - item["airlight"].min() <= 2 * colour + 1e-6
    assert 0.6 - colour - 1e-6 <= item["airlight"].min()
    again = haze.add_haze(
        clear, -item["transmission"].log() / item["density"], item["density"].item(), item["airlight"]
    )
    torch.testing.assert_close(again[0], item["hazy"], atol=1e-5, rtol=0)


def test_random_haze_without_colour_is_grey_and_repeats():
    clear = torch.rand(3, 8, 9)
    first, second = (haze.random_haze(clear, None, np.random.default_rng(3)) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert first["airlight"].unique().numel() == 1


@pytest.fixture
def scenes(tmp_path):
    for n in range(3):
        images.write(tmp_path / "rgb" / f"{n}.png", torch.rand(3, 20, 30))
        images.write(tmp_path / "depth" / f"{n}.png", torch.rand(1, 20, 30))
    return tmp_path


def command(scenes, output, *more):
    haze.main(
        ["--clear", str(scenes / "rgb"), "--output", str(scenes / output), "--per-image", "2", "--workers", "0", *more]
    )
    return {path.relative_to(scenes / output): path.read_bytes() for path in (scenes / output).rglob("*.*")}


def test_command_writes_the_haze_that_the_names_tell(scenes):
    depth_options = ["--depth", str(scenes / "depth"), "--mirror", "--border", "3", "--density", "0.9", "0.9"]
    files = command(scenes, "out", *depth_options)
    assert len(files) == 3 + 3 + 6
    for path in images.find(scenes / "out" / "depth"):
        whole = images.read_depth(scenes / "depth" / path.name).flip(2)[:, 3:-3, 3:-3]
        torch.testing.assert_close(images.read_depth(path), whole / whole.max(), atol=1e-4, rtol=0)
    pairs = images.pair(scenes / "out" / "hazy", scenes / "out" / "clear")
    assert len(pairs) == 6
    for hazy_path, clear_path in pairs:
        stem, _, grey = re.fullmatch(r"(\d)_([12])_(\d\.\d{5})", hazy_path.stem).groups()
        assert 0.7 <= float(grey) <= 1.0
        clear = images.read(scenes / "rgb" / f"{stem}.png").flip(2)[:, 3:-3, 3:-3]
        depth = images.read_depth(scenes / "depth" / f"{stem}.png").flip(2)[:, 3:-3, 3:-3]
        assert torch.equal(images.read(clear_path), clear)
        t = torch.exp(-0.9 * depth)
        torch.testing.assert_close(
            images.read(hazy_path), clear * t + float(grey) * (1 - t), atol=0.5 / 255 + 1e-5, rtol=0
        )


def test_command_does_not_depend_on_order_or_workers(scenes):
    alone = command(scenes, "a")
    assert command(scenes, "b", "--workers", "2") == alone
    (scenes / "rgb" / "0.png").unlink()
    rest = command(scenes, "c")
    assert rest == {name: data for name, data in alone.items() if not name.name.startswith("0")}
    assert command(scenes, "d", "--seed", "11").keys() != rest.keys()


def test_command_refusals(scenes, tmp_path):
    with pytest.raises(UserError, match="--airlight"):
        command(scenes, "x", "--airlight", "0.7", "1.2")
    with pytest.raises(UserError, match="--border"):
        command(scenes, "x", "--border", "10")
    with pytest.raises(UserError, match="--per-image"):
        command(scenes, "x", "--per-image", "0")
    images.write(scenes / "depth" / "1.png", torch.rand(1, 10, 10))
    with pytest.raises(UserError, match=r"30x20 but its depth map .* is 10x10"):
        command(scenes, "x", "--depth", str(scenes / "depth"), "--workers", "1")  # through a process, too
    (scenes / "depth" / "2.png").unlink()
    with pytest.raises(UserError, match=r"2\.png: no depth map"):
        command(scenes, "y", "--depth", str(scenes / "depth"))
    command(scenes, "z")
    with pytest.raises(UserError, match="already"):
        command(scenes, "z")


def test_command_line_fails_with_one_line(tmp_path):
    call = [sys.executable, "-m", "data.haze", "--clear", str(tmp_path), "--output", str(tmp_path / "out")]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*no pictures.*\n", done.stderr)


def test_jpeg_format(scenes):
    assert {name.suffix for name in command(scenes, "j", "--format", "jpg")} == {".jpg"}
    assert math.isfinite(images.read(scenes / "j" / "clear" / "0.jpg").mean())
