"""Frequency-aware fusion of a fine and a coarse feature map (FreqFusion, Chen et al., TPAMI 2024, 2408.12879).

Each pixel gets two normalised kernels (CARAFE, Wang et al., ICCV 2019): a 5x5 one that smooths the up-sampled coarse
map, and a 3x3 one whose smoothed result is subtracted from the fine map. AKNet merges both by a 1x1 convolution.
"""

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import single

LOW, HIGH = 5, 3  # sides of the two kernels


def hamming(side: int) -> Tensor:
    """The two-dimensional Hamming window (side, side)."""
    window = torch.hamming_window(side, periodic=False, dtype=torch.float64)
    return torch.outer(window, window).float()


class Fusion(nn.Module):
    """Fine map (N,C,H,W) and coarse map (N,2C,H/2,W/2) -> (N,C,H,W); H, W even and at least 4.

    As published: kernels from both maps; low = smoothed + up-sampled coarse map (2C), high = fine map - its smoothing
    (C); GELU of a 1x1 convolution of [high, low]. That convolution mixes channels and the kernels mix pixels, so it
    is applied first, on the small map and to half the channels; results differ by rounding alone.
    ``border``: pixels outside are ``zero`` (mmcv's operator, with which the authors trained) or ``reflect`` (the
    fallback in the released code).
    """

    def __init__(self, channels: int):
        super().__init__()
        self.compress_fine = nn.Conv2d(channels, channels // 2, 1)
        self.compress_coarse = nn.Conv2d(2 * channels, channels // 2, 1)
        self.low = nn.Conv2d(channels // 2, LOW**2, 3, padding=1)
        self.high = nn.Conv2d(channels // 2, HIGH**2, 3, padding=1)
        self.merge = nn.Conv2d(3 * channels, channels, 1)
        for side in (LOW, HIGH):
            self.register_buffer(f"log_window{side}", hamming(side).log().flatten(), persistent=False)
        self.start()

    def start(self) -> None:
        """The released initialisation: the kernels are close to the Hamming window."""
        for conv in (self.compress_fine, self.compress_coarse):
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)
        for conv in (self.low, self.high):
            nn.init.normal_(conv.weight, std=0.001)
            nn.init.zeros_(conv.bias)

    def forward(self, fine: Tensor, coarse: Tensor, border: str = "zero") -> Tensor:
        fine_weight, coarse_weight = self.merge.weight.split([fine.shape[1], coarse.shape[1]], 1)
        low, high = self.kernels(fine, coarse, border)
        low, high = with_centre(fold(low)), with_centre(-high.unsqueeze(2))
        merged = window_sum(self.merge.bias.view(1, -1, 1, 1, 1), F.conv2d(coarse, coarse_weight), low)
        merged = F.pixel_shuffle(merged.flatten(1, 2), 2).unsqueeze(2)
        merged = window_sum(merged, F.conv2d(fine, fine_weight), high).squeeze(2)
        return F.gelu(merged.to(fine.dtype))

    def kernels(self, fine: Tensor, coarse: Tensor, border: str) -> tuple[Tensor, Tensor]:
        """The low-pass kernels (N,25,H,W) and the high-pass ones' smoothing part (N,9,H,W), each of sum 1.

        softmax(x) times the window, normalised, is softmax(x + log window).
        """
        mixed = self.compress_fine(fine) + F.interpolate(self.compress_coarse(coarse), scale_factor=2)
        weight = torch.cat([self.low.weight, self.high.weight])
        bias = torch.cat([self.low.bias + self.log_window5, self.high.bias + self.log_window3])
        low, high = single(F.conv2d(mixed, weight, bias, padding=1)).split([LOW**2, HIGH**2], 1)
        low, high = low.softmax(1), high.softmax(1)
        return (low, high) if border == "zero" else (reflected(low), reflected(high))


def reflected(kernels: Tensor) -> Tensor:
    """Kernels (N,k*k,H,W) for reflection at the borders -> equivalent kernels for zeros there. H, W > k // 2.

    The weight of a pixel outside is added to that of the pixel that it mirrors.
    """
    side = round(kernels.shape[1] ** 0.5)
    radius = side // 2
    kernels = kernels.unflatten(1, (side, side)).clone()
    for taps, pixels in ((1, 3), (2, 4)):  # rows, then columns
        for flipped in (False, True):
            view = kernels.flip(taps, pixels) if flipped else kernels
            for pixel in range(radius):
                for tap in range(radius - pixel):
                    part = view.select(pixels, pixel)
                    part.select(taps, 2 * (radius - pixel) - tap).add_(part.select(taps, tap))
            kernels = view.flip(taps, pixels) if flipped else view
    return kernels.flatten(1, 2)


def fold(kernels: Tensor) -> Tensor:
    """5x5 kernels over a nearest-neighbour x2 map (N,25,H,W) -> 3x3 kernels over its source (N,9,4,H/2,W/2).

    The fourth axis counts a pixel's offset in its source pixel: (0,0), (0,1), (1,0), (1,1). Of the five taps along an
    axis, at an even offset (0,1), (2,3) and (4) fall on the same source pixels, at an odd one (0), (1,2) and (3,4).
    """
    n, _, height, width = kernels.shape
    kernels = kernels.reshape(n, LOW, LOW, height // 2, 2, width)
    kernels = torch.stack([_sum_pairs(part, 1, offset) for offset, part in enumerate(kernels.unbind(4))], 3)
    kernels = kernels.reshape(n, 3, LOW, 2, height // 2, width // 2, 2)
    kernels = torch.stack([_sum_pairs(part, 2, offset) for offset, part in enumerate(kernels.unbind(6))], 4)
    return kernels.flatten(3, 4).flatten(1, 2)


def _sum_pairs(kernels: Tensor, dim: int, offset: int) -> Tensor:
    """Five entries along ``dim`` to three, by summing neighbours."""
    first, second, third, fourth, fifth = kernels.unbind(dim)
    sums = [first, second + third, fourth + fifth] if offset else [first + second, third + fourth, fifth]
    return torch.stack(sums, dim)


def with_centre(kernels: Tensor) -> Tensor:
    """Add 1 to the centre of 3x3 kernels (N,9,...), in place, so that they also add the pixel itself."""
    kernels[:, 4] += 1
    return kernels


def window_sum(base: Tensor, x: Tensor, kernels: Tensor) -> Tensor:
    """base + the weighted sum over each pixel's 3x3 neighbourhood, zero outside, with the pixel's own kernels.

    x (N,C,h,w), kernels (N,9,P,h,w): P of them a pixel, the same for all channels; base broadcasts to the result
    (N,C,P,h,w). No unfolded copy of x is created or kept for the backward pass.
    """
    return _WindowSum.apply(single(base), single(x), kernels)


class _WindowSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, base: Tensor, x: Tensor, kernels: Tensor) -> Tensor:
        ctx.save_for_backward(x, kernels)
        ctx.base_shape = base.shape
        out = torch.addcmul(base, x.unsqueeze(2), kernels[:, None, 4])
        for tap, pixel, neighbour in _neighbours(x):
            out[pixel].addcmul_(x[neighbour].unsqueeze(2), kernels[:, None, tap][pixel])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, kernels = ctx.saved_tensors
        grad_x, grad_kernels = torch.zeros_like(x), torch.zeros_like(kernels)
        for plane, part in enumerate(gradient.unbind(2)):
            for tap, pixel, neighbour in [(4, ..., ...), *_neighbours(x)]:
                grad_x[neighbour].addcmul_(part[pixel], kernels[:, None, tap, plane][pixel])
                product = part[pixel] * x[neighbour]
                torch.sum(product, 1, keepdim=True, out=grad_kernels[:, tap, plane, None][pixel])
        return gradient.sum_to_size(ctx.base_shape), grad_x, grad_kernels


def _neighbours(x: Tensor) -> Iterator[tuple[int, tuple, tuple]]:
    """The eight neighbours in a 3x3 window: tap, index of the pixels of ``x`` that have it, index of the neighbours."""
    for tap, (row, column) in enumerate(itertools.product((-1, 0, 1), repeat=2)):
        if tap != 4:
            rows, columns = _overlap(row, x.shape[-2]), _overlap(column, x.shape[-1])
            yield tap, (..., rows[0], columns[0]), (..., rows[1], columns[1])


def _overlap(shift: int, size: int) -> tuple[slice, slice]:
    return slice(max(0, -shift), size - max(0, shift)), slice(max(0, shift), size - max(0, -shift))
