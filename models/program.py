"""Conversion of a program's images (Pillow, NumPy, PyTorch) to the methods' tensors and back."""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.rounding import to_8bit

ImageLike = TypeVar("ImageLike", Image.Image, np.ndarray, Tensor)
ConvertBack = Callable[[Tensor], Any]  # (N,C,H,W) in [0,1] -> the type of image that was given

KEPT_INFO = ("icc_profile", "exif", "dpi")  # entries of a Pillow image's `info` that its own `save` writes again
TOLERANCE = 1e-3  # beyond [0,1]; a larger excess is not a rounding error


def to_tensor(image: Any) -> tuple[Tensor, ConvertBack]:
    """``image`` as (N,3,H,W), float32 in [0,1], and the inverse conversion. Raises TypeError or ValueError."""
    if isinstance(image, Image.Image):
        return _from_pillow(image)
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, Tensor):
        return _from_tensor(image)
    name = type(image).__name__
    remedy = "; open the file first (PIL.Image.open)" if isinstance(image, str) or hasattr(image, "__fspath__") else ""
    raise TypeError(f"an image is a Pillow image, a NumPy array or a PyTorch tensor, not {name}{remedy}")


def _from_pillow(image: Image.Image) -> tuple[Tensor, ConvertBack]:
    if image.mode == "F" or image.mode.startswith("I"):
        raise ValueError(f"a Pillow image of mode {image.mode} has no agreed white; convert it to 8-bit RGB first")
    if 0 in image.size:
        raise ValueError(f"the image is empty: {image.width}x{image.height} pixels")
    info = {key: image.info[key] for key in KEPT_INFO if key in image.info}
    if image.mode not in ("RGB", "RGBA", "P"):  # a profile for grey or CMYK does not apply to RGB
        info.pop("icc_profile", None)
    pixels = np.array(image.convert("RGB"))

    def convert_back(output: Tensor) -> Image.Image:
        values = np.ascontiguousarray(to_8bit(output[0]))
        result = Image.fromarray(values[..., 0] if values.shape[2] == 1 else values)
        result.info = dict(info) if result.mode == "RGB" else {}
        return result

    return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255, convert_back


def _from_array(image: np.ndarray) -> tuple[Tensor, ConvertBack]:
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"an array must have shape (H,W,3), not {image.shape}{_hint(image.shape)}")
    if image.dtype != np.uint8 and image.dtype.kind != "f":
        raise TypeError(f"an array must hold uint8, or floats in [0,1], not {image.dtype}; divide by its white first")
    is_uint8 = image.dtype == np.uint8
    # A copy, since arrays may be read-only, have negative strides, or a byte order that PyTorch does not support.
    values = torch.from_numpy(np.array(image, np.uint8 if is_uint8 else np.float32, order="C"))

    def convert_back(output: Tensor) -> np.ndarray:
        if output.shape[1] == 1:
            return output[0, 0].float().cpu().numpy().astype(np.float32 if is_uint8 else image.dtype)
        if is_uint8:
            return np.ascontiguousarray(to_8bit(output[0]))
        return output[0].permute(1, 2, 0).float().cpu().numpy().astype(image.dtype, order="C")

    return _to_unit_range(values).permute(2, 0, 1)[None], convert_back


def _from_tensor(image: Tensor) -> tuple[Tensor, ConvertBack]:
    if image.dim() not in (3, 4) or image.shape[-3] != 3 or 0 in image.shape:
        shape = tuple(image.shape)
        raise ValueError(f"a tensor must have shape (3,H,W) or (N,3,H,W), not {shape}{_hint(shape)}")
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise TypeError(f"a tensor must hold uint8, or floats in [0,1], not {image.dtype}; divide by its white first")
    values = _to_unit_range(image.detach() if image.dtype == torch.uint8 else image.detach().float())

    def convert_back(output: Tensor) -> Tensor:
        if image.dtype == torch.uint8:
            output = output.float() if output.shape[1] == 1 else output.float().mul(255).round().to(torch.uint8)
        else:
            output = output.to(image.dtype)
        return (output[0] if image.dim() == 3 else output).to(image.device)

    return (values[None] if image.dim() == 3 else values), convert_back


def _to_unit_range(values: Tensor) -> Tensor:
    """uint8 divided by 255; floats unchanged if they lie in [0,1]. Raises ValueError for others."""
    if values.dtype == torch.uint8:
        return values / 255
    low, high = (float(value) for value in values.aminmax())  # NaN, if there is one
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):
        problem = f"from {low:g} to {high:g}" if low == low else "that are not numbers (NaN)"
        raise ValueError(f"floats must lie in [0,1], and there are values {problem}; divide by white, or clip them")
    return values.clamp(0, 1)


def _hint(shape: tuple[int, ...]) -> str:
    if len(shape) == 4 and shape[-1] == 3:
        return "; pass arrays image by image, and tensors with the channels first (permute(0, 3, 1, 2))"
    if len(shape) == 3 and (shape[0] == 3 or shape[2] == 3):
        return "; arrays have the channels last (transpose(1, 2, 0)), tensors first (permute(2, 0, 1))"
    if 4 in (shape[:1] + shape[-1:]):
        return "; remove the alpha channel"
    if len(shape) == 2 or 1 in (shape[:1] + shape[-1:]):
        return "; repeat the grey channel three times"
    return ""
