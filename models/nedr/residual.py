"""DREM: dense residual enhancement (NeDR, arXiv 2511.13110; residual dense blocks of RDN, 1802.08797)."""

import torch
from torch import Tensor, nn


class ResidualDenseBlock(nn.Module):
    """Three densely connected 5x5 convolutions of ``growth`` channels, fused by 1x1, plus the input. Same shape."""

    def __init__(self, channels: int, growth: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(channels + k * growth, growth, 5, padding=2) for k in range(3))
        self.fuse = nn.Conv2d(channels + 3 * growth, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        dense = x
        for layer in self.layers:
            dense = torch.cat([dense, layer(dense).relu()], 1)
        return self.fuse(dense) + x


class DREM(nn.Module):
    """Dense residual enhancement: x minus what two residual dense blocks find. (N,C,H,W) -> same shape."""

    def __init__(self, channels: int = 32, growth: int = 64):
        super().__init__()
        self.lift = nn.Conv2d(channels, growth, 5, padding=2)
        self.block1 = ResidualDenseBlock(growth, growth)
        self.block2 = ResidualDenseBlock(growth, growth)
        self.merge = nn.Conv2d(growth, growth, 5, padding=2)
        self.lower = nn.Conv2d(growth, channels, 5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        first = self.lift(x)
        second = self.block1(first).relu()
        third = self.block2(second).relu()
        return x - self.lower(self.merge(first + second + third).relu())

    def make_identity(self) -> None:
        """Zero the last convolution, so that the module returns its input: the stand-in for absent weights."""
        nn.init.zeros_(self.lower.weight)
        nn.init.zeros_(self.lower.bias)
