"""Full-reference metrics under the default protocol; a figure without its protocol is worthless.

PSNR and SSIM (Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment: from error visibility to structural
similarity", TIP 2004) as scikit-image computes them, on pictures as they would be saved.
"""

import importlib.metadata
import platform

import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from utils.errors import UserError

PROTOCOL = {
    "name": "ours",
    "pixels": "RGB, 8 bit by rounding, at full size",
    "psnr": "data range 255, per image, then averaged",
    "ssim": "Gaussian window 11, sigma 1.5, valid border, data range 255, mean over RGB (scikit-image, "
    "gaussian_weights=True, use_sample_covariance=False), per image, then averaged",
}
WINDOW = 11  # pixels: SSIM needs at least this many on either side
LIBRARIES = ("torch", "torchvision", "numpy", "pillow", "scikit-image")


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two pictures (3,H,W) in [0,1]; inf if they are equal in 8 bit.

    Raises `UserError` if their shapes differ.
    """
    x, y = _pair(a, b)
    return float("inf") if (x == y).all() else float(peak_signal_noise_ratio(x, y, data_range=255))


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity, in [-1,1], of two pictures (3,H,W) in [0,1]; nan if a side is below 11 pixels.

    Raises `UserError` if their shapes differ.
    """
    x, y = _pair(a, b)
    if min(x.shape[:2]) < WINDOW:
        return float("nan")
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return float(structural_similarity(x, y, **window, data_range=255, channel_axis=2))


def to_8bit(image: Tensor) -> np.ndarray:
    """A picture (3,H,W), float in [0,1], as (H,W,3) uint8 by rounding; values outside are clamped."""
    return image.detach().cpu().double().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that figures depend on: decoders and metrics move between them."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in LIBRARIES}


def _pair(a: Tensor, b: Tensor) -> tuple[np.ndarray, np.ndarray]:
    if a.shape != b.shape:
        raise UserError(
            f"pictures of shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be compared; crop one of them"
        )
    return to_8bit(a), to_8bit(b)
