"""Synthetic haze on clear images, by the haze law of RESIDE, and generated depth maps.

The scattering model, I = J t + A (1 - t), t = exp(-beta d), in the manner of RESIDE's ITS (Li et al., "Benchmarking
Single-Image Dehazing and Beyond", TIP 2019): d is the depth divided by the maximum of the whole map, beta in
[0.6, 1.8], A in [0.7, 1]. The command that writes a set is `data.haze`.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from skimage.segmentation import slic
from torch import Tensor

from utils import config, physics

DENSITY = (0.6, 1.8)
AIRLIGHT = (0.7, 1.0)
LEAST_DEPTH = 0.03  # of `outdoor_depth`: nothing is at the lens itself


def smooth_depth(height: int, width: int, rng: np.random.Generator) -> Tensor:
    """Generate a smooth depth map: a plane that recedes towards the top, with hills. (1,H,W), maximum 1."""
    ramp = torch.linspace(1, 0, height, dtype=torch.float64).view(1, height, 1) ** rng.uniform(0.7, 2.0)
    coarse = torch.from_numpy(rng.random((1, 1, 4, 5)))
    hills = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)[0].clamp(0, 1)
    share = rng.uniform(0.5, 0.8)
    depth = share * ramp + (1 - share) * hills
    nearest = rng.uniform(0.05, 0.25)  # nothing is at the lens itself
    depth = nearest + (1 - nearest) * depth
    return (depth / depth.max()).float()


def outdoor_depth(clear: Tensor, rng: np.random.Generator) -> Tensor:
    """Generate a depth map for an outdoor image (3,H,W) in [0,1]: (1,H,W), maximum 1.

    A ground plane that recedes to a level or tilted horizon, with everything above it far away, times smooth noise;
    sometimes the noise alone. A guided filter aligns it with the edges of the image. Plausible, not true: it teaches
    that distant objects have soft, even and bright haze, and near ones none.
    """
    _, height, width = clear.shape
    rows = torch.linspace(0, 1, height).view(height, 1)
    rows = rows + rng.uniform(-0.25, 0.25) * torch.linspace(-0.5, 0.5, width)
    horizon = rng.uniform(0.1, 0.6)
    near = rng.uniform(0.03, 0.4)
    plane = (near / (rows - horizon).clamp(min=0).add(near))[None, None]  # 1 at the horizon and above it
    noise = _smooth_noise((height, width), rng)[None]
    strength = rng.uniform(0, 0.7)
    noise_only = rng.random() < 0.15
    depth = (1.5 * noise).sigmoid() if noise_only else plane * (strength * noise).exp()
    scale = min(height, width) / 160  # the radii below are for a short side of 160 pixels
    radius = max(1, round(scale * rng.integers(6, 20)))
    depth = physics.guided_filter(clear[None], depth, radius, float(10 ** rng.uniform(-3.5, -2)))[0]
    return _normalised(depth)


def varied_outdoor_depth(clear: Tensor, rng: np.random.Generator, shares: config.OutdoorDepth) -> Tensor:
    """`outdoor_depth` or, with probabilities ``shares``, another kind, so that no single error is learnt: (1,H,W).

    Patches: constant in superpixels, like depth estimated from one image (as in RESIDE's outdoor sets). Dark channel:
    -log(1 - 0.95 dark), which amplifies the haze that the image already has. Noise: any smooth field.
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
    return _normalised(F.interpolate(coarse, clear.shape[1:], mode="bicubic", align_corners=True)[0])


def warped(depth: Tensor, rng: np.random.Generator, law: config.Warp) -> Tensor:
    """``depth`` (1,H,W) to a random power, times e^n with smooth noise n, with the same maximum: (1,H,W)."""
    noise = _smooth_noise(depth.shape[1:], rng)
    changed = depth ** float(rng.uniform(*law.power)) * (float(rng.uniform(*law.noise)) * noise).exp()
    return changed * (depth.max() / changed.max().clamp(min=1e-3))


def mixed(first: Tensor, second: Tensor, rng: np.random.Generator) -> Tensor:
    """An image (3,H,W), or with its depth (4,H,W), of which parts are from ``second``, of the same shape.

    With depth they are those where the second scene, at a random scale, is the nearer one, as if both were one scene:
    more arrangements of things than there are images. Without depth they are what lies below an uneven line, or in a
    random spot.
    """
    _, height, width = first.shape
    if first.shape[0] == 4:
        distance = second[3:] * float(rng.uniform(0.75, 1.3))
        second, inside = torch.cat([second[:3], distance.clamp(max=1)]), distance < first[3:]
    elif rng.random() < 0.5:
        rows = torch.linspace(0, 1, height).view(height, 1)
        rows = rows + rng.uniform(-0.4, 0.4) * torch.linspace(-0.5, 0.5, width)
        inside = rows + 0.06 * _smooth_noise((height, width), rng) > rng.uniform(0.35, 0.75)
    else:
        inside = _smooth_noise((height, width), rng) > rng.uniform(0, 0.8)
    return torch.where(inside, second, first)


def _smooth_noise(shape: Sequence[int], rng: np.random.Generator) -> Tensor:
    """Normal noise on a coarse grid of 3x3 to 7x8 points, interpolated: (1,*shape)."""
    coarse = torch.from_numpy(rng.standard_normal((1, 1, int(rng.integers(3, 8)), int(rng.integers(3, 9)))))
    return F.interpolate(coarse.float(), tuple(shape), mode="bicubic", align_corners=False)[0]


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
    return _normalised(physics.guided_filter(clear[None], means[labels][None], radius, 1e-3)[0])


def _dark_depth(clear: Tensor) -> Tensor:
    """The depth (1,H,W) for which haze would produce the dark channel of ``clear``."""
    short = min(clear.shape[1:])
    dark = physics.dark_channel(clear[None], max(3, short // 30 * 2 + 1))
    depth = -(1 - 0.95 * dark).log()
    return _normalised(physics.guided_filter(clear[None], depth, max(1, short // 12), 1e-3)[0])


def _normalised(depth: Tensor) -> Tensor:
    return (depth / depth.max().clamp(min=1e-3)).clamp(LEAST_DEPTH, 1)


def add_haze(clear: Tensor, depth: Tensor, beta: float, airlight: Tensor) -> tuple[Tensor, Tensor]:
    """Add haze to ``clear`` (3,H,W) in [0,1], with ``depth`` (1,H,W), density ``beta`` >= 0, ``airlight`` of 3.

    -> hazy (3,H,W) in [0,1], transmission (1,H,W) in (0,1].
    """
    t = physics.transmission(depth, torch.tensor(beta, dtype=depth.dtype))
    return physics.scatter(clear, t, airlight.view(3, 1, 1)).clamp(0, 1), t


def random_haze(
    clear: Tensor,
    depth: Tensor | None,
    rng: np.random.Generator,
    law: config.Haze,
    generated: str = "",
    colours: np.ndarray | None = None,
) -> dict[str, Tensor]:
    """Add haze of random density and airlight to ``clear`` (3,H,W), by ``law``.

    First the exposure and the white balance of the clear image may be changed, which gives another clear image. The
    airlight is a grey from its range, clamped at 1, times one of the ``colours`` (N,3) if there are any; sometimes each
    channel is shifted by up to ``law.colour``. To simulate dusk, ``law.light`` sometimes darkens the clear image and
    the airlight by a factor from its range. Without ``depth`` (1,H,W) a map is generated, ``generated`` = smooth |
    outdoor (by default ``law.depth``).
    -> hazy, clear (3,H,W), transmission (1,H,W), airlight (3,1,1), density (1,).
    """
    gamma = _sometimes(law.gamma, rng)
    gains = _sometimes(law.gains, rng, 3)
    if gamma is not None:
        clear = clear.clamp(min=1e-3) ** float(gamma[0])
    if gains is not None:
        clear = (clear * torch.from_numpy(gains.astype(np.float32)).view(3, 1, 1)).clamp(0, 1)
    if depth is not None and law.warp.probability and rng.random() < law.warp.probability:
        depth = warped(depth, rng, law.warp)
    if depth is None:
        outdoor = (generated or law.depth) == "outdoor"
        depth = varied_outdoor_depth(clear, rng, law.outdoor) if outdoor else smooth_depth(*clear.shape[1:], rng)
    beta = rng.uniform(*law.density)
    grey = min(1.0, rng.uniform(*law.airlight))
    shift = rng.uniform(-1, 1, 3) * (law.colour if rng.random() < law.colour_probability else 0.0)
    colour = 1.0 if colours is None else colours[rng.integers(len(colours))]
    light = torch.from_numpy(np.clip(grey * colour + shift, 0, 1).astype(np.float32))
    if law.light.probability and (factor := _sometimes(law.light, rng)) is not None:
        clear = clear * float(factor[0])
        light = light * float(factor[0])
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
    """``count`` values uniform in the range, or None if the change is not applied. The number of draws is constant."""
    applied = rng.random() < change.probability
    values = rng.uniform(*change.range, count)
    return values if applied else None
