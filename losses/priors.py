"""Priors on clear pictures that D4's ancestors add to the game; NeDR's configuration still names them."""

from torch import Tensor

from utils.physics import dark_channel


def dark_channel_loss(clear: Tensor, size: int = 15) -> Tensor:
    """Mean of the dark channel, near 0 for haze-free pictures (He et al., TPAMI 2011). (N,3,H,W) -> scalar."""
    return dark_channel(clear, size).mean()


def total_variation(clear: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels, both directions added (Rudin et al., 1992). -> scalar."""
    return clear.diff(dim=2).abs().mean() + clear.diff(dim=3).abs().mean()
