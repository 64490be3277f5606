"""IDRM: the implicit neural degradation representation (NeDR, arXiv 2511.13110; local ensemble of LIIF, 2012.09161)."""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import pointwise
from utils.tiling import Window

OCTAVES = 4


def pixel_centres(size: int, device=None) -> Tensor:
    """The ``size`` pixel centres of the interval [-1,1]: (size,)."""
    return (torch.arange(size, device=device, dtype=torch.float32) * 2 + 1) / size - 1


def position_encoding(height: int, width: int, device=None, window: Window | None = None) -> Tensor:
    """Coordinates and their encoding for every pixel centre: (1, 2 + 4 OCTAVES, height, width).

    Channels: row, column; then, axis by axis, sin(2^k pi p) and cos(2^k pi p) for k = 0..OCTAVES-1.
    ``window``: only those of this piece.
    """
    rows, columns = pixel_centres(height, device), pixel_centres(width, device)
    if window is not None:
        rows, columns = rows[window.rows], columns[window.columns]
    point = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))  # (2,H,W)
    octaves = math.pi * 2.0 ** torch.arange(OCTAVES, device=device)
    waves = point.unsqueeze(1) * octaves[None, :, None, None]  # (2,OCTAVES,H,W)
    encoded = torch.cat([waves.sin(), waves.cos()], 1).flatten(0, 1)
    return torch.cat([point, encoded]).unsqueeze(0)


class IDRM(nn.Module):
    """Implicit degradation representation: an MLP of local features, position and cell size, at every pixel.

    (N,C,H,W) -> (N,out,h,w); ``size`` = (h,w) queries the field at another resolution (default: that of the features).
    ``window``: the piece of a larger map that the features are, if they are one; positions are those in the whole map.
    The inputs of the first layer are, in this order, the 3x3 neighbourhood of the features (9 C, as torch's unfold),
    the pixel centre in [-1,1] and its encoding (2 + 16), and the cell size in feature pixels times two (2).
    The neighbourhood's part of that layer is computed as a 3x3 convolution.

    ``positional=False`` is the released network, in which query and feature coordinates are the same points: it
    encodes their difference, which is zero everywhere, and its cell is the constant (2,2).
    """

    def __init__(self, channels: int = 32, hidden: int = 256, out_channels: int = 32, positional: bool = True):
        super().__init__()
        self.channels, self.positional = channels, positional
        widths = [9 * channels + 2 + 4 * OCTAVES + 2, hidden, hidden, hidden, out_channels]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, features: Tensor, size: tuple[int, int] | None = None, window: Window | None = None) -> Tensor:
        height, width = size or features.shape[-2:]
        x = self._first_layer(features, height, width, window).permute(0, 2, 3, 1).relu()  # (N,h,w,C) from here on
        for layer in self.layers[1:-1]:
            x = layer(x).relu_()
        return self.layers[-1](x).permute(0, 3, 1, 2)

    def _first_layer(self, features: Tensor, height: int, width: int, window: Window | None) -> Tensor:
        """The first layer, split by its inputs; bilinear between features, so that the output is continuous."""
        local, position, cell = self.layers[0].weight.split([9 * self.channels, 2 + 4 * OCTAVES, 2], 1)
        rows, columns = self._cell(features, height, width)
        bias = self.layers[0].bias + rows * cell[:, 0] + columns * cell[:, 1]
        x = F.conv2d(features, local.reshape(-1, self.channels, 3, 3), bias, padding=1)
        if (height, width) != tuple(features.shape[-2:]):
            x = F.interpolate(x, (height, width), mode="bilinear", align_corners=False)
        if self.positional:
            whole = (height, width) if window is None else window.size
            x = x + pointwise(position_encoding(*whole, features.device, window).to(position.dtype), position)
        return x

    def _cell(self, features: Tensor, height: int, width: int) -> tuple[float, float]:
        h, w = features.shape[-2:]
        return (2 * h / height, 2 * w / width) if self.positional else (2.0, 2.0)
