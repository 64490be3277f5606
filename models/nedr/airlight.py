"""The learned airlight: heads that estimate A of a hazy image, one value a channel.

An error of 1 % in A costs half a decibel in dense haze: J = (I - A) / t + A changes by (1 - 1/t) dA.
docs/training.md lists the gain of each part.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.pyramid import squash
from utils import physics

POOLED_RANGE = (0.5, 1.0)
SHARPNESS = (4, 16, 64)
FAR = 0.05  # the share of the pixels that count as far: those of the lowest t
EXTRAPOLATED = (0.3, 0.5)  # assumed brightnesses of far objects
QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 1.0)


class PooledAirlight(nn.Sequential):
    """A from the pooled encoder maps (N,P) alone, as in the paper's figure: (N,3,1,1) in [0.5, 1]."""

    def __init__(self, pooled: int):
        super().__init__(nn.Linear(pooled, 64), nn.ReLU(), nn.Linear(64, 3))

    def forward(self, pooled: Tensor, hazy: Tensor, t: Tensor) -> Tensor:
        return squash(super().forward(pooled), *POOLED_RANGE)[..., None, None]


class StatisticsAirlight(nn.Module):
    """A from statistics of the image and of its densest haze alone: (N,3,1,1) within ``bounds``, clamped to 1.

    Cameras saturate, so A is often exactly 1, which can be reached if the upper bound is above it.

    ``hazy`` (N,3,H,W) in [0,1], ``t`` (N,1,h,w) the estimated transmission of any size, which gets no gradient. Encoder
    maps are not used: learned from a few thousand images, they cost 0.7 dB on others (docs/training.md).
    """

    def __init__(self, bounds: tuple[float, float]):
        super().__init__()
        self.bounds = bounds
        count = 3 * (4 + 2 * len(SHARPNESS) + 2 + 2 + len(EXTRAPOLATED)) + len(QUANTILES)  # statistics
        self.standardise = Standardise(count)
        self.layers = nn.Sequential(nn.Linear(count, 128), nn.ReLU(), nn.Linear(128, 3))

    def forward(self, pooled: Tensor, hazy: Tensor, t: Tensor) -> Tensor:
        t = t.detach()
        if t.shape[2:] != hazy.shape[2:]:
            t = F.interpolate(t, hazy.shape[2:], mode="bilinear", antialias=True)
        small, small_t = halved(hazy), halved(t)
        low, high = self.bounds
        statistics = torch.cat([image_statistics(hazy), haze_statistics(small, small_t)], 1)
        raw = low + (high - low) * self.layers(self.standardise(statistics)).sigmoid()
        return raw.clamp(max=1)[..., None, None]


class Standardise(nn.Module):
    """Normalise (N,C) by running mean and deviation, in training too: those of a small batch are too noisy.

    With ``momentum`` 0 they stay as they are.
    """

    def __init__(self, count: int, momentum: float = 0.01):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("running_mean", torch.zeros(count))
        self.register_buffer("running_var", torch.ones(count))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.momentum:
            self._track(x.detach())
        return (x - self.running_mean) / (self.running_var + 1e-4).sqrt()

    @torch.no_grad()
    def _track(self, x: Tensor) -> None:
        self.num_batches_tracked += 1
        momentum = (1 / self.num_batches_tracked.to(x.dtype)).clamp(min=self.momentum)  # at first a plain mean
        difference = x - self.running_mean
        self.running_mean.lerp_(x.mean(0), momentum)
        self.running_var.lerp_((difference * (x - self.running_mean)).mean(0), momentum)


def create(kind: str, pooled: int, bounds: tuple[float, float]) -> nn.Module:
    """The head ``pooled``, with ``pooled`` inputs, or ``statistics``, whose A lies within ``bounds``."""
    return StatisticsAirlight(bounds) if kind == "statistics" else PooledAirlight(pooled)


def image_statistics(image: Tensor) -> Tensor:
    """Maximum, mean, dark-channel airlight without a cap, and deviation of each channel: (N,3,H,W) -> (N,12)."""
    dark = physics.dark_channel_airlight(image, cap=1.0)[..., 0, 0]
    return torch.cat([image.amax((2, 3)), image.mean((2, 3)), dark, image.std((2, 3))], 1)


def haze_statistics(image: Tensor, t: Tensor) -> Tensor:
    """Statistics of the pixels of the lowest transmission. (N,3,H,W), (N,1,H,W) -> (N,43).

    For each channel: mean and deviation with weights (min t / t)^k, k = 4, 16, 64; maximum and minimum of the farthest
    5 % of the pixels; the intercept at t = 0 of the regression of I on t, over all pixels and with weights (1 - t)^2
    (by I = A + t (J - A) it is A, if J does not depend on t); and A by the scattering model from the farthest 5 %,
    assuming that J is 0.3 or 0.5 there. And quantiles of t.
    """
    x, t = image.flatten(2), t.flatten(2).clamp(min=1e-3)
    statistics = []
    for power in SHARPNESS:
        mean, deviation = _weighted(x, (t.amin(2, keepdim=True) / t) ** power)
        statistics += [mean, deviation]
    ordered = t[:, 0].sort(1).values
    far = (t <= _quantile(ordered, FAR)[..., None]).to(x.dtype)
    statistics += [(x - 2 * (1 - far)).amax(2), (x + 2 * (1 - far)).amin(2)]
    statistics += [_intercept(x, t, torch.ones_like(t)), _intercept(x, t, (1 - t) ** 2)]
    far_t, far_x = _mean(t, far), _mean(x, far)
    statistics += [(far_x - j * far_t) / (1 - far_t).clamp(min=0.05) for j in EXTRAPOLATED]
    return torch.cat([*statistics, *(_quantile(ordered, q) for q in QUANTILES)], 1)


def halved(x: Tensor) -> Tensor:
    """Half the size, antialiased."""
    return F.interpolate(x, [side // 2 for side in x.shape[2:]], mode="bilinear", antialias=True)


def _quantile(ordered: Tensor, share: float) -> Tensor:
    """torch.quantile of sorted rows (N,P): (N,1)."""
    position = share * (ordered.shape[1] - 1)
    low = int(position)
    fraction = position - low
    high = low + (fraction > 0)
    return ordered[:, low : low + 1].lerp(ordered[:, high : high + 1], fraction)


def _mean(x: Tensor, weight: Tensor) -> Tensor:
    return (weight * x).sum(2) / weight.sum(2).clamp(min=1e-6)


def _weighted(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    mean = _mean(x, weight)
    return mean, (_mean((x - mean[..., None]) ** 2, weight) + 1e-8).sqrt()


def _intercept(x: Tensor, t: Tensor, weight: Tensor) -> Tensor:
    mean_x, mean_t = _mean(x, weight), _mean(t, weight)
    centred = t - mean_t[..., None]
    covariance = _mean(centred * (x - mean_x[..., None]), weight)
    variance = _mean(centred**2, weight)
    return mean_x - covariance / (variance + 1e-3) * mean_t
