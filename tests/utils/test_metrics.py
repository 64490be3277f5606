import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter1d
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from utils import metrics
from utils.errors import UserError

sides = st.integers(1, 40)


def pictures(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    clear = torch.rand(3, height, width, generator=generator)
    return clear, (clear + 0.1 * torch.randn(3, height, width, generator=generator)).clamp(0, 1)


def eight_bit(image):
    return np.rint(image.double().numpy().transpose(1, 2, 0) * 255)


def window_mean(x):
    """The valid part of a Gaussian window of 11 pixels, sigma 1.5, written down from the paper."""
    offsets = np.arange(-5, 6)
    weights = np.exp(-(offsets**2) / (2 * 1.5**2))
    weights = np.outer(weights, weights) / weights.sum() ** 2
    return (np.lib.stride_tricks.sliding_window_view(x, (11, 11)) * weights).sum((2, 3))


def ssim_by_hand(x, y):
    a, b = window_mean(x), window_mean(y)
    va, vb = window_mean(x * x) - a * a, window_mean(y * y) - b * b
    covariance = window_mean(x * y) - a * b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return ((2 * a * b + c1) * (2 * covariance + c2) / ((a * a + b * b + c1) * (va + vb + c2))).mean()


@settings(max_examples=30, deadline=None)
@given(sides, sides, st.integers(0, 99))
def test_psnr_is_that_of_scikit_image_and_of_its_definition(height, width, seed):
    a, b = pictures(height, width, seed)
    x, y = eight_bit(a), eight_bit(b)
    error = ((x - y) ** 2).mean()
    expected = 10 * math.log10(255**2 / error) if error else math.inf
    assert metrics.psnr(a, b) == pytest.approx(expected)
    if error:
        assert metrics.psnr(a, b) == pytest.approx(peak_signal_noise_ratio(x, y, data_range=255))


@settings(max_examples=10, deadline=None)
@given(st.integers(11, 40), st.integers(11, 40), st.integers(0, 99))
def test_ssim_is_that_of_the_paper_and_of_scikit_image_channel_by_channel(height, width, seed):
    a, b = pictures(height, width, seed)
    x, y = eight_bit(a), eight_bit(b)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    assert metrics.ssim(a, b) == pytest.approx(
        np.mean([ssim_by_hand(x[..., c], y[..., c]) for c in range(3)]), abs=1e-9
    )
    assert metrics.ssim(a, b) == pytest.approx(
        np.mean([structural_similarity(x[..., c], y[..., c], **options) for c in range(3)]), abs=1e-9
    )


def test_the_window_is_eleven_pixels():
    impulse = np.zeros(31)
    impulse[15] = 1
    assert np.count_nonzero(gaussian_filter1d(impulse, 1.5, truncate=3.5)) == metrics.WINDOW  # scikit-image's truncate


def test_known_figures():
    black, white = torch.zeros(3, 16, 16), torch.ones(3, 16, 16)
    assert metrics.psnr(black, white) == 0
    assert metrics.psnr(black, torch.full((3, 16, 16), 1 / 255)) == pytest.approx(20 * math.log10(255))
    assert metrics.psnr(white, white) == math.inf
    assert metrics.ssim(white, white) == pytest.approx(1)
    assert metrics.ssim(black, white) == pytest.approx(0.01**2 / (1 + 0.01**2))


def test_pictures_are_compared_as_they_would_be_saved():
    picture = torch.full((3, 12, 12), 100 / 255)
    assert metrics.psnr(picture, picture + 0.4 / 255) == math.inf  # rounds to the same
    assert metrics.psnr(picture, picture + 0.6 / 255) == pytest.approx(20 * math.log10(255))
    assert metrics.psnr(torch.full_like(picture, 1.0), torch.full_like(picture, 1.2)) == math.inf  # clamped


@pytest.mark.parametrize(("height", "width"), [(10, 40), (40, 10), (1, 1)])
def test_ssim_of_less_than_a_window_is_undefined(height, width):
    assert math.isnan(metrics.ssim(*pictures(height, width)))


@pytest.mark.parametrize("metric", [metrics.psnr, metrics.ssim])
def test_different_sizes_are_refused(metric):
    with pytest.raises(UserError, match=r"\(3, 16, 16\) and \(3, 16, 17\)"):
        metric(torch.zeros(3, 16, 16), torch.zeros(3, 16, 17))


def test_versions_name_all_that_figures_depend_on():
    assert metrics.versions().keys() == {"python", *metrics.LIBRARIES}
    assert metrics.versions()["torch"] == torch.__version__.split("+")[0]
