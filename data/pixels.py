"""Decoded images that become numbers in [0,1] only where they are looked at.

A file's 8-bit steps are a quarter of the size of the numbers that they stand for, and training looks at a crop: to cut
first and convert then gives the same numbers (both go pixel by pixel) for a share of the work.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Pixels:
    """An image (C,H,W): ``pixels[:, a:b, c:d]`` is a contiguous tensor, float32 in [0,1].

    ``values`` are uint8 steps, or float32 in [0,1] of what 8 bits do not hold. ``levels``: what each of the 256 steps
    stands for; None is step / 255.
    """

    values: Tensor
    levels: np.ndarray | None = None

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

    def inside(self, border: int) -> "Pixels":
        """The same without ``border`` >= 1 pixels on every side."""
        return dataclasses.replace(self, values=self.values[:, border:-border, border:-border])


@dataclass(frozen=True)
class Stack:
    """Images of one size as the channels of one, to be cut alike: to be looked at like `Pixels`."""

    layers: tuple[Pixels, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        return (sum(layer.shape[0] for layer in self.layers), *self.layers[0].shape[1:])

    def __getitem__(self, index) -> Tensor:
        return torch.cat([layer[index] for layer in self.layers])
