import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.color import rgb2ycbcr
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from utils import rounding
from utils.errors import UserError
from utils.evaluation import metrics

ALL = list(metrics.PROTOCOLS)
LIKE_THE_PAPER = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
seeds = st.integers(0, 99)
sides = st.integers(1, 40)


def pictures(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    clear = torch.rand(3, height, width, generator=generator)
    return clear, (clear + 0.1 * torch.randn(3, height, width, generator=generator)).clamp(0, 1)


def rounded(image):
    """(H,W,3) float, as it would be saved."""
    return np.rint(image.double().numpy().transpose(1, 2, 0) * 255)


def truncated(image):
    return (image.double().numpy().transpose(1, 2, 0) * 255 + 1e-4).astype(np.uint8)


def grey(picture):
    red, green, blue = np.moveaxis(picture.astype(int), -1, 0)
    return ((299 * red + 587 * green + 114 * blue + 500) // 1000).astype(np.uint8)


def gaussian_mean(x):
    """The valid part of a Gaussian window of 11 pixels, sigma 1.5, written down from the paper; x: (H,W)."""
    offsets = np.arange(-5, 6)
    weights = np.exp(-(offsets**2) / (2 * 1.5**2))
    weights = np.outer(weights, weights) / weights.sum() ** 2
    return (np.lib.stride_tricks.sliding_window_view(x, (11, 11)) * weights).sum((2, 3))


def ssim_by_hand(x, y, span):
    """The paper's formula on (H,W,C), mean over places and channels."""
    values = []
    for p, q in zip(np.moveaxis(x, -1, 0), np.moveaxis(y, -1, 0), strict=True):
        a, b = gaussian_mean(p), gaussian_mean(q)
        va, vb = gaussian_mean(p * p) - a * a, gaussian_mean(q * q) - b * b
        covariance = gaussian_mean(p * q) - a * b
        c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
        values.append(((2 * a * b + c1) * (2 * covariance + c2) / ((a * a + b * b + c1) * (va + vb + c2))).mean())
    return np.mean(values)


def pooled(x, height, width):
    """Adaptive average pooling as PyTorch documents it: bin i of n is floor(iH/n) to ceil((i+1)H/n)."""
    down = [(i * x.shape[0] // height, -(-(i + 1) * x.shape[0] // height)) for i in range(height)]
    across = [(j * x.shape[1] // width, -(-(j + 1) * x.shape[1] // width)) for j in range(width)]
    rows = np.stack([x[top:bottom].mean(0) for top, bottom in down])
    return np.stack([rows[:, left:right].mean(1) for left, right in across], 1)


def as_float(image):
    return image.double().numpy().transpose(1, 2, 0)


# the oracles: scikit-image where it has the protocol, else the definition


def ours(a, b):
    return structural_similarity(rounded(a), rounded(b), channel_axis=2, **LIKE_THE_PAPER)


def d4(a, b):
    return structural_similarity(grey(truncated(a)), grey(truncated(b)), win_size=51, data_range=255)


def skimage_default(a, b):
    return structural_similarity(rounded(a), rounded(b), channel_axis=2, data_range=255)


def luma(image):
    return rgb2ycbcr(rounded(image).astype(np.uint8))[..., 0]


def y_channel(a, b):
    return structural_similarity(luma(a), luma(b), **LIKE_THE_PAPER)


def ffa(a, b):
    zeros = ((5, 5), (5, 5), (0, 0))
    return ssim_by_hand(np.pad(as_float(a), zeros), np.pad(as_float(b), zeros), 1)


def dehazeformer(a, b):
    height, width = a.shape[1:]
    ratio = max(1, round(min(height, width) / 256))
    size = int(height / ratio), int(width / ratio)
    return ssim_by_hand(pooled(as_float(a), *size), pooled(as_float(b), *size), 1)


def aknet(a, b):
    height, width = ((side // 4 + 1) * 4 for side in a.shape[1:])
    ratio = max(1, round(min(height, width) / 256))
    size = int(height / ratio), int(width / ratio)
    return ssim_by_hand(pooled(as_float(a), *size), pooled(as_float(b), *size), 1)


SSIM = {
    "ours": (ours, 11),
    "d4": (d4, 51),
    "dehazeformer": (dehazeformer, 11),
    "ffa": (ffa, 1),  # of any size, thanks to the zeros
    "skimage-default": (skimage_default, 7),
    "y-channel": (y_channel, 11),
    "aknet": (aknet, 11),
}


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=8, deadline=None)
@given(st.data(), seeds)
def test_ssim_follows_its_definition(name, data, seed):
    oracle, least = SSIM[name]
    more = st.integers(least, least + 30)
    a, b = pictures(data.draw(more), data.draw(more), seed)
    assert metrics.ssim(a, b, name) == pytest.approx(oracle(a, b), abs=1e-9)


@pytest.mark.parametrize("name", ["dehazeformer", "aknet"])
@pytest.mark.parametrize(("height", "width"), [(384, 385), (401, 390), (385, 640)])
def test_ssim_after_pooling(name, height, width):
    a, b = pictures(height, width)
    assert metrics.ssim(a, b, name) == pytest.approx(SSIM[name][0](a, b), abs=1e-9)


@pytest.mark.parametrize(
    ("name", "height", "width", "size"),
    [
        ("dehazeformer", 460, 620, (230, 310)),
        ("aknet", 460, 620, (232, 312)),
        ("dehazeformer", 480, 640, (240, 320)),
        ("aknet", 413, 550, (208, 276)),
        ("dehazeformer", 640, 900, (320, 450)),  # 2.5 rounds to 2
        ("dehazeformer", 300, 300, (300, 300)),
        ("aknet", 300, 303, (304, 304)),  # with a ratio of 1 the formula asks for more than there is
    ],
)
def test_ssim_pools_images_to_the_given_sizes(name, height, width, size):
    assert metrics._prepared(torch.rand(3, height, width), metrics.protocol(name)).shape == (3, *size)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("height", [159, 160, 161, 170])
def test_tiles_leave_no_seam(name, height, monkeypatch):
    a, b = pictures(height, 131)
    monkeypatch.setattr(metrics, "TILE", {"cpu": 4096})
    whole = metrics.figures(a, b, [name])
    monkeypatch.setattr(metrics, "TILE", {"cpu": 50})
    assert metrics.figures(a, b, [name]) == pytest.approx(whole, abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 2000), st.integers(1, 300))
def test_spans_cover_everything_once(size, most):
    spans = metrics._spans(size, most)
    assert [k for span in spans for k in range(span.start, span.stop)] == list(range(size))
    assert max(span.stop - span.start for span in spans) <= most


def mean_square(x, y):
    return ((x.astype(float) - y.astype(float)) ** 2).mean()


PSNR = {
    "ours": (rounded, 255),
    "d4": (truncated, 255),
    "dehazeformer": (as_float, 1),
    "ffa": (as_float, 1),
    "skimage-default": (rounded, 255),
    "y-channel": (luma, 255),
    "aknet": (as_float, 1),
}


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=15, deadline=None)
@given(sides, sides, seeds)
def test_psnr_is_that_of_scikit_image_and_of_its_definition(name, height, width, seed):
    convert, span = PSNR[name]
    a, b = pictures(height, width, seed)
    x, y = convert(a), convert(b)
    if (x == y).all():
        assert metrics.psnr(a, b, name) == math.inf
        return
    assert metrics.psnr(a, b, name) == pytest.approx(10 * math.log10(span**2 / mean_square(x, y)), abs=1e-9)
    assert metrics.psnr(a, b, name) == pytest.approx(peak_signal_noise_ratio(x, y, data_range=span), abs=1e-9)


def test_known_figures():
    black, white = torch.zeros(3, 64, 64), torch.ones(3, 64, 64)
    for name in set(ALL) - {"y-channel"}:
        assert metrics.psnr(black, white, name) == 0
        assert metrics.psnr(white, white, name) == math.inf
        assert metrics.ssim(white, white, name) == pytest.approx(1)
        if name != "ffa":  # its border is black in both
            assert metrics.ssim(black, white, name) == pytest.approx(0.01**2 / (1 + 0.01**2))
    assert metrics.psnr(black, torch.full((3, 64, 64), 1 / 255)) == pytest.approx(20 * math.log10(255))
    assert metrics.psnr(black, white, "y-channel") == pytest.approx(20 * math.log10(255 / 219))  # from 16 to 235
    assert metrics.psnr(black, white / 2, "ffa") == pytest.approx(20 * math.log10(2))  # 0.5, neither 127 nor 128


@pytest.mark.parametrize("name", ALL)
def test_constant_images_have_no_variance(name):
    a, b = torch.full((3, 60, 60), 51 / 255), torch.full((3, 60, 60), 102 / 255)
    x, y = (16 + 219 / 5, 16 + 438 / 5) if name == "y-channel" else (51, 102)
    c1 = (0.01 * 255) ** 2
    if name != "ffa":  # its border is not constant
        assert metrics.ssim(a, b, name) == pytest.approx((2 * x * y + c1) / (x * x + y * y + c1), abs=1e-6)
    assert metrics.psnr(a, b, name) == pytest.approx(20 * math.log10(255 / (y - x)), abs=1e-5)


def test_images_are_compared_as_8_bit():
    picture = torch.full((3, 12, 12), 100 / 255)
    one = pytest.approx(20 * math.log10(255))
    assert metrics.psnr(picture, picture + 0.4 / 255) == math.inf  # rounds to the same
    assert metrics.psnr(picture, picture + 0.6 / 255) == one
    assert metrics.psnr(picture, picture + 0.6 / 255, "d4") == math.inf  # is cut to the same
    assert metrics.psnr(picture, picture - 0.01 / 255, "d4") == one
    for name in ALL:
        assert metrics.psnr(torch.full_like(picture, 1.0), torch.full_like(picture, 1.2), name) == math.inf  # clamped


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("pixels", ["round", "truncate"])
def test_8_bit_images_are_unchanged(pixels, kind):
    levels = torch.arange(256, dtype=torch.uint8).repeat(3, 2, 1)
    for picture in (
        levels.to(kind) / 255,
        levels.to(kind) * (1 / 255),
        torch.from_numpy(levels.numpy() / 255).to(kind),
    ):
        assert torch.equal(metrics._pixels(picture, pixels), levels)


def test_to_8bit_is_what_scikit_image_takes():
    picture = rounding.to_8bit(torch.tensor([-0.1, 0.501, 1.2]).reshape(3, 1, 1).expand(3, 2, 4))
    assert picture.dtype == np.uint8
    assert picture.shape == (2, 4, 3)
    assert picture[0, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("name", sorted(set(ALL) - {"ffa"}))
def test_ssim_of_less_than_a_window_is_undefined(name):
    least = SSIM[name][1]
    shortest = 8 if name == "aknet" else least  # 8 to 10 pixels are pooled to 12
    assert not math.isnan(metrics.ssim(*pictures(shortest, 60), name))
    for height, width in [(shortest - 1, 60), (60, shortest - 1), (1, 1)]:
        assert math.isnan(metrics.ssim(*pictures(height, width), name))


@pytest.mark.parametrize("metric", [metrics.psnr, metrics.ssim])
def test_different_sizes_are_refused(metric):
    with pytest.raises(UserError, match=r"\(3, 16, 16\) and \(3, 16, 17\)"):
        metric(torch.zeros(3, 16, 16), torch.zeros(3, 16, 17))


@pytest.mark.parametrize(
    "picture", [torch.zeros(3, 16, 16).byte(), torch.zeros(1, 3, 16, 16), torch.zeros(1, 16, 16), torch.zeros(3, 0, 16)]
)
def test_files_that_are_not_images_are_refused(picture):
    with pytest.raises(UserError, match=r"must be float in \[0,1\] of shape \(3,H,W\), not "):
        metrics.psnr(picture, picture)


def test_figures_are_those_of_psnr_and_ssim_in_the_order_asked():
    a, b = pictures(60, 70)
    names = ["d4", "ours", *ALL[2:]]
    found = metrics.figures(a, b, names)
    assert list(found) == [f"{name}.{kind}" for name in names for kind in ("psnr", "ssim")]
    for name in names:
        assert found[f"{name}.psnr"] == metrics.psnr(a, b, name)
        assert found[f"{name}.ssim"] == metrics.ssim(a, b, name)
    assert metrics.figures(a, b, ["ours", "ours"]) == metrics.figures(a, b, ["ours"])
    assert metrics.figures(a, b, []) == {}


def test_inputs_are_not_modified_and_may_require_gradients():
    a, b = pictures(60, 60)
    a, before = a * 1.5 - 0.25, (a * 1.5 - 0.25).clone()
    metrics.figures(a.requires_grad_(), b, ALL)
    assert torch.equal(a, before)


def test_views_have_the_figures_of_their_copies():
    a, b = pictures(60, 70)
    flipped = a.transpose(1, 2), b.transpose(1, 2)
    assert metrics.figures(*flipped, ALL) == metrics.figures(*(image.contiguous() for image in flipped), ALL)


def test_every_protocol_describes_itself_and_no_two_alike():
    described = [each.describe() for each in metrics.PROTOCOLS.values()]
    assert next(iter(metrics.PROTOCOLS)) == "ours"
    assert all(each.keys() == {"name", "pixels", "psnr", "ssim", "used by"} for each in described)
    assert json.loads(json.dumps(described)) == described
    assert len({(each["pixels"], each["psnr"], each["ssim"]) for each in described}) == len(described)


def test_an_unknown_protocol_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match="there is no protocol 'dehazformer'; did you mean 'dehazeformer'"):
        metrics.protocol("dehazformer")
    with pytest.raises(UserError, match="there is no protocol 'D'"):
        metrics.psnr(*pictures(12, 12), "D")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_figures():
    a, b = pictures(301, 403)
    expected = metrics.figures(a, b, ALL)
    assert metrics.figures(a.cuda(), b.cuda(), ALL) == pytest.approx(expected, abs=1e-9)
    assert metrics.figures(a.cuda(), b, ALL) == pytest.approx(expected, abs=1e-9)


def test_versions_name_all_that_figures_depend_on():
    assert metrics.versions().keys() == {"python", *metrics.LIBRARIES}
    assert metrics.versions()["torch"] == torch.__version__.split("+")[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_measuring_does_not_modify_the_images(dtype):
    picture, other = (torch.linspace(-0.5, 1.5, 3 * 64 * 64, dtype=dtype).view(3, 64, 64) + k for k in (0, 0.1))
    before = picture.clone(), other.clone()
    metrics.figures(picture, other, list(metrics.PROTOCOLS))
    rounding.to_8bit(picture)
    assert torch.equal(picture, before[0])
    assert torch.equal(other, before[1])
