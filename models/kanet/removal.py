"""KA-Net's localization-and-removal block, on the features at 1/32 of the image's size.

The blocks and their names are the released code's (Feng et al., TPAMI 2024). That the gates localize degradations and
the random features help to remove them is our reading of the abstract.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SEED = 1234  # of the random features: equal in all networks; the released files do not hold them
DILATIONS = (1, 3, 5)


def conv_norm(a: int, b: int, kernel: int, dilation: int = 1) -> nn.Sequential:
    """Convolution that keeps the size, batch norm, ReLU."""
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(a, b, kernel, padding=padding, dilation=dilation), nn.BatchNorm2d(b), nn.ReLU(inplace=True)
    )


class RandomFourierFeatures(nn.Module):
    """sqrt(2 / b) cos(W p + beta) at every pixel: (N,a,h,w) -> (N,b,h,w), in float32 (Rahimi and Recht, NIPS 2007).

    W ~ N(0,1) and beta ~ U(0,2 pi) are drawn once, with a fixed seed, and saved with the weights. With ``resampled``
    set they are drawn anew in every forward pass, at test time too, W first, from PyTorch's global CPU generator, as
    in the released code, whose files therefore do not hold them.
    """

    def __init__(self, a: int, b: int):
        super().__init__()
        self.shape = (b, a)
        self.resampled = False
        weight, bias = self._draw(torch.Generator().manual_seed(SEED))
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, p: Tensor) -> Tensor:
        weight, bias = (drawn.to(p.device) for drawn in self._draw()) if self.resampled else (self.weight, self.bias)
        with torch.autocast(p.device.type, enabled=False):  # an angle of 20 needs more than bf16's 8 bits
            return math.sqrt(2 / len(bias)) * F.conv2d(p.float(), weight[..., None, None], bias).cos()

    def _draw(self, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        weight = torch.randn(self.shape, generator=generator)
        return weight, torch.empty(self.shape[0]).uniform_(0, 2 * math.pi, generator=generator)


class SSB(nn.Module):
    """A gate per channel and position and a gate per position, in parallel, then merged. Same shape."""

    def __init__(self, channels: int):
        super().__init__()
        c, few = channels, channels // 16
        self.squeeze = nn.Sequential(nn.Linear(c, few, bias=False), nn.ReLU(), nn.Linear(few, c, bias=False))
        self.local = nn.Sequential(
            nn.Conv2d(c, few, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(few, c, 3, padding=1, bias=False)
        )
        self.score = nn.Conv2d(c, 1, 1)
        self.place = nn.Sequential(nn.Conv2d(2, 1, 1), nn.ReLU(), nn.Conv2d(1, 1, 1))
        self.merge = conv_norm(2 * c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        channels = (self.squeeze(x.mean((2, 3)))[..., None, None] * self.local(x)).sigmoid()
        positions = self.place(torch.cat([x.mean(1, keepdim=True), self.score(x)], 1)).sigmoid()
        return self.merge(torch.cat([x * channels, x * positions], 1))


class DRB(nn.Module):
    """Two dilated convolutions, densely connected, gated by SSB, plus the input. Same shape."""

    def __init__(self, channels: int, dilation: int):
        super().__init__()
        self.first = conv_norm(channels, channels, 3, dilation)
        self.second = conv_norm(channels, channels, 3, dilation)
        self.merge = conv_norm(2 * channels, channels, 1)
        self.gate = SSB(channels)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        return self.gate(self.merge(torch.cat([first, self.second(first)], 1))) + x


class AGB(nn.Module):
    """Branches (N,C,h,w), weighted by their means over channels and positions, summed and merged. Same shape."""

    def __init__(self, channels: int, branches: int):
        super().__init__()
        n = branches
        self.weigh = nn.Sequential(nn.Linear(n, n, bias=False), nn.ReLU(), nn.Linear(n, n, bias=False), nn.Sigmoid())
        self.merge = conv_norm(channels, channels, 1)

    def forward(self, branches: list[Tensor]) -> Tensor:
        weights = self.weigh(torch.stack([branch.mean((1, 2, 3)) for branch in branches], 1))[..., None, None, None]
        return self.merge(sum(weights[:, k] * branch for k, branch in enumerate(branches)))


class MRFEB(nn.Module):
    """Three receptive fields, the smallest on the random features, plus the input. (N,C,h,w) -> same shape."""

    def __init__(self, channels: int):
        super().__init__()
        self.reduce = conv_norm(channels, channels // 8, 1)
        self.random = RandomFourierFeatures(channels // 8, channels)
        self.branches = nn.ModuleList(DRB(channels, dilation) for dilation in DILATIONS)
        self.merge = AGB(channels, len(DILATIONS))

    def forward(self, x: Tensor) -> Tensor:
        inputs = (self.random(self.reduce(x)), x, x)
        return self.merge([branch(y) for branch, y in zip(self.branches, inputs, strict=True)]) + x


class RemovalBlock(nn.Module):
    """The whole block: two convolutions, MRFEB, plus the input. (N,C,h,w) -> same shape; C a multiple of 16."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.remove = MRFEB(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.remove(self.second(self.first(x).relu() + x)) + x
