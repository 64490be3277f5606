"""Haze on clear images, by the law of RESIDE.

The scattering model, I = J t + A (1 - t), t = exp(-beta d), in the manner of RESIDE's ITS (Li et al., "Benchmarking
Single-Image Dehazing and Beyond", TIP 2019): d is the depth divided by the maximum of the whole map, beta in
[0.6, 1.8], A in [0.7, 1]. The command that writes a set is `data.haze`.
"""

import numpy as np
import torch
import torch.nn.functional as F
from skimage.segmentation import slic
from torch import Tensor

from utils import config, physics

DENSITY = (0.6, 1.8)
AIRLIGHT = (0.7, 1.0)
LEAST_DEPTH = 0.03  # of `outdoor_depth`: nothing stands at the lens itself


def smooth_depth(height: int, width: int, rng: np.random.Generator) -> Tensor:
    """Make up a smooth depth map: a plane that recedes towards the top, with hills. (1,H,W), largest value 1."""
    ramp = torch.linspace(1, 0, height, dtype=torch.float64).view(1, height, 1) ** rng.uniform(0.7, 2.0)
    coarse = torch.from_numpy(rng.random((1, 1, 4, 5)))
    hills = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)[0].clamp(0, 1)
    share = rng.uniform(0.5, 0.8)
    depth = share * ramp + (1 - share) * hills
    nearest = rng.uniform(0.05, 0.25)  # nothing stands at the lens itself
    depth = nearest + (1 - nearest) * depth
    return (depth / depth.max()).float()


def outdoor_depth(clear: Tensor, rng: np.random.Generator) -> Tensor:
    """Make up the depth of an outdoor image (3,H,W) in [0,1] that has none: (1,H,W), largest value 1.

    A ground plane that recedes to a horizon, level or tilted, with all above it far away, times smooth noise; at times
    the noise alone. A guided filter lays it along the edges of the image. Believable, not true: what it teaches is
    that far things have soft, even and bright haze, and near ones have none.
    """
    _, height, width = clear.shape
    rows = torch.linspace(0, 1, height).view(height, 1)
    rows = rows + rng.uniform(-0.25, 0.25) * torch.linspace(-0.5, 0.5, width)
    horizon, near = rng.uniform(0.1, 0.6), rng.uniform(0.03, 0.4)
    plane = (near / (rows - horizon).clamp(min=0).add(near))[None, None]  # 1 at the horizon and above it
    coarse = torch.from_numpy(rng.standard_normal((1, 1, int(rng.integers(3, 8)), int(rng.integers(3, 9)))))
    noise = F.interpolate(coarse.float(), (height, width), mode="bicubic", align_corners=False)
    strength, plain = rng.uniform(0, 0.7), rng.random() < 0.15
    depth = (1.5 * noise).sigmoid() if plain else plane * (strength * noise).exp()
    short = min(height, width) / 160  # the radii are those of images of this short side
    radius = max(1, round(short * rng.integers(6, 20)))
    depth = physics.guided_filter(clear[None], depth, radius, float(10 ** rng.uniform(-3.5, -2)))[0]
    return _from_0_to_1(depth)


def varied_outdoor_depth(clear: Tensor, rng: np.random.Generator, shares: config.OutdoorDepth) -> Tensor:
    """`outdoor_depth`, or, by their ``shares``, another kind, so that no one kind of mistake is learnt: (1,H,W).

    Patches: constant in superpixels, as depth estimated from one image is (RESIDE's outdoor sets have such). Dark
    channel: -log(1 - 0.95 dark), the haze that the image has already, more of it. Noise: anything smooth.
    """
    kinds = {"patches": shares.patches, "dark": shares.dark_channel, "noise": shares.noise}
    if not any(kinds.values()):
        return outdoor_depth(clear, rng)
    kind = rng.choice(["plane", *kinds], p=[1 - sum(kinds.values()), *kinds.values()])
    if kind == "plane":
        return outdoor_depth(clear, rng)
    if kind == "patches":
        return _patches(clear, outdoor_depth(clear, rng), rng)
    if kind == "dark":
        return _dark_depth(clear)
    coarse = torch.from_numpy(rng.random((1, 1, 4, 5), np.float32))
    return _from_0_to_1(F.interpolate(coarse, clear.shape[1:], mode="bicubic", align_corners=True)[0])


def _patches(clear: Tensor, depth: Tensor, rng: np.random.Generator) -> Tensor:
    """``depth`` (1,H,W) with one value, its mean times exp(0.15 n), n normal, in every superpixel of ``clear``."""
    _, height, width = clear.shape
    small = F.interpolate(clear[None], (max(1, height // 2), max(1, width // 2)), mode="area")[0]
    labels = slic(small.permute(1, 2, 0).numpy(), n_segments=int(rng.integers(60, 240)), max_num_iter=4, start_label=0)
    labels = torch.from_numpy(labels)
    labels = F.interpolate(labels[None, None].float(), (height, width))[0].long()
    count = int(labels.max()) + 1
    sums = torch.zeros(count).scatter_add_(0, labels.flatten(), depth.flatten())
    means = sums / torch.bincount(labels.flatten(), minlength=count).clamp(min=1)
    means = means * torch.from_numpy(np.exp(0.15 * rng.standard_normal(count)).astype(np.float32))
    radius = max(1, round(min(height, width) / 40))
    return _from_0_to_1(physics.guided_filter(clear[None], means[labels][None], radius, 1e-3)[0])


def _dark_depth(clear: Tensor) -> Tensor:
    """The depth (1,H,W) at which haze makes the dark channel that ``clear`` has."""
    short = min(clear.shape[1:])
    dark = physics.dark_channel(clear[None], max(3, short // 30 * 2 + 1))
    depth = -(1 - 0.95 * dark).log()
    return _from_0_to_1(physics.guided_filter(clear[None], depth, max(1, short // 12), 1e-3)[0])


def _from_0_to_1(depth: Tensor) -> Tensor:
    return (depth / depth.max().clamp(min=1e-3)).clamp(LEAST_DEPTH, 1)


def add_haze(clear: Tensor, depth: Tensor, beta: float, airlight: Tensor) -> tuple[Tensor, Tensor]:
    """Put haze on ``clear`` (3,H,W) in [0,1], with ``depth`` (1,H,W), density ``beta`` >= 0, ``airlight`` of 3.

    -> hazy (3,H,W) in [0,1], transmission (1,H,W) in (0,1].
    """
    t = physics.transmission(depth, torch.tensor(beta, dtype=depth.dtype))
    return physics.scatter(clear, t, airlight.view(3, 1, 1)).clamp(0, 1), t


def random_haze(
    clear: Tensor, depth: Tensor | None, rng: np.random.Generator, law: config.Haze, made_up: str = ""
) -> dict[str, Tensor]:
    """Put haze of random density and airlight on ``clear`` (3,H,W), by ``law``.

    First the clear image may change its exposure and its white balance, so that it is another clear image. The
    airlight is a grey from its range, cut at 1; at times each channel of it is moved by up to ``law.colour``. At times
    it is dusk: ``law.light`` darkens the clear image and the airlight alike, by a factor from its range.
    Without ``depth`` (1,H,W) that is made up as ``made_up`` has it (smooth | outdoor; by default ``law.depth``).
    -> hazy, clear (3,H,W), transmission (1,H,W), airlight (3,1,1), density (1,).
    """
    gamma, gains = _sometimes(law.gamma, rng), _sometimes(law.gains, rng, 3)
    if gamma is not None:
        clear = clear.clamp(min=1e-3) ** float(gamma[0])
    if gains is not None:
        clear = (clear * torch.from_numpy(gains.astype(np.float32)).view(3, 1, 1)).clamp(0, 1)
    if depth is None:
        outdoor = (made_up or law.depth) == "outdoor"
        depth = varied_outdoor_depth(clear, rng, law.outdoor) if outdoor else smooth_depth(*clear.shape[1:], rng)
    beta, grey = rng.uniform(*law.density), min(1.0, rng.uniform(*law.airlight))
    shift = rng.uniform(-1, 1, 3) * (law.colour if rng.random() < law.colour_probability else 0.0)
    light = torch.from_numpy(np.clip(grey + shift, 0, 1).astype(np.float32))
    if law.light.probability and (factor := _sometimes(law.light, rng)) is not None:
        clear, light = clear * float(factor[0]), light * float(factor[0])
    hazy, t = add_haze(clear, depth, beta, light)
    if law.noise:
        noise = torch.from_numpy(rng.random(hazy.shape, np.float32)) - 0.5
        hazy = (hazy + noise * (2 * law.noise / 255)).clamp(0, 1)
    return {
        "hazy": hazy,
        "clear": clear,
        "transmission": t,
        "airlight": light.view(3, 1, 1),
        "density": torch.tensor([beta], dtype=torch.float32),
    }


def _sometimes(change: config.Sometimes, rng: np.random.Generator, count: int = 1) -> np.ndarray | None:
    """``count`` values uniform in the range, or None where it does not happen. Always as many draws."""
    happens, values = rng.random() < change.probability, rng.uniform(*change.range, count)
    return values if happens else None
