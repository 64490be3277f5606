"""Losses over several scales and in the frequency domain (MIMO-UNet, ICCV 2021; AKNet and its family)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def scaled(clear: Tensor, factors: Sequence[float]) -> list[Tensor]:
    """``clear`` (N,C,H,W) at several sizes, bilinear, not anti-aliased: .25 is the mean of the central 2x2 of 4x4."""
    return [clear if factor == 1 else F.interpolate(clear, scale_factor=factor, mode="bilinear") for factor in factors]


def frequency_loss(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference of the real and imaginary parts of un-normalised 2-D spectra. (N,C,H,W) -> scalar.

    The spectrum of a real image holds every inner column twice, once conjugated, so only half of it is computed.
    """
    spectrum = torch.view_as_real(torch.fft.rfft2((a - b).float()))
    sums = spectrum.abs().sum((0, 1, 2, 4))  # by column
    inner = sums[1 : (a.shape[-1] + 1) // 2]
    return (sums.sum() + inner.sum()) / (2 * a.numel())
