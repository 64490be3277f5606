"""Tiles: what is put together from pieces is what the whole would have given, and pieces stay small."""

import math
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Conv2dSame
from torch import Tensor, nn

from models.nedr.residual import DREM
from models.pyramid import Head
from utils import memory, tiling
from utils.errors import UserError

SMALL = settings(max_examples=40, deadline=None)
sides = st.integers(1, 40)
tiles = st.integers(1, 45)


@SMALL
@given(sides, sides, tiles, st.integers(0, 9), st.integers(1, 3))
def test_the_identity_in_tiles_is_the_identity(height, width, tile, halo, step):
    x = torch.rand(2, 3, height * step, width * step)
    seen = []

    def same(piece: Tensor, window: tiling.Window) -> Tensor:
        assert torch.equal(window.cut(x), piece)
        assert window.size == x.shape[-2:]
        assert (window.rows.start % step, window.columns.start % step) == (0, 0)
        seen.append(max(piece.shape[-2:]))
        return piece

    assert torch.equal(tiling.apply(same, x, tile=tile, halo=halo, down=step, up=step), x)
    assert max(seen) <= max(tile, step) + 2 * -(-halo // step) * step


def whole_numbers(*layers: nn.Module) -> nn.Sequential:
    """The layers with small whole numbers as weights: float32 adds them exactly, in any order."""
    network = nn.Sequential(*layers).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randint(-2, 3, parameter.shape))
    return network


def tiled_is_whole(network: nn.Sequential, x: Tensor, tile: int, down: int = 1, up: int = 1) -> None:
    with torch.no_grad():
        tiled = tiling.apply(
            lambda piece, _: network(piece), x, tile=tile, halo=tiling.reach(network), down=down, up=up
        )
        assert torch.equal(tiled, network(x))


def integers(height: int, width: int) -> Tensor:
    return torch.randint(-3, 4, (1, 2, height, width)).float()


@SMALL
@given(st.integers(6, 40), st.integers(6, 40), tiles, st.sampled_from(["zeros", "reflect"]))
def test_convolutions_in_tiles_with_halo_equal_the_whole(height, width, tile, mode):
    convs = [nn.Conv2d(2, 2, size, padding=size // 2, padding_mode=mode) for size in (3, 1, 7, 5)]
    tiled_is_whole(whole_numbers(*convs), integers(height, width), tile)


@SMALL
@given(st.integers(2, 12), st.integers(2, 12), tiles, st.permutations([(3, 2), (5, 2), (3, 1), (5, 1)]))
def test_strided_convolutions_keep_their_padding_in_step(height, width, tile, kinds):
    """TensorFlow's "same" pads unevenly at stride 2, so tiles must begin where the stride does."""
    convs = [Conv2dSame(2, 2, k, s) if s == 2 else nn.Conv2d(2, 2, k, padding=k // 2) for k, s in kinds]
    network, x = whole_numbers(*convs), integers(4 * height, 4 * width)
    tiled_is_whole(network, x, tile, down=4)
    with torch.no_grad():
        assert torch.equal(tiling.apply_module(network, x, tile=tile, down=4), network(x))


@SMALL
@given(st.integers(2, 24), st.integers(2, 24), tiles)
def test_upsampling_between_convolutions(height, width, tile):
    """As in the networks' head, whose interpolation weights are quarters."""
    convs = [nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect") for _ in range(2)]
    double = nn.UpsamplingBilinear2d(scale_factor=2)
    double.align_corners = False
    tiled_is_whole(whole_numbers(convs[0], double, convs[1]), integers(height, width), tile, up=2)


def test_reach():
    assert tiling.reach(nn.Identity()) == 0
    assert tiling.reach(DREM(4)) == 18
    assert tiling.reach(DREM(4), Head(8)) == 20


@pytest.mark.parametrize("module", [DREM(4, growth=4), nn.Sequential(Conv2dSame(4, 4, 5, 2), Conv2dSame(4, 4, 3, 2))])
def test_reach_is_no_more_than_is_seen(module):
    """One pixel less of halo would not do."""
    for parameter in module.parameters():
        nn.init.uniform_(parameter, 0.1, 1)  # above zero, as the image, so that no ReLU hides the outermost pixels
    x = torch.rand(1, 4, 64, 64, requires_grad=True)
    y = module(x)
    middle = y.shape[-1] // 2
    y[..., middle, middle].sum().backward()
    rows = x.grad.abs().amax((0, 1, 3)).nonzero()
    step = 64 // y.shape[-1]
    assert rows.max() == middle * step + tiling.reach(module)


def test_without_tiles_the_function_is_applied_with_gradients():
    x = torch.rand(1, 1, 5, 6, requires_grad=True)
    for tile in (None, 6, 9):
        x.grad = None
        tiling.apply(lambda piece, _: piece * 2, x, tile=tile, halo=1).sum().backward()
        assert (x.grad == 2).all()
    assert torch.equal(tiling.apply_module(nn.Identity(), x, tile=None), x)


# Cross-fading.


@SMALL
@given(st.integers(1, 70), st.integers(1, 70), st.integers(8, 40), st.integers(1, 2))
def test_faded_weights_sum_to_one(height, width, tile, up):
    x = torch.rand(1, 1, height, width)

    def larger(piece: Tensor, _: tiling.Window) -> Tensor:
        return piece.repeat_interleave(up, 2).repeat_interleave(up, 3)

    faded = tiling.apply(larger, x, tile=tile, halo=tile // 4, blend=tile // 5, up=up)
    torch.testing.assert_close(faded, larger(x, None), atol=1e-6, rtol=0)


def test_no_seam_where_tiles_disagree():
    """Every tile another brightness: the steps between pixels are no larger than the cosine's steepest."""
    x, blend, count = torch.zeros(1, 1, 100, 90), 8, iter(range(100))

    def disagree(piece: Tensor, _: tiling.Window) -> Tensor:
        return torch.full_like(piece, next(count) % 2)

    faded = tiling.apply(disagree, x, tile=32, halo=8, blend=blend)
    assert faded.min() == 0
    assert faded.max() == 1
    for dim in (2, 3):
        assert faded.diff(dim=dim).abs().max() <= math.pi / 2 / (2 * blend) + 1e-6
    hard = tiling.apply(disagree, x, tile=32, halo=8)
    assert hard.diff(dim=3).abs().max() == 1


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        ((30, 33), {"tile": 16, "down": 2}, "down=2"),
        ((64, 64), {"tile": 16, "halo": 3, "blend": 4}, "blend=4"),
        ((64, 64), {"tile": 16, "halo": 9, "blend": 9}, "too narrow"),
    ],
)
def test_invalid_tilings_are_refused(size, options, message):
    with pytest.raises(ValueError, match=message):
        tiling.apply(lambda piece, _: piece, torch.zeros(1, 1, *size), **options)


def test_part():
    assert tiling.coarse_side(None, 8) is None
    assert tiling.coarse_side(1024, 8) == 128
    assert tiling.coarse_side(3, 8) == 1


# How large.


def test_inexact_tiles_are_never_chosen_automatically(monkeypatch):
    """The whole, or a refusal; a side that is set is taken."""
    assert choose(monkeypatch, 60e9, 5436, 3612, exact=False) is None
    assert choose(monkeypatch, 1.6e9, 1000, 1000, exact=False) is None
    with pytest.raises(MemoryError):
        choose(monkeypatch, 1.4e9, 1000, 1000, exact=False)
    assert choose(monkeypatch, 0, 1000, 1000, 512, exact=False) == 512
    assert choose(monkeypatch, 0, 1000, 1000, 0, exact=False) is None


def choose(monkeypatch, free: float, height: int, width: int, setting: int | str = "auto", exact=True) -> int | None:
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    return tiling.choose(height, width, "cpu", setting, exact)


def test_small_images_are_processed_whole_where_memory_allows(monkeypatch):
    assert choose(monkeypatch, math.inf, 1000, 1999) is None
    assert choose(monkeypatch, 8e9, 1000, 1999) is None
    assert choose(monkeypatch, math.inf, 1000, 2001) == 1024
    assert choose(monkeypatch, math.inf, 5436, 3612) == 1024
    assert choose(monkeypatch, 2e9, 1000, 1999) == 1024


def test_tiles_shrink_with_free_memory(monkeypatch):
    chosen = [choose(monkeypatch, free, 5436, 3612) for free in (8e9, 4e9, 3.5e9, 3e9, 2.6e9, 2.5e9, 2e9, 0)]
    assert chosen == sorted(chosen, reverse=True)
    assert chosen[0] == 1024
    assert chosen[-1] == tiling.SMALLEST
    assert set(chosen) == set(tiling.SIDES)


def test_an_explicit_tile_is_used(monkeypatch):
    for setting, tile in ((0, None), ("0", None), (512, 512), ("512", 512), (128, 128)):
        assert choose(monkeypatch, 0, 5436, 3612, setting) == tile
    for setting in (64, -1, "64", "large", "1.5"):
        with pytest.raises(UserError, match=rf"test\.tile={setting}"):
            choose(monkeypatch, 0, 100, 100, setting)


def test_free_memory_of_a_gpu_counts_what_pytorch_holds_unused(monkeypatch):
    for name, value in {"mem_get_info": (5, 9), "memory_reserved": 4, "memory_allocated": 1}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert memory.free_memory(torch.device("cuda")) == 8


def test_free_memory_is_the_smallest_known_limit(monkeypatch):
    monkeypatch.setattr(memory, "_available", lambda: 7)
    for limit, free in ((math.inf, 7), (3, 3)):
        monkeypatch.setattr(memory, "_group_limit", lambda limit=limit: limit)
        assert memory.free_memory(torch.device("cpu")) == free


def test_free_memory_respects_limits_of_the_process():
    """That of ulimit -v, in a child, since it cannot be taken back."""
    resource = pytest.importorskip("resource")
    child = os.fork()
    if not child:
        taken = memory._status("VmSize:")
        resource.setrlimit(resource.RLIMIT_AS, (taken + 2**28, resource.RLIM_INFINITY))
        os._exit(not 0 < memory.free_memory(torch.device("cpu")) <= 2**28)
    assert os.waitpid(child, 0)[1] == 0


def test_available_memory(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   5 kB\n")
    assert memory._available(tmp_path / "meminfo") == 5 * 1024
    assert memory._available(tmp_path / "absent") == math.inf


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_control_groups_version_2(tmp_path):
    own, root = tmp_path / "cgroup", tmp_path / "fs"
    assert memory._group_limit(own, root) == math.inf
    own.write_text("0::/job/step\n")
    assert memory._group_limit(own, root) == math.inf
    group(root / "job/step", memory__max="max", memory__current="10")
    assert memory._group_limit(own, root) == math.inf
    group(root / "job", memory__max="100", memory__current="70")  # the limit of a group above counts too
    assert memory._group_limit(own, root) == 30
    group(root / "job", memory__stat="anon 50\ninactive_file 15")
    assert memory._group_limit(own, root) == 45
    group(root, memory__max="20", memory__current="30")
    assert memory._group_limit(own, root) == 0


def test_control_groups_version_1(tmp_path):
    own, root = tmp_path / "cgroup", tmp_path / "fs"
    own.write_text("3:cpu,cpuacct:/\n2:memory:/docker/abc\n")
    assert memory._group_limit(own, root) == math.inf
    group(root / "memory", memory__limit_in_bytes="100", memory__usage_in_bytes="90")
    group(root / "memory", memory__stat="cache 5\ntotal_inactive_file 5")
    assert memory._group_limit(own, root) == 15
