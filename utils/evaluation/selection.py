"""Detects weights that were selected on the images they are scored on; images are identified by their content."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from utils.rounding import to_8bit

SIDE = 256  # pixels: the side of the centre crop that is compared


def fingerprint(clear: Tensor) -> str:
    """A digest that identifies a ground truth (3,H,W) in [0,1]: that of its centre crop, in 8 bit.

    It does not change if files are moved, renamed or rewritten, or if an equal border is removed on all sides.
    """
    top, left = (max(0, side - SIDE) // 2 for side in clear.shape[1:])
    middle = to_8bit(clear[:, top : top + SIDE, left : left + SIDE])
    return hashlib.sha256(repr(middle.shape).encode() + middle.tobytes()).hexdigest()[:16]


def chosen_on(names: Sequence[str | Path], pictures: int, truths: Sequence[str]) -> dict[str, Any]:
    """The metadata of exported weights about their selection: sets or folders, number of images, ground truths."""
    return {"sets": [str(name) for name in names], "pictures": pictures, "truths": sorted(set(truths))}


def warning(chosen: dict[str, Any], truths: Sequence[str]) -> str | None:
    """A warning about figures on images with these fingerprints; None if the weights were not chosen on them."""
    count = sum(truth in chosen["truths"] for truth in truths)
    if not count:
        return None
    return (
        f"its weights were chosen on the ground truths of {count} of these {len(truths)} images (validation on "
        f"{', '.join(chosen['sets'])}): the figures are biased; score others, or validate on others and train again"
    )
