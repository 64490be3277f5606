import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.morphology import erosion

from models.dcp import DCP, DCPSettings
from utils import physics

SMALL = settings(max_examples=25, deadline=None)
sizes = st.tuples(st.integers(1, 24), st.integers(1, 24))


@SMALL
@given(st.integers(0, 2**31), st.floats(0.05, 1), st.floats(0, 1))
def test_restore_inverts_scatter(seed, low, airlight):
    g = torch.Generator().manual_seed(seed)
    clear = torch.rand(2, 3, 5, 7, generator=g)
    t = low + (1 - low) * torch.rand(2, 1, 5, 7, generator=g)
    A = torch.full((2, 3, 1, 1), airlight)
    hazy = physics.scatter(clear, t, A)
    assert hazy.min() >= 0
    assert hazy.max() <= 1
    torch.testing.assert_close(physics.restore(hazy, t, A), clear, atol=1e-5, rtol=0)


def test_no_haze_and_nothing_but_haze():
    clear, A = torch.rand(1, 3, 4, 4), torch.full((1, 3, 1, 1), 0.9)
    torch.testing.assert_close(physics.scatter(clear, torch.ones(1, 1, 4, 4), A), clear)
    assert (physics.scatter(clear, torch.zeros(1, 1, 4, 4), A) == 0.9).all()


def test_transmission():
    t = physics.transmission(torch.tensor([0.0, 1.0, 2.0]), torch.tensor(0.5))
    torch.testing.assert_close(t, torch.tensor([1.0, 0.60653067, 0.36787945]))


@SMALL
@given(sizes, st.sampled_from([1, 3, 15]), st.integers(0, 2**31))
def test_dark_channel_is_an_erosion_of_the_channels_minimum(size, window, seed):
    image = np.random.default_rng(seed).random((1, 3, *size), np.float32)
    pad = window // 2
    darkest = np.pad(image[0].min(0), pad, constant_values=1)
    expected = erosion(darkest, np.ones((window, window)))[pad : pad + size[0], pad : pad + size[1]]
    assert torch.equal(physics.dark_channel(torch.from_numpy(image), window)[0, 0], torch.from_numpy(expected))


@SMALL
@given(sizes, st.integers(1, 12), st.integers(0, 2**31))
def test_box_mean_divides_by_the_pixels_inside(size, radius, seed):
    x = np.random.default_rng(seed).random(size, np.float32)
    expected = np.array(
        [
            [x[max(0, i - radius) : i + radius + 1, max(0, j - radius) : j + radius + 1].mean() for j in range(size[1])]
            for i in range(size[0])
        ]
    )
    actual = physics.box_mean(torch.from_numpy(x)[None, None], radius)[0, 0]
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def naive_guided_filter(guide: np.ndarray, x: np.ndarray, radius: int, eps: float) -> np.ndarray:
    """He et al., algorithm 1, in float64, a window at a time."""
    guide = (guide - guide.min()) / (guide.max() - guide.min())
    height, width = x.shape
    window = lambda i, j: np.s_[max(0, i - radius) : i + radius + 1, max(0, j - radius) : j + radius + 1]  # noqa: E731
    total = np.zeros_like(x)
    for g in guide:
        a, b = np.zeros_like(x), np.zeros_like(x)
        for i in range(height):
            for j in range(width):
                p, q = g[window(i, j)], x[window(i, j)]
                a[i, j] = ((p * q).mean() - p.mean() * q.mean()) / (p.var() + eps)
                b[i, j] = q.mean() - a[i, j] * p.mean()
        for i in range(height):
            for j in range(width):
                total[i, j] += a[window(i, j)].mean() * g[i, j] + b[window(i, j)].mean()
    return total / len(guide)


def test_guided_filter_follows_its_definition():
    rng = np.random.default_rng(0)
    guide, x = rng.random((3, 12, 9)), rng.random((12, 9))
    actual = physics.guided_filter(torch.from_numpy(guide)[None], torch.from_numpy(x)[None, None], 2, 1e-3)
    np.testing.assert_allclose(actual[0, 0], naive_guided_filter(guide, x, 2, 1e-3), atol=1e-9)


def test_guided_filter_keeps_a_constant():
    x = torch.full((2, 1, 20, 30), 0.37)
    torch.testing.assert_close(physics.guided_filter(torch.rand(2, 3, 20, 30), x), x)
    flat = physics.guided_filter(torch.full((1, 3, 9, 9), 0.5), torch.rand(1, 1, 9, 9))
    assert flat.isfinite().all()  # a guide without any edge: a plain mean


def test_dark_channel_airlight_counts_ties_and_is_capped():
    """A plateau of equal dark channels: the brightest colour anywhere on it counts, not that of the first pixel."""
    image = torch.full((1, 3, 64, 64), 0.2)
    image[:, :, 20:50, 20:50] = 0.5
    image[:, 0, 40, 40] = 0.7  # on the plateau, its dark channel the same 0.5
    image[:, 1, 5, 5] = 0.8  # brighter, but not where the dark channel is brightest
    torch.testing.assert_close(physics.dark_channel_airlight(image).flatten(), torch.tensor([0.7, 0.5, 0.5]))
    image[:, 0, 40, 40] = 1
    assert physics.dark_channel_airlight(image)[0, 0].item() == pytest.approx(220 / 255)


def test_airlights_are_each_images_own():
    image = torch.rand(3, 3, 40, 40)
    for estimate in (physics.max_airlight, physics.dark_channel_airlight):
        torch.testing.assert_close(estimate(image), torch.cat([estimate(one[None]) for one in image]))


PICTURES = {
    "black": torch.zeros(1, 3, 20, 30),
    "white": torch.ones(1, 3, 20, 30),
    "red": torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(1, 3, 20, 30),
    "pixel": torch.rand(1, 3, 1, 1),
    "noise": torch.rand(2, 3, 33, 17),
}


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("guided", [True, False])
def test_dcp_accepts_any_image(name, guided):
    clear = DCP(DCPSettings(guided_filter=guided)).dehaze(PICTURES[name])
    assert clear.shape == PICTURES[name].shape
    assert clear.isfinite().all()
    assert clear.min() >= 0
    assert clear.max() <= 1


def test_dcp_removes_haze():
    rng = np.random.default_rng(0)
    clear = torch.from_numpy(rng.random((1, 3, 96, 96), np.float32)) ** 2
    clear[:, rng.integers(3)] *= 0.05  # dark somewhere, as the prior has it
    A, t = torch.full((1, 3, 1, 1), 0.85), torch.full((1, 1, 96, 96), 0.5)
    hazy = physics.scatter(clear, t, A)
    dehazed = DCP(DCPSettings(guided_filter=True)).dehaze(hazy)
    assert (dehazed - clear).abs().mean() < 0.5 * (hazy - clear).abs().mean()
