"""The atmospheric scattering model and its estimators, as pure functions on (N,C,H,W) tensors.

I = J t + A (1 - t), t = exp(-beta d): I the hazy image, J the clear one, t the transmission, A the airlight
(atmospheric light), beta the density of the haze, d the depth. Images and transmissions lie in [0,1].

Sources: He, Sun, Tang, "Single Image Haze Removal Using Dark Channel Prior" (TPAMI 2011; DCP below);
He, Sun, Tang, "Guided Image Filtering" (TPAMI 2013); the constants are those of D4's and NeDR's released code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from utils import tiling

AIRLIGHT_CAP = 220 / 255  # D4's and NeDR's upper bound of the dark-channel airlight
DARK_CHANNEL_SIZE = 15  # pixels
LEAST_TRANSMISSION = 0.1  # DCP's t0 (section 4.4): in a sky the estimated t is near 0, or below, and J black
GUIDE_RADIUS = 40  # pixels
GUIDE_EPS = 1e-3
PIECE = 512  # pixels: the side of the tiles in which J is computed at full size; they fit into the cache


def transmission(depth: Tensor, density: Tensor) -> Tensor:
    """t = exp(-beta d). ``depth`` (N,1,H,W), ``density`` (N,1,1,1) -> (N,1,H,W) in (0,1]."""
    return torch.exp(-density * depth)


def scatter(clear: Tensor, t: Tensor, airlight: Tensor) -> Tensor:
    """I = J t + A (1 - t). ``clear`` (N,3,H,W), ``t`` (N,1,H,W), ``airlight`` (N,3,1,1) -> (N,3,H,W)."""
    return clear * t + airlight * (1 - t)


def restore(hazy: Tensor, t: Tensor, airlight: Tensor) -> Tensor:
    """J = (I - A) / t + A, clamped to [0,1]: the inverse of the scattering model. ``t`` must be positive."""
    return unbounded(hazy, t, airlight).clamp(0, 1)


def restore_partly(hazy: Tensor, t: Tensor, airlight: Tensor, strength: float = 1.0) -> Tensor:
    """J as of `restore` with t^strength: 0 gives the hazy image, 1 the clear one. In tiles; ``t`` must be positive."""

    def restored(piece: Tensor, window: tiling.Window) -> Tensor:
        part = window.cut(t)
        return restore(piece, part if strength == 1 else part**strength, airlight)

    return tiling.apply(restored, hazy, tile=PIECE)


def unbounded(hazy: Tensor, t: Tensor, airlight: Tensor) -> Tensor:
    """J as of `restore`, not clamped, so that errors of t have gradients beyond black and white, too."""
    return (hazy - airlight) / t + airlight


def dark_channel(image: Tensor, size: int = DARK_CHANNEL_SIZE) -> Tensor:
    """Minimum over channels, then over a ``size`` x ``size`` window; outside the image counts as 1.

    (N,3,H,W) in [0,1] -> (N,1,H,W). DCP, eq. 5. ``size`` is odd.
    """
    pad = size // 2
    darkest = F.pad(image.amin(1, keepdim=True), (pad, pad, pad, pad), value=1.0)
    return _line_minimum(_line_minimum(darkest, size, 2), size, 3)


def _line_minimum(x: Tensor, size: int, dim: int) -> Tensor:
    """The minimum of every ``size`` neighbours along one side, which becomes ``size`` - 1 shorter; by doubling."""
    span = 1
    while span < size:
        step = min(span, size - span)
        length = x.shape[dim] - step
        x = torch.minimum(x.narrow(dim, 0, length), x.narrow(dim, step, length))
        span += step
    return x


def max_airlight(image: Tensor) -> Tensor:
    """Per-channel maximum of the image. (N,3,H,W) -> (N,3,1,1)."""
    return image.amax((2, 3), keepdim=True)


def dark_channel_airlight(image: Tensor, cap: float = AIRLIGHT_CAP) -> Tensor:
    """Per-channel maximum of the image where its dark channel is brightest, at most ``cap``.

    "Where" is every pixel whose dark channel reaches the k-th largest value, k = int(0.001 H W), at least 1:
    the minimum filter makes plateaus, so ties are common and all of them count. DCP, section 4.3.
    (N,3,H,W) -> (N,3,1,1).
    """
    dark = dark_channel(image).flatten(1)
    k = max(1, int(0.001 * dark.shape[1]))
    threshold = dark.topk(k, dim=1).values[:, -1:]
    bright = (dark >= threshold).unsqueeze(1)  # (N,1,HW)
    return image.flatten(2).masked_fill(~bright, 0).amax(2)[..., None, None].clamp(max=cap)


def bright_colour(image: Tensor) -> Tensor:
    """The colour of the brightest parts, mostly of the airlight: the 99.5 % quantile of each channel, over the largest.

    (N,3,H,W) in [0,1] -> (N,3,1,1) in [0.3, 1].
    """
    small = F.interpolate(image, (96, 128), mode="area").flatten(2)
    bright = small.quantile(0.995, dim=2).clamp(min=1e-3)
    return (bright / bright.amax(1, keepdim=True)).clamp(min=0.3)[..., None, None]


def dark_channel_transmission(
    image: Tensor, airlight: Tensor, omega: float = 0.95, size: int = DARK_CHANNEL_SIZE
) -> Tensor:
    """t = 1 - omega * dark_channel(I / A), not clamped, not refined. DCP, eq. 12. -> (N,1,H,W)."""
    return 1 - omega * dark_channel(image / airlight.clamp(min=1e-6), size)  # a channel may be entirely black


def box_mean(x: Tensor, radius: int) -> Tensor:
    """Mean over a (2 radius + 1)-square window, divided by the number of pixels inside the image. Same shape.

    By running sums in double precision, so that it takes the same time at every radius.
    """
    return _line_mean(_line_mean(x, radius, 2), radius, 3)


def _line_mean(x: Tensor, radius: int, dim: int) -> Tensor:
    """Mean of the pixels within ``radius`` along one side, as `box_mean`."""
    size = x.shape[dim]
    radius = min(radius, size - 1)
    running = x.cumsum(dim, dtype=torch.float64)
    sums = torch.cat([running.narrow(dim, radius, size - radius), *[running.narrow(dim, size - 1, 1)] * radius], dim)
    sums.narrow(dim, radius + 1, size - radius - 1).sub_(running.narrow(dim, 0, size - radius - 1))
    position = torch.arange(size, device=x.device)
    count = (position + radius).clamp(max=size - 1) - (position - radius).clamp(min=0) + 1
    return (sums / count.view(-1, 1) if dim == 2 else sums / count).to(x.dtype)


def guided_filter(
    guide: Tensor, x: Tensor, radius: int = GUIDE_RADIUS, eps: float = GUIDE_EPS, tile: int | None = None
) -> Tensor:
    """Smooth ``x`` (N,1,H,W) along the edges of ``guide`` (N,C,H,W), channel by channel, and average over C.

    The guide is first min-max normalised over each whole sample, as the released NeDR does. -> (N,1,H,W).
    ``tile`` computes the same in tiles of that side.
    """
    low, high = guide.amin((1, 2, 3), keepdim=True), guide.amax((1, 2, 3), keepdim=True)

    def smooth(piece: Tensor, window: tiling.Window) -> Tensor:
        return _smooth((piece - low) / (high - low).clamp(min=1e-12), window.cut(x), radius, eps)

    return tiling.apply(smooth, guide, tile=tile, halo=2 * radius)  # twice, for a mean of means


def fast_guided_filter(guide: Tensor, small: Tensor, x: Tensor, radius: int) -> Tensor:
    """The guided filter of a coarse map ``x`` (N,1,h,w) at the full size of ``guide`` (N,3,H,W) -> (N,1,H,W).

    ``small`` (N,3,h,w) is the guide at the coarse size.

    He and Sun, "Fast Guided Filter" (arXiv 1505.00996): the local lines are fitted at the coarse size, where ``radius``
    counts, and applied at the full one. By luminance, the mean of the channels.
    """
    small = small.mean(1, keepdim=True)
    a, b = _lines(small, x, radius, GUIDE_EPS)
    a, b = (F.interpolate(line, guide.shape[-2:], mode="bilinear", align_corners=False) for line in (a, b))
    return torch.addcmul(b, a, guide.mean(1, keepdim=True))


def _smooth(guide: Tensor, x: Tensor, radius: int, eps: float) -> Tensor:
    a, b = _lines(guide, x, radius, eps)
    return (a * guide + b).mean(1, keepdim=True)


def _lines(guide: Tensor, x: Tensor, radius: int, eps: float) -> tuple[Tensor, Tensor]:
    """Slope and intercept of the local linear fits of ``x`` to the guide, for each of its pixels and channels."""
    mean_g, mean_x = box_mean(guide, radius), box_mean(x, radius)
    covariance = box_mean(guide * x, radius) - mean_g * mean_x
    variance = box_mean(guide * guide, radius) - mean_g * mean_g
    a = covariance / (variance + eps)
    b = mean_x - a * mean_g
    return box_mean(a, radius), box_mean(b, radius)
