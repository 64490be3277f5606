"""Priors on clear images that D4's ancestors train with, and the energy of the dark channel prior for t."""

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.physics import dark_channel, dark_channel_transmission

RIDGE = 1e-6  # epsilon of the matting Laplacian, as of both papers


def dark_channel_loss(clear: Tensor, size: int = 15) -> Tensor:
    """Mean of the dark channel, near 0 for haze-free images (He et al., TPAMI 2011). (N,3,H,W) -> scalar."""
    return dark_channel(clear, size).mean()


def total_variation(clear: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels, both directions added (Rudin et al., 1992). -> scalar."""
    return clear.diff(dim=2).abs().mean() + clear.diff(dim=3).abs().mean()


def dark_channel_energy(
    t: Tensor, hazy: Tensor, airlight: Tensor, fidelity: float, omega: float, size: int, ridge: float = RIDGE
) -> Tensor:
    """E = (t'Lt + fidelity |t - t_dcp|^2) / pixels, with no label: scalar.

    The energy whose minimum is the softly matted t of the dark channel prior; a network that descends on it over many
    images gives a better t than that minimum (Golts, Freedman, Elad, TIP 2020, arXiv 1812.07051). ``t`` (N,1,H,W);
    ``hazy`` (N,3,H,W) and ``airlight`` (N,3,1,1), which get no gradient; ``size`` of the dark channel's window.
    """
    with torch.no_grad():
        prior = dark_channel_transmission(hazy, airlight, omega, size)
    return matting_energy(t, hazy, ridge).mean() / t[0].numel() + fidelity * F.mse_loss(t, prior)


def matting_energy(t: Tensor, guide: Tensor, ridge: float = RIDGE) -> Tensor:
    """t'Lt of each sample, L the matting Laplacian of ``guide`` (Levin, Lischinski, Weiss, TPAMI 2008). -> (N,).

    In every 3x3 window within the image the best line a.I + b is fitted to t; what it leaves, |t - a.I - b|^2 +
    ridge |a|^2, is the window's share: time and memory grow with the pixels. ``guide`` gets no gradient. The lines are
    fitted by orthogonal directions, since covariances would lose a ridge of 1e-6 in single precision.
    """
    rest = _windows(t)  # (N,1,9,windows)
    slopes = rest.new_zeros(*rest.shape[:2], guide.shape[1], rest.shape[3])
    rest = torch.cat([rest, slopes], 2)
    for direction in _directions(guide.detach().to(t.dtype), ridge):
        rest = rest - direction * (direction * rest).sum(2, keepdim=True)
    return rest.square().sum((1, 2, 3))


def _windows(x: Tensor) -> Tensor:
    """All 3x3 windows of (N,C,H,W), each less its mean: (N,C,9,windows)."""
    pieces = F.unfold(x, 3).unflatten(1, (x.shape[1], 9))
    return pieces - pieces.mean(2, keepdim=True)


@torch.no_grad()
def _directions(guide: Tensor, ridge: float) -> list[Tensor]:
    """Orthonormal directions that the channels of ``guide`` span in each window, the ridge as rows below its pixels."""
    pixels, found = _windows(guide), []
    for channel in range(guide.shape[1]):
        rows = pixels.new_zeros(len(pixels), guide.shape[1], pixels.shape[3])
        rows[:, channel] = ridge**0.5
        rest = torch.cat([pixels[:, channel], rows], 1)[:, None]
        for direction in found:
            rest = rest - direction * (direction * rest).sum(2, keepdim=True)
        found.append(rest / rest.norm(dim=2, keepdim=True))
    return found
