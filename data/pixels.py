"""Decoded images that are converted to floats in [0,1] only where they are indexed.

8-bit values take a quarter of the memory of floats, and training uses crops: cropping first and converting then gives
the same numbers, since the conversion is per pixel, for a fraction of the work.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Pixels:
    """An image (C,H,W): ``pixels[:, a:b, c:d]`` is a contiguous tensor, float32 in [0,1].

    ``values`` are uint8, or float32 in [0,1] where 8 bits do not suffice. ``levels`` maps the 256 values of uint8 to
    floats; None means value / 255. ``whole``: height and width before the image was cut or reduced, if it was.
    """

    values: Tensor
    levels: np.ndarray | None = None
    whole: tuple[int, int] | None = None

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def __getitem__(self, index) -> Tensor:
        values = self.values[index]
        if values.is_floating_point():
            return values.contiguous()
        if self.levels is None:
            return values.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        return torch.from_numpy(self.levels[values.numpy()]).contiguous()


@dataclass(frozen=True)
class Stack:
    """Images of one size, concatenated along the channels and indexed like `Pixels`, so that they are cropped alike."""

    layers: tuple[Pixels, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        return (sum(layer.shape[0] for layer in self.layers), *self.layers[0].shape[1:])

    def __getitem__(self, index) -> Tensor:
        return torch.cat([layer[index] for layer in self.layers])
