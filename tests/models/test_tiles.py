"""Images in tiles: the same numbers as the whole image, whatever the modules, sizes and tiles."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from helpers import D4, picture, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import models
from models.dcp import DCP, DCPSettings
from models.encoder import RELEASED
from models.method import Method
from utils import physics, tiling
from utils.errors import UserError

# In float64: tiles change the shapes of the matrix products, and by them the order in which numbers are added; t = 0.05
# makes twenty times as much of it in J, in float32 up to 1e-5 here, by the machine, and 0 with trained weights.
TOLERANCE = 1e-9


def smooth(seed: int, height: int, width: int) -> torch.Tensor:
    """An image with edges, shades and another colour everywhere."""
    return F.interpolate(picture(seed, 1, 3, 13, 17), (height, width), mode="bicubic").clamp(0, 1)


@functools.cache
@torch.no_grad()
def vivid(*overrides: str, shallow: bool = True) -> models.Method:
    """A tiny NeDR in eval mode whose t varies over the image; with weights as at the start it hardly does.

    Its encoder is the released one, which is taken in tiles; ``shallow`` keeps 7 of the 24 blocks, for speed. All but
    the encoder gets weights of He's variance, and the head's output a deviation of 0.3. Shared: copy before changing.
    """
    method = tiny(f"nedr.encoder={RELEASED}", *overrides).eval()
    for name in set(dict(method.named_children())) - set(method.inference):
        delattr(method, name)
    if shallow:
        encoder = method.removal.pyramid.encoder
        encoder.blocks = nn.Sequential(*(blocks[:1] for blocks in encoder.blocks))
    for name, weight in method.removal.named_parameters():
        if ".encoder." not in name:
            weight *= 6**0.5 if weight.dim() > 1 else 0.1
    head = method.removal.head
    features = method.removal.pyramid(smooth(0, 160, 192))[0]
    raw = head(method.removal.drem(method.removal.idrm(features) if method.removal.idrm else features))
    head.conv3.weight *= 0.3 / raw.std()
    head.conv3.bias.copy_((head.conv3.bias - raw.mean()) * 0.3 / raw.std())
    return method


@functools.cache
def in_double(method: Method) -> Method:
    return copy.deepcopy(method).double()


def assert_same(method: Method, hazy: torch.Tensor, tile: int, tolerance: float = TOLERANCE) -> None:
    if not torch.is_autocast_enabled("cpu"):  # else the order of float32's sums is compared, which is the machine's
        method, hazy = in_double(method), hazy.double()
    whole, tiled = method.estimate(hazy), method.estimate(hazy, tile)
    assert whole.keys() == tiled.keys() == {"clear", "transmission", "airlight"}
    assert whole["transmission"].std() > 0.02  # else there were nothing to compare
    for name, value in whole.items():
        torch.testing.assert_close(tiled[name], value, rtol=0, atol=tolerance)
    assert torch.equal(tiled["clear"], method.dehaze(hazy, tile))


MODULES = {
    "all": (),
    "released": ("nedr.variant=released", "nedr.airlight=max"),
    "D4": D4,
    "KAN-CID": D4[1:],
    "IDRM": (D4[0], D4[2]),
    "DREM": D4[:2],
}


@pytest.mark.parametrize("modules", MODULES)
def test_tiled_is_whole_with_any_modules(modules):
    assert_same(vivid(*MODULES[modules]), smooth(1, 133, 180), 128)


@pytest.mark.parametrize("size", [(257, 140), (130, 500), (20, 300), (256, 256)])
@pytest.mark.parametrize("tile", [128, 150])
def test_tiled_is_whole_at_any_size(size, tile):
    method = vivid(D4[0], D4[2])
    assert_same(method, smooth(2, *size), tile)


@pytest.mark.parametrize("airlight", ["max", "dark_channel", "learned"])
@pytest.mark.parametrize("guided", ["false", "true"])
def test_tiled_is_whole_with_any_airlight_and_filter(airlight, guided):
    """Airlight and the guide's range are the whole picture's: here its brightest and darkest are in one corner."""
    hazy = smooth(3, 150, 270) * 0.5 + 0.2
    hazy[..., :12, :12] = 1
    hazy[..., 12:24, :12] = 0
    assert_same(vivid(*D4, f"nedr.airlight={airlight}", f"nedr.guided_filter={guided}"), hazy, 128)


@pytest.mark.slow
def test_tiled_is_whole_with_the_full_encoder():
    assert_same(vivid(D4[2], shallow=False), smooth(4, 290, 385), 192)


def test_tiled_is_whole_in_bf16():
    """A difference in the last place of float32 may be rounded to one of 2^-8; it stays below bf16's own error."""
    method, hazy = vivid(D4[2]), smooth(5, 160, 200)
    exact = method.estimate(hazy)["transmission"]
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(method, hazy, 128, tolerance=0.05)
        whole, tiled = (method.estimate(hazy, tile)["transmission"] for tile in (None, 128))
    assert (tiled - whole).abs().mean() < 0.2 * (whole - exact).abs().mean()


def test_a_batch_in_tiles():
    method, hazy = vivid(*D4), torch.cat([smooth(seed, 150, 170) for seed in (6, 7)])
    assert_same(method, hazy, 128)
    torch.testing.assert_close(method.dehaze(hazy, 128)[:1], method.dehaze(hazy[:1], 128), rtol=0, atol=1e-5)


def test_the_halo_is_needed(monkeypatch):
    """The comparison would notice a halo one pixel too narrow."""
    method, hazy, reach = vivid(*D4), smooth(8, 150, 200), tiling.reach
    assert_same(method, hazy, 128)
    monkeypatch.setattr(tiling, "reach", lambda *modules: max(0, reach(*modules) - 1))
    with pytest.raises(AssertionError):
        assert_same(method, hazy, 128)


@torch.no_grad()
def test_the_widest_layers_see_tiles_only():
    """What bounds the memory: no side of theirs is longer than a tile and its halo."""
    removal, seen = tiny(D4[2], f"nedr.encoder={RELEASED}").eval().removal, {}
    layers = {"stem": removal.pyramid.encoder.conv_stem, "KAN-CID": removal.pyramid.mixers[0], "tail": removal.head}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _, x, y, name=name: seen.setdefault(name, set()).update(x[0].shape[2:]))
    removal(torch.rand(1, 3, 288, 544), tile=128)
    assert max(seen["stem"]) <= 128 + 2 * 16
    assert max(seen["KAN-CID"]) <= 128 // 8 + 2 * 4
    assert max(seen["tail"]) <= 128 // 2 + 2 * 3


def test_no_seam():
    """What little tiles change is not gathered where they meet."""
    method, hazy = vivid(D4[2]), smooth(9, 160, 384)
    whole, tiled = method.dehaze(hazy), method.dehaze(hazy, 128)
    steps = (tiled - whole).diff(dim=3).abs()
    assert steps.max() <= 2 * 1e-5
    columns = steps.mean((0, 1, 2))
    meets = [start - 1 for start in (128, 256)]
    assert columns[meets].max() <= max(3 * columns.median(), 1e-7)


@pytest.mark.parametrize("guided", [False, True])
def test_dark_channel_prior_in_tiles(guided):
    method = DCP(DCPSettings(guided_filter=guided))
    assert_same(method, smooth(10, 211, 300), 128, tolerance=1e-12 if guided else 0)  # running sums begin at the tile
    assert method.estimate(smooth(10, 211, 300))["transmission"].shape == (1, 1, 211, 300)


def test_a_guided_filter_in_tiles_is_the_same():
    guide, x = picture(11, 1, 3, 90, 120), picture(12, 1, 1, 90, 120)
    whole = physics.guided_filter(guide, x, radius=7)
    for tile in (16, 50):
        assert torch.equal(physics.guided_filter(guide, x, radius=7, tile=tile), whole)


def test_estimate_returns_clear_image_and_transmission():
    method, hazy = vivid(*D4, "nedr.airlight=max"), smooth(13, 100, 131)
    found = method.estimate(hazy)
    assert found["clear"].shape == (1, 3, 100, 131)
    assert found["transmission"].shape == (1, 1, 100, 131)
    padded = models.method.reflect(models.method.reflect(hazy, 2, 128), 3, 160)
    expected = physics.restore(hazy, found["transmission"], padded.amax((2, 3), keepdim=True))
    torch.testing.assert_close(found["clear"], expected)
    assert not found["transmission"].requires_grad


@pytest.mark.parametrize("tile", [127, 1, 0, -5])
def test_tiles_too_small_are_refused(tile):
    with pytest.raises(UserError, match=rf"test\.tile={tile}: must be at least 128"):
        DCP(DCPSettings(guided_filter=False)).dehaze(torch.rand(1, 3, 8, 8), tile)


# Methods without tiles of their own.


class Plain(Method):
    """Adds a constant, or another one for every piece that it sees."""

    multiple, minimum = 32, 96

    def __init__(self, differ: bool = False):
        super().__init__(None)
        self.differ, self.sizes = differ, []

    def restore(self, hazy):
        assert hazy.shape[2] % 32 == hazy.shape[3] % 32 == 0
        self.sizes.append(min(hazy.shape[2:]))
        return hazy * 0.5 + (len(self.sizes) % 2 * 0.3 if self.differ else 0.1)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 900), st.integers(1, 900), st.integers(128, 400))
def test_a_plain_method_in_tiles(height, width, tile):
    method, hazy = Plain(), torch.rand(1, 3, height, width)
    torch.testing.assert_close(method.dehaze(hazy, tile), method.dehaze(hazy), rtol=0, atol=1e-6)
    assert min(method.sizes) >= method.minimum


def test_a_plain_methods_tiles_are_faded():
    dehazed = Plain(differ=True).dehaze(torch.zeros(1, 3, 400, 700), 256)
    assert dehazed.max() - dehazed.min() == pytest.approx(0.3)
    for dim in (2, 3):
        assert dehazed.diff(dim=dim).abs().max() < 0.3 * 1.6 / 64  # over 32 pixels on either side, as a cosine


# Geometric self-ensemble.


class Skewed(Method):
    """Darkens the image by where it lies."""

    def restore(self, hazy):
        rows, columns = (torch.linspace(0, 1, side) for side in hazy.shape[2:])
        return hazy * rows[:, None] * columns.square()


MOVES = {
    "left-right": lambda x: x.flip(3),
    "up-down": lambda x: x.flip(2),
    "quarter turn": lambda x: x.rot90(1, (2, 3)),
    "transposed": lambda x: x.transpose(2, 3),
}


@pytest.mark.parametrize("move", MOVES)
def test_an_ensemble_is_equivariant(move):
    move, hazy = MOVES[move], torch.rand(2, 3, 30, 41)
    method = Skewed(None)
    assert (method.dehaze(move(hazy)) - move(method.dehaze(hazy))).abs().max() > 0.1
    expected = move(method.dehaze(hazy, ensemble=True))
    torch.testing.assert_close(method.dehaze(move(hazy), ensemble=True), expected, rtol=0, atol=1e-5)


def test_an_ensemble_of_nedr_is_equivariant():
    method, hazy = vivid(*D4), smooth(14, 100, 150)
    whole = method.dehaze(hazy, ensemble=True)
    torch.testing.assert_close(method.dehaze(hazy.flip(3), ensemble=True), whole.flip(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(method.dehaze(hazy, 128, ensemble=True), whole, rtol=0, atol=1e-5)


def test_an_ensemble_of_an_equivariant_method_changes_nothing():
    method, hazy = Plain(), torch.rand(1, 3, 50, 70)
    torch.testing.assert_close(method.dehaze(hazy, ensemble=True), method.dehaze(hazy), rtol=0, atol=1e-6)
    assert len(method.sizes) == 9
    with pytest.raises(UserError, match="N,3,H,W"):
        method.dehaze(hazy[0], ensemble=True)
