"""Images as programs have them (Pillow, NumPy, PyTorch), taken to what the methods want, and back."""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.rounding import to_8bit

Picture = TypeVar("Picture", Image.Image, np.ndarray, Tensor)
Back = Callable[[Tensor], Any]  # (N,C,H,W) in [0,1] -> the kind of image that was given

KEPT = ("icc_profile", "exif", "dpi")  # of a Pillow image's `info`: what its own `save` writes again
SLACK = 1e-3  # beyond [0,1]; more is no rounding


def opened(image: Any) -> tuple[Tensor, Back]:
    """``image`` as (N,3,H,W), float32 in [0,1], and the way back. Raises TypeError or ValueError."""
    if isinstance(image, Image.Image):
        return _pillow(image)
    if isinstance(image, np.ndarray):
        return _array(image)
    if isinstance(image, Tensor):
        return _tensor(image)
    name = type(image).__name__
    remedy = "; open the file first (PIL.Image.open)" if isinstance(image, str) or hasattr(image, "__fspath__") else ""
    raise TypeError(f"an image is a Pillow image, a NumPy array or a PyTorch tensor, not {name}{remedy}")


def _pillow(image: Image.Image) -> tuple[Tensor, Back]:
    if image.mode == "F" or image.mode.startswith("I"):
        raise ValueError(f"a Pillow image of mode {image.mode} has no agreed white; convert it to RGB, of 8 bit, first")
    if 0 in image.size:
        raise ValueError(f"the image is empty: {image.width}x{image.height} pixels")
    kept = {key: image.info[key] for key in KEPT if key in image.info}
    if image.mode not in ("RGB", "RGBA", "P"):  # a profile of grey or CMYK says nothing of RGB
        kept.pop("icc_profile", None)
    pixels = np.array(image.convert("RGB"))

    def back(found: Tensor) -> Image.Image:
        values = np.ascontiguousarray(to_8bit(found[0]))
        answer = Image.fromarray(values[..., 0] if values.shape[2] == 1 else values)
        answer.info = dict(kept) if answer.mode == "RGB" else {}
        return answer

    return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255, back


def _array(image: np.ndarray) -> tuple[Tensor, Back]:
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"an array must have shape (H,W,3), not {image.shape}{_hint(image.shape)}")
    if image.dtype != np.uint8 and image.dtype.kind != "f":
        raise TypeError(f"an array must hold uint8, or floats in [0,1], not {image.dtype}; divide by its white first")
    whole = image.dtype == np.uint8
    # A copy in native byte order: arrays may be read-only, turned round, or of a byte order that PyTorch lacks.
    values = torch.from_numpy(np.array(image, np.uint8 if whole else np.float32, order="C"))

    def back(found: Tensor) -> np.ndarray:
        if found.shape[1] == 1:
            return found[0, 0].float().cpu().numpy().astype(np.float32 if whole else image.dtype)
        if whole:
            return np.ascontiguousarray(to_8bit(found[0]))
        return found[0].permute(1, 2, 0).float().cpu().numpy().astype(image.dtype, order="C")

    return _unit(values).permute(2, 0, 1)[None], back


def _tensor(image: Tensor) -> tuple[Tensor, Back]:
    if image.dim() not in (3, 4) or image.shape[-3] != 3 or 0 in image.shape:
        shape = tuple(image.shape)
        raise ValueError(f"a tensor must have shape (3,H,W) or (N,3,H,W), not {shape}{_hint(shape)}")
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise TypeError(f"a tensor must hold uint8, or floats in [0,1], not {image.dtype}; divide by its white first")
    values = _unit(image.detach() if image.dtype == torch.uint8 else image.detach().float())

    def back(found: Tensor) -> Tensor:
        if image.dtype == torch.uint8:
            found = found.float() if found.shape[1] == 1 else found.float().mul(255).round().to(torch.uint8)
        else:
            found = found.to(image.dtype)
        return (found[0] if image.dim() == 3 else found).to(image.device)

    return (values[None] if image.dim() == 3 else values), back


def _unit(values: Tensor) -> Tensor:
    """uint8 divided by 255; floats as they are, if they lie in [0,1]."""
    if values.dtype == torch.uint8:
        return values / 255
    low, high = (float(value) for value in values.aminmax())  # NaN, if there is one
    if not (low >= -SLACK and high <= 1 + SLACK):
        told = f"from {low:g} to {high:g}" if low == low else "that are not numbers (NaN)"
        raise ValueError(f"floats must lie in [0,1], and there are values {told}; divide by white, or clip them")
    return values.clamp(0, 1)


def _hint(shape: tuple[int, ...]) -> str:
    if len(shape) == 4 and shape[-1] == 3:
        return "; give an array image by image, and tensors with the channels in front (permute(0, 3, 1, 2))"
    if len(shape) == 3 and (shape[0] == 3 or shape[2] == 3):
        return "; arrays have the channels last (transpose(1, 2, 0)), tensors in front (permute(2, 0, 1))"
    if 4 in (shape[:1] + shape[-1:]):
        return "; take the alpha channel off"
    if len(shape) == 2 or 1 in (shape[:1] + shape[-1:]):
        return "; repeat grey three times"
    return ""
