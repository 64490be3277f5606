"""NeDR's modules against slow forms written straight from the papers and the released code's description."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import picture
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from models.method import frozen
from models.nedr.airlight import POOLED_RANGE
from models.nedr.discriminator import Discriminator
from models.nedr.generators import TRANSMISSION_RANGE, ProductionNet, RemovalNet
from models.nedr.implicit import IDRM, pixel_centres, position_encoding
from models.nedr.kan import KANCID, KANLinear, bspline_bases, knots
from models.nedr.residual import DREM
from models.pyramid import Fusion, squash

SMALL = settings(max_examples=30, deadline=None)


def cox_de_boor(x: float, i: int, order: int, grid: list[float]) -> float:
    """The textbook recursion, one number at a time."""
    if order == 0:
        return float(grid[i] <= x < grid[i + 1])
    left = (x - grid[i]) / (grid[i + order] - grid[i])
    right = (grid[i + order + 1] - x) / (grid[i + order + 1] - grid[i + 1])
    return left * cox_de_boor(x, i, order - 1, grid) + right * cox_de_boor(x, i + 1, order - 1, grid)


GRID = [-1 + 0.4 * (k - 3) for k in range(12)]


def bases_at(x: float) -> torch.Tensor:
    return bspline_bases(torch.tensor([[x]])).flatten()


def test_knots():
    torch.testing.assert_close(knots(), torch.tensor(GRID))


@SMALL
@given(st.floats(-3, 3, width=32))
def test_bases_follow_cox_and_de_boor(x):
    expected = torch.tensor([cox_de_boor(x, i, 3, GRID) for i in range(8)])
    torch.testing.assert_close(bases_at(x), expected, atol=2e-5, rtol=0)


@SMALL
@given(st.floats(-1, 1, width=32))
def test_bases_sum_to_one_on_the_grid(x):
    assert bases_at(x).sum().item() == pytest.approx(1, abs=1e-5)


@SMALL
@given(st.floats(2.25, 2**20, width=32))
def test_bases_vanish_far_outside(x):
    assert not bases_at(x).any()
    assert not bases_at(-x).any()


def test_kan_linear_is_a_sum_of_functions_on_edges():
    layer, x = KANLinear(3, 5), torch.randn(2, 3, 4, 6)
    points = x.permute(0, 2, 3, 1)
    bases = torch.stack([bspline_bases(points.reshape(-1, 1)[:, :1])]).reshape(*points.shape, 8)
    expected = torch.einsum("nhwi,oi->nohw", F.silu(points), layer.base_weight)
    expected += torch.einsum("nhwib,oib,oi->nohw", bases, layer.spline_weight, layer.spline_scaler)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_kan_splines_begin_as_small_noise_at_the_grid_points():
    layer = KANLinear(16, 16)
    points = knots()[3:-3]
    values = torch.einsum("pb,oib->poi", bspline_bases(points[:, None]).reshape(6, 8), layer.spline_weight)
    assert values.abs().max() <= 0.05 / 5 + 1e-5  # uniform in +- 0.1 / grid_size / 2
    assert values.std().item() == pytest.approx(0.1 / 5 / math.sqrt(12), rel=0.1)


def test_kan_cid_mixes_channels_at_every_pixel_alone():
    module, x = KANCID(4), torch.randn(1, 4, 16, 16)
    moved = x.clone()
    moved[0, 1, 8, 8] += 1
    changed = (module(moved) - module(x)).abs().amax((0, 1)) > 0
    rows, columns = changed.nonzero().T
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (5, 11, 5, 11)  # one 7x7 window, no further
    assert (module(moved) - module(x)).abs().amax((0, 2, 3)).gt(0).all()  # and every channel


def naive_idrm(module: IDRM, features: torch.Tensor) -> torch.Tensor:
    """The MLP point by point on unfolded features, position, encoding and cell."""
    n, c, height, width = features.shape
    neighbours = F.unfold(features, 3, padding=1).reshape(n, 9 * c, height, width)
    out = []
    for i in range(height):
        for j in range(width):
            p, cell, encoded = ((2 * i + 1) / height - 1, (2 * j + 1) / width - 1), (2.0, 2.0), []
            for axis in p:
                encoded += [math.sin(2**k * math.pi * axis) for k in range(4)]
                encoded += [math.cos(2**k * math.pi * axis) for k in range(4)]
            where = [*p, *encoded] if module.positional else [0.0] * 18
            x = torch.cat([neighbours[:, :, i, j], torch.tensor([[*where, *cell]]).expand(n, -1)], 1)
            for k, layer in enumerate(module.layers):
                x = layer(x if k == 0 else x.relu())
            out.append(x)
    return torch.stack(out, 2).reshape(n, -1, height, width)


@pytest.mark.parametrize("positional", [True, False])
@torch.no_grad()
def test_idrm_is_the_mlp_at_every_point(positional):
    module, features = IDRM(4, hidden=16, out_channels=5, positional=positional), torch.randn(2, 4, 5, 7)
    torch.testing.assert_close(module(features), naive_idrm(module, features), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_only_the_positional_form_depends_on_position():
    flat = torch.ones(1, 4, 9, 9)
    for positional in (True, False):
        inside = IDRM(4, hidden=16, positional=positional)(flat)[..., 1:-1, 1:-1]  # the border sees zero padding
        spread = inside.std((2, 3)).max()
        assert spread > 1e-3 if positional else spread < 1e-6


@torch.no_grad()
def test_idrm_queried_at_its_own_size_is_the_same():
    module, features = IDRM(4, hidden=16), torch.randn(1, 4, 8, 6)
    assert torch.equal(module(features, (8, 6)), module(features))


@torch.no_grad()
def test_idrm_queried_more_finely_is_the_same_field():
    """At another resolution: a query at the same point with the same features gives the same value, cell apart."""
    module, features = IDRM(4, hidden=16), torch.randn(1, 4, 4, 4)
    module.layers[0].weight[:, -2:] = 0  # the cell tells the resolution, on purpose
    # Pixel centres of a grid three times as fine include those of the coarse one: every third, from the second.
    torch.testing.assert_close(module(features, (12, 12))[..., 1::3, 1::3], module(features), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_idrm_is_continuous():
    """Doubling the resolution halves the largest step between neighbours; a jump would keep it."""
    module, features = IDRM(4, hidden=16), torch.randn(1, 4, 4, 4)
    steps = [module(features, (size, size)).diff(dim=3).abs().max().item() for size in (64, 128, 256)]
    assert steps[1] < 0.65 * steps[0]
    assert steps[2] < 0.65 * steps[1]


@torch.no_grad()
def test_idrm_depends_on_the_cell_size():
    module, features = IDRM(4, hidden=16), torch.randn(1, 4, 4, 4)
    centre = module(features, (12, 12))[..., 1::3, 1::3]
    assert (centre - module(features)).abs().max() > 1e-3


def test_position_encoding():
    assert pixel_centres(4).tolist() == [-0.75, -0.25, 0.25, 0.75]
    encoded = position_encoding(3, 5)
    assert encoded.shape == (1, 18, 3, 5)
    assert encoded.abs().max() <= 1
    torch.testing.assert_close(encoded[0, 2 + 1, :, 0], (2 * math.pi * pixel_centres(3)).sin())  # row, k = 1
    torch.testing.assert_close(encoded[0, 2 + 8 + 4 + 3, 0], (8 * math.pi * pixel_centres(5)).cos())  # column, k = 3


@torch.no_grad()
def test_drem_becomes_the_identity():
    module, x = DREM(4, growth=6), torch.randn(2, 4, 9, 11)
    assert not torch.equal(module(x), x)
    module.make_identity()
    assert torch.equal(module(x), x)


@pytest.mark.parametrize("skip", [True, False])
@torch.no_grad()
def test_fusion_projects_before_upsampling_as_well_as_after(skip):
    module, x, other = Fusion(8, 4, skip), torch.randn(1, 8, 5, 6), torch.randn(1, 8, 5, 6)
    y = module.refine(x + module.skip(other)) if skip else module.refine(x)
    published = module.project(F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=True))
    torch.testing.assert_close(module(x, other), published, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(24, 24), (64, 96), (70, 33)])
def test_discriminator_scores_patches(size):
    height, width = (side // 8 - 2 for side in size)
    assert Discriminator()(torch.rand(2, 3, *size)).shape == (2, 1, height, width)


def test_a_score_sees_seventy_pixels():
    discriminator, x = Discriminator().eval(), torch.rand(1, 3, 128, 128, requires_grad=True)
    discriminator(x)[0, 0, 7, 7].backward()
    rows = x.grad.abs().amax((0, 1, 3)).nonzero()
    assert rows.max() - rows.min() + 1 == 70


def test_discriminator_convolutions_have_spectral_norm_one():
    discriminator = Discriminator().train()
    for _ in range(10):  # the power method turns once a pass
        discriminator(torch.rand(1, 3, 24, 24))
    discriminator.eval()(torch.rand(1, 3, 24, 24))
    for conv in discriminator.convs[:2]:
        norm = torch.linalg.matrix_norm(conv.weight_orig.flatten(1), 2).item()
        assert conv.sigma().item() == pytest.approx(norm, rel=0.1)


@torch.no_grad()
def test_haze_production_stays_in_range_and_refines_the_scattering_model():
    net, clear, depth = ProductionNet(4).eval(), torch.rand(2, 3, 32, 40), torch.rand(2, 1, 32, 40) * 5
    made = net(clear, depth, torch.full((2, 1, 1, 1), 1.0))
    assert made.shape == clear.shape
    assert made.min() >= 0
    assert made.max() <= 1
    net.decode[3].conv.weight.zero_()
    net.decode[3].conv.bias.zero_()
    A = torch.full((2, 3, 1, 1), 0.8)
    t = (-depth).exp()
    torch.testing.assert_close(net(clear, depth, torch.ones(2, 1, 1, 1), A), clear * t + 0.8 * (1 - t))


@pytest.mark.parametrize("size", [(128, 128), (128, 160)])
@torch.no_grad()
def test_haze_removal_gives_sizes_and_ranges(size):
    net, hazy = RemovalNet(4, airlight_head="pooled").eval(), torch.rand(2, 3, *size)
    found = net(hazy, "learned")
    assert found.clear.shape == hazy.shape
    assert found.depth.shape == found.transmission.shape == (2, 1, *size)
    assert found.density.shape == (2, 1, 1, 1)
    assert found.airlight.shape == (2, 3, 1, 1)
    for value, (low, high) in (
        (found.clear, (0, 1)),
        (found.transmission, TRANSMISSION_RANGE),
        (found.density, (0.6, 1.8)),
        (found.airlight, POOLED_RANGE),
    ):
        assert value.min() >= low
        assert value.max() <= high
    torch.testing.assert_close((-found.depth * found.density).exp(), found.transmission)


def test_density_learns_without_moving_the_encoder():
    """The released code detaches the pooled features from the density head; from the airlight head they are not."""
    net, hazy = RemovalNet(4, kan_cid=False, airlight_head="pooled"), torch.rand(2, 3, 64, 64)
    encoder = next(net.pyramid.encoder.parameters())
    net(hazy, "learned").density.sum().backward()
    assert encoder.grad is None
    assert net.density[0].weight.grad.any()
    net(hazy, "learned").airlight.sum().backward()
    assert encoder.grad.any()


def test_squash():
    x = torch.tensor([-100.0, 0.0, 100.0])
    torch.testing.assert_close(squash(x, 0.6, 1.8), torch.tensor([0.6, 1.2, 1.8]))


def test_frozen_passes_gradients_without_collecting_them():
    inner, outer = nn.Linear(2, 2), nn.Linear(2, 2)
    inner.bias.requires_grad_(False)
    with frozen(inner):
        y = inner(outer(torch.ones(1, 2)))
    y.sum().backward()
    assert inner.weight.grad is None
    assert outer.weight.grad.any()
    assert inner.weight.requires_grad
    assert not inner.bias.requires_grad  # what was frozen before stays so


def test_frozen_thaws_after_an_error():
    layer = nn.Linear(2, 2)
    with pytest.raises(ZeroDivisionError), frozen(layer):
        raise ZeroDivisionError
    assert layer.weight.requires_grad


def test_haze_removal_inverts_the_scattering_model():
    net, hazy = RemovalNet(4, kan_cid=False, idrm=False, drem=False).eval(), picture(0, 1, 3, 64, 64)
    with torch.no_grad():
        found = net(hazy)
    assert torch.equal(found.airlight, hazy.amax((2, 3), keepdim=True))
    expected = ((hazy - found.airlight) / found.transmission + found.airlight).clamp(0, 1)
    torch.testing.assert_close(found.clear, expected)
