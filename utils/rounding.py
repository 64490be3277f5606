"""Rounding of images in [0,1] to 8 bit."""

import numpy as np
from torch import Tensor

from utils.evaluation.metrics import _pixels


def to_8bit(image: Tensor) -> np.ndarray:
    """An image (3,H,W), or a map (1,H,W), float in [0,1], as (H,W,C) uint8 by rounding; values outside are clamped."""
    return _pixels(image.detach().cpu(), "round").permute(1, 2, 0).numpy()
