"""DREM: dense residual enhancement (NeDR, arXiv 2511.13110; residual dense blocks of RDN, 1802.08797)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import pointwise


class ResidualDenseBlock(nn.Module):
    """Three densely connected 5x5 convolutions of ``growth`` channels, fused by 1x1, plus the input. Same shape.

    A convolution of concatenated maps is the sum of the convolutions of each. So each map is convolved once, for all
    later layers, as soon as it is computed: nothing is concatenated, and training needs a third of the memory.
    """

    def __init__(self, channels: int, growth: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(channels + k * growth, growth, 5, padding=2) for k in range(3))
        self.fuse = nn.Conv2d(channels + 3 * growth, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        widths = [x.shape[1], *(layer.out_channels for layer in self.layers)]
        by_map = [layer.weight.split(widths[: k + 1], 1) for k, layer in enumerate(self.layers)]
        fuse = self.fuse.weight.split(widths, 1)
        total, dense = x + pointwise(x, fuse[0], self.fuse.bias), x
        pending: list[Tensor] = []  # sums so far of the later layers
        bias = torch.cat([layer.bias for layer in self.layers])
        for k in range(3):
            weight = torch.cat([by_map[n][k] for n in range(k, 3)])
            parts = F.conv2d(dense, weight, bias, padding=2).split(widths[k + 1 :], 1)
            pending = [a + b for a, b in zip(pending, parts, strict=True)] if pending else list(parts)
            bias = None
            dense = pending.pop(0).relu()
            total = total + pointwise(dense, fuse[k + 1])
        return total


class DREM(nn.Module):
    """Dense residual enhancement: x minus the output of two residual dense blocks. (N,C,H,W) -> same shape."""

    def __init__(self, channels: int = 32, growth: int = 64):
        super().__init__()
        self.lift = nn.Conv2d(channels, growth, 5, padding=2)
        self.block1 = ResidualDenseBlock(growth, growth)
        self.block2 = ResidualDenseBlock(growth, growth)
        self.merge = nn.Conv2d(growth, growth, 5, padding=2)
        self.lower = nn.Conv2d(growth, channels, 5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled() and x.device.type == "cpu" and self.is_identity():  # a GPU would synchronise
            return x
        first = self.lift(x)
        second = self.block1(first).relu_()
        third = self.block2(second).relu_()
        return x - self.lower(self.merge(first + second + third).relu_())

    def is_identity(self) -> bool:
        """Is the last convolution zero, so that the others have no effect?"""
        return not (self.lower.weight.any() or self.lower.bias.any())

    def make_identity(self) -> None:
        """Zero the last convolution, so that the module returns its input: used for missing weights."""
        nn.init.zeros_(self.lower.weight)
        nn.init.zeros_(self.lower.bias)
