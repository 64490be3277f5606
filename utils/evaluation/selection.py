"""Were weights chosen on the images that they are scored on? Images are known by what they show, not by name."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from utils.rounding import to_8bit

SIDE = 256  # pixels of the middle that are compared


def fingerprint(clear: Tensor) -> str:
    """What tells a ground truth (3,H,W) in [0,1] from all others: a digest of its middle, in 8 bit.

    A set that was moved, renamed, written anew or freed of an equal border on all sides is still the same.
    """
    top, left = (max(0, side - SIDE) // 2 for side in clear.shape[1:])
    middle = to_8bit(clear[:, top : top + SIDE, left : left + SIDE])
    return hashlib.sha256(repr(middle.shape).encode() + middle.tobytes()).hexdigest()[:16]


def chosen_on(names: Sequence[str | Path], pictures: int, truths: Sequence[str]) -> dict[str, Any]:
    """What exported weights say of their choice: the sets or folders, how many images, and their ground truths."""
    return {"sets": [str(name) for name in names], "pictures": pictures, "truths": sorted(set(truths))}


def remark(chosen: dict[str, Any], truths: Sequence[str]) -> str | None:
    """What is to be said of figures on images with these fingerprints; None where no choice was made on them."""
    seen = sum(truth in chosen["truths"] for truth in truths)
    if not seen:
        return None
    return (
        f"its weights were chosen on the ground truths of {seen} of these {len(truths)} images (validation on "
        f"{', '.join(chosen['sets'])}): the figures flatter it; score others, or validate on others and train again"
    )
