"""Priors on clear images that D4's ancestors train with, and the energy of the dark channel prior for t."""

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.physics import dark_channel, dark_channel_transmission

RIDGE = 1e-6  # epsilon of the matting Laplacian, as in both papers


def dark_channel_loss(clear: Tensor) -> Tensor:
    """Mean of the dark channel, near 0 for haze-free images (He et al., TPAMI 2011). (N,3,H,W) -> scalar."""
    return dark_channel(clear).mean()


def total_variation(clear: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels, both directions added (Rudin et al., 1992). -> scalar."""
    return clear.diff(dim=2).abs().mean() + clear.diff(dim=3).abs().mean()


def dark_channel_energy(
    t: Tensor, hazy: Tensor, airlight: Tensor, fidelity: float, omega: float, size: int, ridge: float = RIDGE
) -> Tensor:
    """E = (t'Lt + fidelity |t - t_dcp|^2) / pixels, without labels: scalar.

    Its minimum is the softly matted t of the dark channel prior; a network trained on it over many images gives a
    better t than that minimum (Golts, Freedman, Elad, TIP 2020, arXiv 1812.07051). ``t`` (N,1,H,W); ``hazy`` (N,3,H,W)
    and ``airlight`` (N,3,1,1), which get no gradient; ``size`` of the dark channel's window.
    """
    with torch.no_grad():
        prior = dark_channel_transmission(hazy, airlight, omega, size)
    return matting_energy(t, hazy, ridge).mean() / t[0].numel() + fidelity * F.mse_loss(t, prior)


def matting_energy(t: Tensor, guide: Tensor, ridge: float = RIDGE) -> Tensor:
    """t'Lt of each sample, L the matting Laplacian of ``guide`` (Levin, Lischinski, Weiss, TPAMI 2008). -> (N,).

    In every 3x3 window within the image the best line a.I + b is fitted to t; its residual, |t - a.I - b|^2 +
    ridge |a|^2, is the window's term: time and memory are linear in the pixels. ``guide`` gets no gradient. The lines
    are fitted by orthogonal directions, since covariances would lose a ridge of 1e-6 in single precision.
    """
    residual = _windows(t)  # (N,1,9,windows)
    slopes = residual.new_zeros(*residual.shape[:2], guide.shape[1], residual.shape[3])
    residual = torch.cat([residual, slopes], 2)
    for direction in _directions(guide.detach().to(t.dtype), ridge):
        residual = residual - direction * (direction * residual).sum(2, keepdim=True)
    return residual.square().sum((1, 2, 3))


def _windows(x: Tensor) -> Tensor:
    """All 3x3 windows of (N,C,H,W), each minus its mean: (N,C,9,windows)."""
    pieces = F.unfold(x, 3).unflatten(1, (x.shape[1], 9))
    return pieces - pieces.mean(2, keepdim=True)


@torch.no_grad()
def _directions(guide: Tensor, ridge: float) -> list[Tensor]:
    """Orthonormal directions that the channels of ``guide`` span in each window, the ridge as rows below its pixels."""
    pixels = _windows(guide)
    directions = []
    for channel in range(guide.shape[1]):
        rows = pixels.new_zeros(len(pixels), guide.shape[1], pixels.shape[3])
        rows[:, channel] = ridge**0.5
        vector = torch.cat([pixels[:, channel], rows], 1)[:, None]
        for direction in directions:
            vector = vector - direction * (direction * vector).sum(2, keepdim=True)
        directions.append(vector / vector.norm(dim=2, keepdim=True))
    return directions
