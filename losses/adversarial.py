"""Adversarial losses on discriminator logits.

lsgan: Mao et al., 1611.04076 (here on sigmoid scores, as in D4 and NeDR); vanilla: Goodfellow et al., 1406.2661,
non-saturating; hinge: Lim and Ye, 1705.02894.
"""

import torch.nn.functional as F
from torch import Tensor


def discriminator_loss(real: Tensor, fake: Tensor, kind: str) -> Tensor:
    """Half the loss on real plus half the loss on fake logits, a scalar. ``kind``: lsgan | vanilla | hinge."""
    if kind == "hinge":
        return ((1 - real).relu().mean() + (1 + fake).relu().mean()) / 2
    return (_distance(real, 1.0, kind) + _distance(fake, 0.0, kind)) / 2


def generator_loss(fake: Tensor, kind: str) -> Tensor:
    """The generator's loss on fake logits, low if they look real, a scalar."""
    return -fake.mean() if kind == "hinge" else _distance(fake, 1.0, kind)


def _distance(logits: Tensor, target: float, kind: str) -> Tensor:
    logits = logits.float()
    if kind == "lsgan":
        return (logits.sigmoid() - target).square().mean()
    return F.binary_cross_entropy_with_logits(logits, logits.new_full((), target).expand_as(logits))
