"""The working size: the haze is found in a small image of the whole view, the clear image computed at full size."""

import pytest
import torch
import torch.nn.functional as F
from helpers import D4, tiny, tiny_settings
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tiles import in_double, smooth, vivid

import models
from models.nedr.working_size import network_size
from utils import config, physics
from utils.errors import UserError

sides = st.integers(1, 9000)


@settings(max_examples=200)
@given(sides, sides, st.sampled_from([32, 64, 160, 224, 256]))
def test_network_size(height, width, size):
    seen = network_size(height, width, size)
    if min(height, width) <= size:
        assert seen is None
        return
    for side, small in zip((height, width), seen, strict=True):
        assert small % 32 == 0
        assert small <= side  # never enlarged
        wanted = side * size / min(height, width)
        assert abs(small - wanted) <= 16 or small == max(32, side // 32 * 32)


def test_the_working_size_is_full_size_by_default():
    assert network_size(460, 620, 0) is None
    assert tiny_settings().method.working_size == 0


def test_network_size_of_known_images():
    assert network_size(460, 620, 160) == (160, 224)
    assert network_size(3000, 4000, 224) == (224, 288)


@pytest.mark.parametrize("airlight", ["max", "dark_channel", "learned"])
def test_working_size_matches_the_formula(airlight):
    """By hand: the small image through the full-size method, its t interpolated, J = (I - A) / t + A."""
    hazy = smooth(1, 333, 450)
    method = vivid(*D4, f"nedr.airlight={airlight}", "nedr.working_size=128")
    found = method.estimate(hazy)
    small = F.interpolate(hazy, (128, 160), mode="bilinear", antialias=True)
    seen = method.removal(small, airlight)
    t = F.interpolate(seen.transmission, (333, 450), mode="bilinear")
    torch.testing.assert_close(found["transmission"], t, rtol=0, atol=1e-6)
    torch.testing.assert_close(found["clear"], physics.restore(hazy, t, seen.airlight), rtol=0, atol=1e-5)
    assert found["transmission"].std() > 0.02


@pytest.mark.parametrize("size", [128, 140, 4000])
def test_images_below_the_working_size_are_not_resized(size):
    """Bit for bit: they are never enlarged."""
    hazy = smooth(2, 128, 160)
    full, other = vivid(*D4), vivid(*D4, f"nedr.working_size={min(size, 2048)}")
    for name, value in full.estimate(hazy).items():
        assert torch.equal(other.estimate(hazy)[name], value)


@pytest.mark.parametrize("modules", [(), D4])
def test_tiles_change_nothing(modules):
    method, hazy = in_double(vivid(*modules, "nedr.working_size=128")), smooth(3, 300, 500).double()
    whole = method.estimate(hazy)
    tiled = method.estimate(hazy, 128)
    for name, value in whole.items():
        torch.testing.assert_close(tiled[name], value, rtol=0, atol=1e-9)


def test_the_network_processes_a_small_version_of_a_large_image():
    method, seen = tiny(*D4, "nedr.working_size=64").eval(), []
    method.removal.pyramid.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    assert method.dehaze(torch.rand(1, 3, 1500, 2000), 1024).shape == (1, 3, 1500, 2000)
    assert seen == [(1, 3, 64, 96)]


@pytest.fixture(scope="module", params=[(), ("nedr.guided_radius=4",), ("nedr.query=2",)])
def small_working_size(request) -> models.Method:
    return tiny("nedr.working_size=64", *request.param).eval()


@pytest.mark.parametrize("size", [(1, 1), (2, 300), (5, 250), (700, 14), (31, 64), (129, 131), (40, 2000)])
def test_any_shape_is_dehazed_at_a_working_size(size, small_working_size):
    hazy = torch.rand(1, 3, *size)
    found = small_working_size.estimate(hazy)
    assert found["clear"].shape == (1, 3, *size)
    assert found["transmission"].shape == (1, 1, *size)
    assert found["clear"].isfinite().all()


def test_idrm_may_be_queried_between_its_features():
    """Twice as finely is another t, near the interpolated one: the field is continuous."""
    hazy = smooth(4, 300, 400)
    coarse, fine = (
        vivid(*D4[:1], D4[2], "nedr.idrm_hidden=256", "nedr.working_size=128", f"nedr.query={query}")
        for query in (1, 2)
    )
    a, b = (method.estimate(hazy)["transmission"] for method in (coarse, fine))
    assert not torch.equal(a, b)
    assert (a - b).abs().mean() < 0.3 * a.std()


def test_guided_t_follows_edges():
    """A step of t that lies beside the picture's own is drawn to it; far from edges nothing happens."""
    hazy = torch.zeros(1, 3, 64, 128) + 0.2
    hazy[..., 64:] = 0.8
    t = torch.full((1, 1, 16, 32), 0.3)
    t[..., 15:] = 0.9  # one coarse pixel, four pixels, too early
    small = F.interpolate(hazy, (16, 32), mode="bilinear", antialias=True)
    plain = F.interpolate(t, (64, 128), mode="bilinear")
    refined = physics.fast_guided_filter(hazy, small, t, radius=3)
    jump = (refined[..., 64:] - refined[..., :64].flip(3))[..., 0].abs().mean()
    assert jump > 0.3 > (plain[..., 64] - plain[..., 63]).abs().mean()
    torch.testing.assert_close(refined[..., :30], plain[..., :30], atol=0.01, rtol=0)
    torch.testing.assert_close(refined[..., -30:], plain[..., -30:], atol=0.01, rtol=0)


def test_the_fast_filter_at_full_size_is_the_filter():
    guide, t = smooth(5, 40, 50).mean(1, keepdim=True).expand(-1, 3, -1, -1), torch.rand(1, 1, 40, 50)
    low, high = guide.amin(), guide.amax()
    guide = (guide - low) / (high - low)  # as the filter itself begins
    torch.testing.assert_close(
        physics.fast_guided_filter(guide, guide, t, 5), physics.guided_filter(guide, t, 5), atol=1e-5, rtol=0
    )


def test_the_working_size_may_change_after_training():
    method = tiny(*D4).eval()
    models.change(method, {"working_size": 64})
    assert method.estimate(torch.rand(1, 3, 200, 200))["clear"].shape == (1, 3, 200, 200)
    for wrong, why in ((-1, "at least 0"), (16, "32 or more"), (100_000, "at most"), ("large", "whole number")):
        with pytest.raises(UserError, match=why):
            models.change(method, {"working_size": wrong})


def test_official_files_accept_a_working_size(official_file):
    method = models.load(official_file, working_size=128)
    assert method.dehaze(smooth(6, 256, 320)).shape == (1, 3, 256, 320)


def test_steps_at_several_scales():
    """Every step at one of them, in sides that the network can take; no scale twice as likely."""
    method = tiny(*D4, "nedr.scales=[0.5, 1, 1.5]")
    maps = [torch.rand(1, channels, 128, 192) for channels in (3, 3, 1)]
    torch.manual_seed(0)
    sizes = [tuple(tuple(each.shape[2:]) for each in method._rescaled(maps)) for _ in range(60)]
    assert {each[0] for each in sizes} == {(64, 96), (128, 192), (192, 288)}
    assert all(len(set(each)) == 1 for each in sizes)
    assert max(sizes.count(each) for each in set(sizes)) < 35
    with pytest.raises(UserError, match=r"nedr\.scales=\[\]"):
        tiny_settings("nedr.scales=[]")


def test_only_idrm_is_asked_at_other_sizes():
    with pytest.raises(UserError, match=r"nedr\.query=2: only IDRM is asked at other sizes"):
        config.load("nedr", models.settings_types(), [], ["nedr.query=2", "nedr.idrm=false"])
