import copy
import dataclasses
import functools
import math
import re
import runpy
import sys
from typing import get_args, get_type_hints

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from data import degradations, haze, images, paths, synthesis
from data.sets import pairing
from utils import config, physics
from utils.errors import UserError

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 40)


@settings(max_examples=40, deadline=None)
@given(seeds, sizes, sizes)
def test_smooth_depth_is_positive_with_maximum_one(seed, height, width):
    depth = synthesis.smooth_depth(height, width, np.random.default_rng(seed))
    assert depth.shape == (1, height, width)
    assert depth.dtype == torch.float32
    assert depth.min() > 0
    assert depth.max() == 1


def test_smooth_depth_recedes_and_is_smooth():
    for seed in range(20):
        depth = synthesis.smooth_depth(200, 300, np.random.default_rng(seed))[0]
        assert depth[:50].mean() > depth[-50:].mean()
        assert depth.diff(dim=0).abs().max() < 0.05
        assert depth.diff(dim=1).abs().max() < 0.05


@settings(max_examples=40, deadline=None)
@given(seeds, st.floats(0, 10), st.floats(0, 1))
def test_haze_follows_the_closed_form(seed, beta, grey):
    generator = torch.Generator().manual_seed(seed)
    clear, depth = torch.rand(3, 4, 5, generator=generator), torch.rand(1, 4, 5, generator=generator)
    hazy, t = synthesis.add_haze(clear, depth, beta, torch.full((3,), grey))
    want_t = np.exp(-beta * depth.numpy())
    np.testing.assert_allclose(t.numpy(), want_t, atol=1e-6)
    np.testing.assert_allclose(hazy.numpy(), clear.numpy() * want_t + grey * (1 - want_t), atol=1e-6)
    assert hazy.min() >= 0
    assert hazy.max() <= 1


def test_no_haze_and_dense_haze():
    clear, depth, light = torch.rand(3, 6, 6), torch.rand(1, 6, 6) + 0.1, torch.tensor([0.8, 0.9, 1.0])
    torch.testing.assert_close(synthesis.add_haze(clear, depth, 0.0, light)[0], clear)
    torch.testing.assert_close(synthesis.add_haze(clear, depth, 1e4, light)[0], light.view(3, 1, 1).expand(3, 6, 6))


@settings(max_examples=40, deadline=None)
@given(seeds, st.floats(0, 0.3), st.booleans())
def test_random_haze_keeps_its_ranges(seed, colour, given_depth):
    clear = torch.rand(3, 8, 9)
    depth = torch.rand(1, 8, 9) if given_depth else None
    law = config.section("haze", ["density=[0.5, 1.0]", "airlight=[0.6, 0.9]", f"colour={colour}"])
    item = synthesis.random_haze(clear, depth, np.random.default_rng(seed), law)
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
    again = synthesis.add_haze(
        clear, -item["transmission"].log() / item["density"], item["density"].item(), item["airlight"]
    )
    torch.testing.assert_close(again[0], item["hazy"], atol=1e-5, rtol=0)


def test_random_haze_without_colour_is_grey_and_repeats():
    clear = torch.rand(3, 8, 9)
    law = config.section("haze")
    first, second = (synthesis.random_haze(clear, None, np.random.default_rng(3), law) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert first["airlight"].unique().numel() == 1


def draws(count, *overrides, clear=None):
    law, clear = config.section("haze", overrides), torch.rand(3, 6, 6) if clear is None else clear
    return [synthesis.random_haze(clear, None, np.random.default_rng(seed), law) for seed in range(count)]


def test_airlight_is_cut_at_one_and_coloured_at_times():
    items = draws(400, "airlight=[0.7, 1.1]", "colour=0.05", "colour_probability=0.3")
    grey = [item["airlight"].unique().numel() == 1 for item in items]
    assert 0.62 < np.mean(grey) < 0.78
    light = torch.stack([item["airlight"] for item, alike in zip(items, grey, strict=True) if alike])
    assert light.max() == 1
    assert 0.15 < (light[:, 0] == 1).float().mean() < 0.36  # a quarter of [0.7, 1.1] lies beyond 1


def test_photometric_changes_apply_to_the_clear_image():
    clear = torch.rand(3, 6, 6) * 0.8
    plain = draws(1, clear=clear)[0]
    assert torch.equal(plain["clear"], clear)
    brighter = draws(40, "gamma.probability=1", "gamma.range=[0.5, 0.5]", clear=clear)
    for item in brighter:
        torch.testing.assert_close(item["clear"], clear.clamp(min=1e-3).sqrt())
    gains = draws(40, "gains.probability=1", "gains.range=[0.8, 1.2]", clear=clear)
    for item in gains:
        gain = (item["clear"] / clear).flatten(1)
        torch.testing.assert_close(gain, gain[:, :1].expand_as(gain), atol=1e-4, rtol=0)
        torch.testing.assert_close(
            item["hazy"], item["clear"] * item["transmission"] + item["airlight"] * (1 - item["transmission"])
        )
    assert (
        12 < sum(not torch.equal(item["clear"], clear) for item in draws(40, "gains.probability=0.5", clear=clear)) < 28
    )


def test_noise_is_as_large_as_rounding():
    clear = torch.full((3, 40, 40), 0.5)
    quiet, noisy = (draws(1, f"noise={noise}", clear=clear)[0] for noise in (0, 0.5))
    difference = (noisy["hazy"] - quiet["hazy"]) * 255
    assert difference.abs().max() <= 0.5 + 1e-3
    assert difference.std() == pytest.approx((1 / 12) ** 0.5, rel=0.1)


@pytest.mark.parametrize("size", [(160, 224), (31, 17), (5, 90)])
def test_outdoor_depth(size):
    clear = torch.rand(3, *size)
    for seed in range(5):
        one, two = (synthesis.outdoor_depth(clear, np.random.default_rng(seed)) for _ in range(2))
        assert one.shape == (1, *size)
        assert torch.equal(one, two)
        assert one.isfinite().all()
        assert synthesis.LEAST_DEPTH <= one.min() <= one.max() == 1


def test_outdoor_depth_grows_upwards():
    """On the whole: the ground is near and the top of the image far."""
    clear = torch.full((3, 80, 100), 0.5)
    maps = torch.stack([synthesis.outdoor_depth(clear, np.random.default_rng(seed)) for seed in range(40)]).mean((0, 1))
    assert maps[:20].mean() > 2 * maps[-20:].mean()


@pytest.mark.parametrize("kind", ["patches", "dark_channel", "noise"])
@pytest.mark.parametrize("size", [(60, 84), (31, 17), (5, 90), (1, 1)])
def test_other_kinds_of_outdoor_depth(kind, size):
    shares = config.OutdoorDepth(**{"patches": 0, "dark_channel": 0, "noise": 0} | {kind: 1})
    clear = torch.rand(3, *size)
    one, two = (synthesis.varied_outdoor_depth(clear, np.random.default_rng(3), shares) for _ in range(2))
    assert one.shape == (1, *size)
    assert torch.equal(one, two)
    assert synthesis.LEAST_DEPTH <= one.min() <= one.max() == 1
    assert not torch.equal(one, synthesis.outdoor_depth(clear, np.random.default_rng(3))) or min(size) == 1


def test_shares_of_outdoor_depths():
    """Without any nothing is drawn for the choice: the haze of earlier runs stays what it was."""
    clear, none = torch.rand(3, 20, 30), config.OutdoorDepth(0, 0, 0)
    plain = synthesis.outdoor_depth(clear, np.random.default_rng(0))
    assert torch.equal(synthesis.varied_outdoor_depth(clear, np.random.default_rng(0), none), plain)
    with pytest.raises(UserError, match=r"haze\.outdoor: the sum of the fractions is more than 1"):
        config.OutdoorDepth(0.5, 0.4, 0.2)


def test_dark_channel_depth_recovers_the_depth_of_existing_haze():
    clear = torch.rand(3, 90, 90) * 0.2
    clear[:, :, 45:] = clear[:, :, 45:] * 0.3 + 0.7
    depth = synthesis.varied_outdoor_depth(clear, np.random.default_rng(0), config.OutdoorDepth(0, 1, 0))
    assert depth[..., 60:].mean() > 5 * depth[..., :30].mean()


NAMES = [field.name for field in dataclasses.fields(config.Degradations) if field.name != "airlight"]
fractions = st.floats(0, 1).map(abs)  # without -0.0, which NumPy does not take for an end


@functools.cache
def defaults():
    return config.section("degradations")


def only_with(*names):
    """The degradations of configs.yml, those of ``names`` always and no others."""
    values = copy.deepcopy(defaults())
    for name in NAMES:
        getattr(values, name).probability = int(name in names)
    return values


def scene(seed=0, height=24, width=32):
    rng = np.random.default_rng(seed)
    clear, depth = (torch.from_numpy(rng.random((c, height, width), np.float32)) for c in (3, 1))
    return clear, depth


@settings(max_examples=30, deadline=None)
@given(fractions, st.floats(0.1, 10), st.integers(0, 99))
def test_illumination(factor, gamma, seed):
    x, _ = scene(seed, 5, 6)
    np.testing.assert_allclose(
        degradations.illuminate(x, factor, gamma), factor * x.double().numpy() ** gamma, atol=1e-6
    )
    assert torch.equal(degradations.illuminate(x, 1.0, 1.0), x)


@settings(max_examples=50, deadline=None)
@given(fractions, st.floats(-1, 1), st.floats(-1, 1))
def test_airlight_colour(grey, warmth, green):
    light = torch.full((3, 1, 1), grey)
    red, _, blue = tinted = degradations.tint(light, warmth, green).flatten()
    assert tinted.min() >= 0
    assert tinted.max() <= 1
    assert (red - blue).item() == pytest.approx(grey * warmth, abs=1e-6)
    assert torch.equal(degradations.tint(light, 0.0, 0.0), light)
    colder = degradations.tint(light, -warmth, green).flatten()
    torch.testing.assert_close(colder, tinted.flip(0))


def test_airlight_colour_by_hand():
    light = torch.full((3, 1, 1), 0.5)
    torch.testing.assert_close(degradations.tint(light, 0.5, 0.1).flatten(), torch.tensor([0.5, 0.45, 0.25]))
    torch.testing.assert_close(degradations.tint(light, -0.5, 0.1).flatten(), torch.tensor([0.25, 0.45, 0.5]))


@settings(max_examples=30, deadline=None)
@given(fractions, fractions, st.integers(0, 99))
def test_second_scattering(first, second, seed):
    clear, _ = scene(seed, 5, 6)
    light, t = torch.tensor([0.8, 0.6, 0.4]).view(3, 1, 1), torch.full((1, 5, 6), first)
    hazy, through = degradations.scatter_again(clear, t, light, second)
    torch.testing.assert_close(hazy, torch.tensor([1, 0.75, 0.5]).view(3, 1, 1) * clear * second + light * (1 - second))
    torch.testing.assert_close(through, t * second)


@settings(max_examples=30, deadline=None)
@given(fractions, fractions, fractions, st.integers(0, 99))
def test_two_grey_scatterings_equal_one_of_the_product_transmission(grey, first, second, seed):
    clear, depth = scene(seed, 5, 6)
    light = torch.full((3, 1, 1), grey + 1e-3).clamp(max=1)
    hazy, t = degradations.scatter_again(*synthesis.add_haze(clear, depth, first, light), light, second)
    torch.testing.assert_close(hazy, clear * t + light * (1 - t))
    assert torch.equal(degradations.scatter_again(clear, t, light, 1.0)[0], clear)


def test_second_scattering_in_the_dark():
    dark = degradations.scatter_again(torch.rand(3, 4, 4), torch.ones(1, 4, 4), torch.zeros(3, 1, 1), 0.9)[0]
    assert torch.equal(dark, torch.zeros(3, 4, 4))


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_is_gaussian_at_zero_transmission(sigma):
    clear, _ = scene()
    oracle = scipy.ndimage.gaussian_filter(
        clear.double().numpy(), sigma, axes=(1, 2), radius=int(3 * sigma + 0.5), mode="nearest"
    )
    np.testing.assert_allclose(degradations.blur(clear, torch.zeros(1, 24, 32), sigma), oracle, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.1, 50), fractions, fractions)
def test_blur_keeps_flat_and_near_areas(sigma, value, t):
    even = torch.full((3, 4, 7), value)
    torch.testing.assert_close(degradations.blur(even, torch.full((1, 4, 7), t), sigma), even)
    clear, _ = scene(0, 4, 7)
    assert torch.equal(degradations.blur(clear, torch.ones(1, 4, 7), sigma), clear)


def test_blur_grows_with_the_haze():
    clear, _ = scene()
    moved = [(degradations.blur(clear, torch.full((1, 24, 32), t), 1.5) - clear).abs().mean() for t in (0.9, 0.5, 0.1)]
    assert moved[0] < moved[1] < moved[2]


@pytest.mark.parametrize(("level", "shot", "read"), [(0.25, 0.04, 0.0), (0.5, 0.0, 0.02), (0.5, 0.03, 0.01)])
def test_noise_has_the_given_variance(level, shot, read):
    grey = torch.full((3, 200, 200), level)
    moved = degradations.add_noise(grey, np.random.default_rng(0), shot, read) - grey
    assert moved.var().item() == pytest.approx(shot**2 * level + read**2, rel=0.02)
    assert abs(moved.mean().item()) < 3e-4
    assert abs((moved[:, 1:] * moved[:, :-1]).mean().item()) < 1e-5


def test_zero_noise_changes_nothing():
    clear, _ = scene()
    assert torch.equal(degradations.add_noise(clear, np.random.default_rng(0), 0.0, 0.0), clear)


def test_jpeg():
    smooth = F.interpolate(torch.rand(1, 3, 4, 4), (64, 48), mode="bicubic")[0].clamp(0, 1)
    errors = [
        (degradations.compress(smooth, quality) - smooth).square().mean().sqrt().item() for quality in (100, 60, 5)
    ]
    assert errors[0] < 0.005
    assert errors[0] < errors[1] < errors[2]
    even = torch.full((3, 17, 9), 0.5)
    torch.testing.assert_close(degradations.compress(even, 50), even, atol=3 / 255, rtol=0)


def test_haze_without_degradations_is_the_scattering_model():
    clear, depth = scene()
    alone = only_with("haze")
    alone.haze.density = synthesis.DENSITY
    for seed in range(10):
        item = degradations.degrade(clear, depth, np.random.default_rng(seed), alone)
        assert torch.equal(item["clear"], clear)
        assert 0.6 <= item["density"] <= 1.8
        assert 0.7 <= item["airlight"].min() == item["airlight"].max() <= 1.0
        torch.testing.assert_close(item["transmission"], torch.exp(-item["density"] * depth))
        law = synthesis.add_haze(clear, depth, item["density"].item(), item["airlight"])
        torch.testing.assert_close((item["hazy"], item["transmission"]), law)
        made_up = degradations.degrade(clear, None, np.random.default_rng(seed), alone)
        depth_made_up = synthesis.smooth_depth(24, 32, np.random.default_rng(seed))
        torch.testing.assert_close(made_up["transmission"], torch.exp(-made_up["density"] * depth_made_up))


def test_degradations_apply_in_their_order():
    clear, depth = scene()
    values = only_with("illumination", "colour", "haze", "second_scattering", "blur")
    values.airlight, values.haze.density, values.blur.sigma = (0.8, 0.8), (1.5, 1.5), (0.9, 0.9)
    values.illumination.factor, values.illumination.gamma = (0.7, 0.7), (1.3, 1.3)
    values.colour.warmth, values.colour.green = (0.2, 0.2), (0.0, 0.0)
    values.second_scattering.transmission = (0.75, 0.75)
    item = degradations.degrade(clear, depth, np.random.default_rng(0), values)
    J, d = clear.double().numpy(), depth.double().numpy()
    A = 0.7 * np.array([0.8, 0.8 * 0.92, 0.8 * 0.8]).reshape(3, 1, 1) ** 1.3
    t = np.exp(-1.5 * d)
    once = 0.7 * J**1.3 * t + A * (1 - t)
    twice = A / A[0] * once * 0.75 + A * 0.25
    soft = scipy.ndimage.gaussian_filter(twice, 0.9, axes=(1, 2), radius=3, mode="nearest")
    np.testing.assert_allclose(item["hazy"], twice * 0.75 * t + soft * (1 - 0.75 * t), atol=1e-6)
    np.testing.assert_allclose(item["transmission"], 0.75 * t, atol=1e-6)
    np.testing.assert_allclose(item["airlight"], A, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.data(), seeds, st.booleans())
def test_degrade_keeps_shapes_and_ranges_whatever_the_settings(data, seed, with_depth):
    values = copy.deepcopy(defaults())
    values.airlight = tuple(sorted(data.draw(st.tuples(fractions, fractions))))
    for name in NAMES:
        kinds = get_type_hints(type(getattr(values, name)), include_extras=True)
        ends = {key: get_args(kind)[1] for key, kind in kinds.items() if key != "probability"}
        most = 8 if name == "blur" else 100
        ranges = {key: st.floats(end.low, min(end.high, most)).map(lambda x: x + 0.0) for key, end in ends.items()}
        drawn = {key: tuple(sorted(data.draw(st.tuples(some, some)))) for key, some in ranges.items()}
        setattr(values, name, type(getattr(values, name))(probability=data.draw(st.sampled_from([0, 0.5, 1])), **drawn))
    height, width = data.draw(st.tuples(sizes, sizes))
    clear, depth = scene(seed, height, width)
    before = clear.clone()
    first, second = (
        degradations.degrade(clear, depth if with_depth else None, np.random.default_rng(seed), values)
        for _ in range(2)
    )
    assert {key: tuple(value.shape) for key, value in first.items()} == {
        "hazy": (3, height, width),
        "clear": (3, height, width),
        "transmission": (1, height, width),
        "airlight": (3, 1, 1),
        "density": (1,),
    }
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in first.values())
    assert all(value.min() >= 0 for value in first.values())
    assert all(value.max() <= 1 for key, value in first.items() if key != "density")
    assert torch.equal(clear, before)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_nothing_happens_with_probability_zero():
    clear, depth = scene()
    for seed in range(5):
        item = degradations.degrade(clear, depth, np.random.default_rng(seed), only_with())
        assert torch.equal(item["hazy"], clear)
        assert item["density"] == 0
        assert torch.equal(item["transmission"], torch.ones_like(depth))


@pytest.mark.parametrize("name", NAMES)
def test_probability_one_is_always_and_a_half_is_half_the_time(name):
    clear, depth = scene(0, 8, 8)
    base = {"haze", "second_scattering"} - {name}  # colour and blur show where there is haze
    rest, always, half = only_with(*base), only_with(name, *base), only_with(name, *base)
    getattr(half, name).probability = 0.5
    for part in (rest, always, half):
        part.illumination.factor, part.airlight = (0.5, 0.6), (0.8, 0.8)

    def made(values):
        return [degradations.degrade(clear, depth, np.random.default_rng(seed), values)["hazy"] for seed in range(100)]

    without, on, some = made(rest), made(always), made(half)
    assert not any(torch.equal(*pair) for pair in zip(without, on, strict=True))
    happened = [torch.equal(*pair) for pair in zip(some, on, strict=True)]
    untouched = [torch.equal(*pair) for pair in zip(some, without, strict=True)]
    assert [a != b for a, b in zip(happened, untouched, strict=True)] == [True] * 100
    assert 30 < sum(happened) < 70


def test_disabling_one_degradation_leaves_the_others_unchanged():
    clear, depth = scene()
    for seed in range(20):
        item, without = (
            degradations.degrade(clear, depth, np.random.default_rng(seed), only_with(*names))
            for names in (NAMES, set(NAMES) - {"jpeg", "blur", "noise"})
        )
        for key in ("transmission", "airlight", "density"):
            assert torch.equal(item[key], without[key])


def test_default_degradations_look_like_haze():
    clear = F.interpolate(torch.rand(1, 3, 6, 6), (64, 64), mode="bicubic")[0].clamp(0, 1)
    items = [degradations.degrade(clear, None, np.random.default_rng(n), defaults()) for n in range(60)]
    contrast = torch.stack([item["hazy"].std() / clear.std() for item in items])
    brightness = torch.stack([item["hazy"].mean() for item in items])
    assert 0.2 < contrast.median() < 0.8
    assert brightness.min() > 0.15
    assert 0.4 < brightness.median() < 0.8


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("blur.probability=1.5", "degradations.blur.probability=1.5: must be at most 1"),
        ("jpeg.quality=[0,50]", r"degradations.jpeg.quality=\(0, 50\): must be two increasing numbers in \[1, 100\]"),
        ("jpeg.quality=[40.5,50]", "quality=40.5: needs a whole number"),
        ("colour.warmth=[0.3,-0.3]", "two increasing numbers"),
        ("airlight=[0.7,1.2]", "two increasing numbers"),
        ("haze.density=1", "needs a list"),
        ("noise.shoot=[0,1]", "unknown setting 'degradations.noise.shoot'; did you mean 'shot'"),
        ("blur=3", "'degradations.blur' is a section"),
        ("blur", "key=value"),
    ],
)
def test_bad_degradations_are_refused(text, wrong):
    with pytest.raises(UserError, match=wrong):
        config.section("degradations", [text])


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


def test_command_writes_the_haze_recorded_in_the_names(scenes):
    depth_options = ["--depth", str(scenes / "depth"), "--mirror", "--border", "3", "--density", "0.9", "0.9"]
    files = command(scenes, "out", *depth_options)
    assert len(files) == 3 + 3 + 6
    for path in paths.find(scenes / "out" / "depth"):
        whole = images.read_depth(scenes / "depth" / path.name).flip(2)[:, 3:-3, 3:-3]
        torch.testing.assert_close(images.read_depth(path), whole / whole.max(), atol=1e-4, rtol=0)
    pairs = pairing.pairs(scenes / "out" / "hazy", scenes / "out" / "clear")[0]
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


def test_command_with_degradations(scenes):
    more = ["--depth", str(scenes / "depth"), "--border", "3", "--degradations", "blur.probability=0"]
    files = command(scenes, "out", *more)
    assert command(scenes, "again", *more, "jpeg.probability=0.5") == files  # as configs.yml has it
    assert command(scenes, "other", *more, "jpeg.probability=0") != files
    pairs = pairing.pairs(scenes / "out" / "hazy", scenes / "out" / "clear")[0]
    assert {hazy.stem for hazy, _ in pairs} == {f"{n}_{k}" for n in range(3) for k in (1, 2)}
    for hazy, clear in pairs:
        assert images.read(hazy).std() < images.read(clear).std()
        assert torch.equal(images.read(clear), images.read(scenes / "rgb" / clear.name)[:, 3:-3, 3:-3])
    with pytest.raises(UserError, match=r"haze\.density"):
        command(scenes, "x", "--degradations", "--density", "0.5", "0.6")
    with pytest.raises(UserError, match="did you mean 'blur'"):
        command(scenes, "x", "--degradations", "blurr.probability=0")


def test_command_takes_several_sources(scenes):
    """As the shell hands over rgb/*.png."""
    whole = command(scenes, "whole", "--depth", str(scenes / "depth"))
    names = {kind: [str(path) for path in paths.find(scenes / kind)] for kind in ("rgb", "depth")}
    some = command(scenes, "some", "--clear", *names["rgb"], names["rgb"][0], "--depth", *names["depth"])
    assert some == whole


def test_command_refusals(scenes, tmp_path):
    with pytest.raises(UserError, match="--airlight"):
        command(scenes, "x", "--airlight", "0.7", "1.2")
    with pytest.raises(UserError, match="--border"):
        command(scenes, "x", "--border", "10")
    with pytest.raises(UserError, match="--per-image"):
        command(scenes, "x", "--per-image", "0")
    (scenes / "depth" / "2.png").unlink()
    with pytest.raises(UserError, match=r"2\.png: no depth map"):
        command(scenes, "y", "--depth", str(scenes / "depth"))
    command(scenes, "z")
    with pytest.raises(UserError, match="already"):
        command(scenes, "z")


@pytest.mark.parametrize("workers", [0, 2])
def test_command_leaves_out_what_it_cannot_use(scenes, capsys, workers):
    """A depth map of another size, a damaged image: the others are done, and come out as ever."""
    whole = command(scenes, "whole", "--depth", str(scenes / "depth"))
    images.write(scenes / "depth" / "1.png", torch.rand(1, 10, 10))
    content = (scenes / "rgb" / "2.png").read_bytes()
    (scenes / "rgb" / "2.png").write_bytes(content[: len(content) // 2])
    options = ["--clear", str(scenes / "rgb"), "--output", str(scenes / "some"), "--depth", str(scenes / "depth")]
    assert haze.main([*options, "--per-image", "2", "--workers", str(workers)]) == 2
    said = capsys.readouterr().err
    assert re.search(r"left out: .*1\.png is 30x20 but its depth map .* is 10x10", said)
    assert re.search(r"left out: .*2\.png: cannot be read as an image", said)
    assert f"error: 2 of {len(list((scenes / 'rgb').iterdir()))} images could not be used" in said
    some = {path.relative_to(scenes / "some") for path in (scenes / "some").rglob("*.png")}
    assert some == {name for name in whole if name.name[0] not in "12"}
    assert all((scenes / "some" / name).read_bytes() == (scenes / "whole" / name).read_bytes() for name in some)


def test_command_keeps_sub_folders(tmp_path, capsys):
    """Names may repeat in them: C001/00000, C002/00000."""
    for n, folder in enumerate(("C001", "C002")):
        images.write(tmp_path / "rgb" / folder / "00000.png", torch.full((3, 20, 30), 0.2 + 0.4 * n))
        images.write(tmp_path / "depth" / folder / "00000.png", torch.rand(1, 20, 30))
    (tmp_path / "rgb" / "00001.CR2").touch()
    files = command(tmp_path, "out", "--depth", str(tmp_path / "depth"))
    assert "passed over 1 CR2" in capsys.readouterr().err
    assert {str(name) for name in files if name.parts[0] != "hazy"} == {
        f"{side}/{folder}/00000.png" for side in ("clear", "depth") for folder in ("C001", "C002")
    }
    assert images.read(tmp_path / "out/clear/C002/00000.png").mean() == pytest.approx(0.6, abs=0.01)
    pairs, _ = pairing.pairs(tmp_path / "out/hazy", tmp_path / "out/clear")
    assert [clear.parent.name for _, clear in pairs] == ["C001", "C001", "C002", "C002"]
    assert pairs[0][0].stem.split("_")[2] != pairs[2][0].stem.split("_")[2]  # haze of its own in each folder
    images.write(tmp_path / "rgb/C001/00000.jpg", torch.rand(3, 20, 30))
    with pytest.raises(UserError, match=r"C001/00000\.jpg and .*C001/00000\.png would be written to one name"):
        command(tmp_path, "again")


def test_command_writes_nothing_among_its_inputs(scenes):
    with pytest.raises(UserError, match=r"rgb/made: lies in the folder of --clear, .*; give an --output outside"):
        command(scenes, "rgb/made")


def test_command_line_fails_with_one_line(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["haze.py", "--clear", str(tmp_path), "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(haze.__file__, run_name="__main__")
    assert ended.value.code == 2
    assert re.fullmatch(r"error: .*no images.*\n", capfd.readouterr().err)


def test_jpeg_format(scenes):
    assert {name.suffix for name in command(scenes, "j", "--format", "jpg")} == {".jpg"}
    assert math.isfinite(images.read(scenes / "j" / "clear" / "0.jpg").mean())


def test_dusk_darkens_scene_and_airlight_alike():
    clear = torch.rand(3, 6, 6)
    plain, dusk = (draws(20, *overrides, "airlight=[0.8, 0.8]", clear=clear) for overrides in ((), DUSK))
    for item in dusk:
        assert 0.4 <= item["airlight"].max() / 0.8 <= 0.6
        torch.testing.assert_close(item["clear"] / clear, (item["airlight"] / 0.8).expand_as(clear))
    assert all(torch.equal(item["clear"], clear) for item in plain)


DUSK = ("light.probability=1", "light.range=[0.4, 0.6]")


def test_airlight_has_the_colours_of_given_images(tmp_path):
    """The grey of the range times a colour, which is that of the brightest part of a hazy image."""
    colours = torch.tensor([[1.0, 0.88, 0.68], [0.7, 0.9, 1.0]])
    found = []
    for k, colour in enumerate(colours):
        hazy = 0.1 + 0.3 * torch.rand(3, 90, 120)
        hazy[:, :20] = 0.9 * colour.view(3, 1, 1)  # the sky
        images.write(tmp_path / f"{k}.png", hazy)
        found.append(physics.bright_colour(images.read(tmp_path / f"{k}.png")[None]).flatten())
    np.testing.assert_allclose(np.stack(found), colours, atol=0.01)
    law, clear = config.section("haze", ["airlight=[0.7, 0.9]", "colour=0"]), torch.rand(3, 6, 6)
    for seed in range(20):
        light = synthesis.random_haze(clear, None, np.random.default_rng(seed), law, colours=colours.numpy())[
            "airlight"
        ]
        light = light.flatten()
        assert 0.7 <= light.max() <= 0.9
        assert min(((light / light.max()) - colour).abs().max() for colour in colours) < 1e-6


@given(st.integers(0, 10_000), st.floats(0.2, 3), st.floats(0, 1))
def test_warped_depth_keeps_its_maximum_and_its_order_without_noise(seed, power, noise):
    rng = np.random.default_rng(seed)
    depth = torch.from_numpy(rng.uniform(0.01, 0.7, (1, 9, 12)).astype(np.float32))
    plain = synthesis.warped(depth, rng, config.Warp(1, [power, power], [0, 0]))
    torch.testing.assert_close(plain, 0.0 + (depth / depth.max()) ** power * depth.max(), rtol=1e-4, atol=1e-6)
    changed = synthesis.warped(depth, rng, config.Warp(1, [1, 1], [noise, noise]))
    assert changed.max().item() == pytest.approx(depth.max().item(), rel=1e-5)
    assert (changed > 0).all()


def test_mixed_scenes_show_what_is_nearer():
    """As if both were one scene: a wall at 0.5, and before it, in its left half, another one."""
    far, near = torch.full((4, 8, 10), 0.5), torch.full((4, 8, 10), 0.9)
    near[3, :, :5], near[3, :, 5:] = 0.2, 1
    for seed in range(20):
        both = synthesis.mixed(far, near, np.random.default_rng(seed))
        assert (both[:3, :, :5] == 0.9).all()
        assert (both[:, :, 5:] == 0.5).all()
        assert 0.2 * 0.75 <= both[3, 0, 0] <= 0.2 * 1.3
        assert (both[3, :, :5] == both[3, 0, 0]).all()


def test_without_depth_a_part_is_of_the_second_image():
    shares = []
    for seed in range(50):
        both = synthesis.mixed(torch.zeros(3, 40, 60), torch.ones(3, 40, 60), np.random.default_rng(seed))
        assert set(both.unique().tolist()) <= {0.0, 1.0}
        assert (both[0] == both[2]).all()
        shares.append(both.mean().item())
    assert 0.2 < np.mean(shares) < 0.6
    assert sum(0 < share < 1 for share in shares) > 40


def test_warp_and_mix_are_off_unless_they_are_asked_for():
    law = config.section("haze", [])
    clear, depth = torch.rand(3, 12, 16), torch.rand(1, 12, 16) * 0.9 + 0.1
    made = synthesis.random_haze(clear, depth, np.random.default_rng(1), law)
    torch.testing.assert_close(-made["transmission"].log() / made["density"], depth, rtol=1e-4, atol=1e-5)
    law = config.section("haze", ["warp.probability=1"])
    made = synthesis.random_haze(clear, depth, np.random.default_rng(1), law)
    changed = -made["transmission"].log() / made["density"]
    assert (changed - depth).abs().mean() > 0.02
    assert changed.max().item() == pytest.approx(depth.max().item(), rel=1e-3)
