"""Encoder (timm; EfficientNet-lite3 as released) and fusion decoder, used by the removal and the depth network.

The decoder is MiDaS-small's (Ranftl et al., 1907.01341), as in D4 (Yang et al., CVPR 2022) and NeDR (2511.13110).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import encoder
from models.layers import ReflectConv, channels_last, pointwise, recomputed, single
from utils import tiling

STRIDE = 32


class ResidualUnit(nn.Module):
    """x + conv(ReLU(conv(ReLU(x)))), 3x3, reflection padding, no normalisation. Same shape."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = ReflectConv(channels, channels, 3)
        self.conv2 = ReflectConv(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.conv1(x.relu()).relu_())


class Fusion(nn.Module):
    """Add the skip, refine, project to ``out_channels`` and double the size. (N,C,H,W) -> (N,out,2H,2W).

    The published order is up-sampling, then the 1x1 projection; both are linear and the interpolation weights
    sum to one, so projecting first gives the same numbers at a quarter of the cost.
    ``tile``: the side of the tiles in which x is refined, in pixels of x.
    """

    def __init__(self, channels: int, out_channels: int, skip: bool):
        super().__init__()
        self.skip = ResidualUnit(channels) if skip else None
        self.refine = ResidualUnit(channels)
        self.project = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, skip: Tensor | None = None, tile: int | None = None) -> Tensor:
        def refine(piece: Tensor, window: tiling.Window) -> Tensor:
            if self.skip is not None:
                piece = piece + self.skip(window.cut(skip))
            return pointwise(self.refine(piece), self.project.weight, self.project.bias)

        x = tiling.apply(refine, x, tile=tile, halo=tiling.reach(self))
        # Not in tiles: with aligned corners the sampling positions depend on the whole size.
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


class Pyramid(nn.Module):
    """Encoder, mixers and decoder: (N,3,H,W) in [0,1] -> features (N,F,H/2,W/2) and pooled maps (N,``pooled``).

    H and W are multiples of 32, at least 64. ``mixer`` creates the module applied to each encoder map, of F, 2F, 4F
    and 8F channels (NeDR's KAN-CID; None for none). The pooled maps carry gradients; detach them if not wanted.
    The encoder, 4 % of NeDR's operations, stays in float32 under autocast.
    ``tile`` computes the same, map by map, in tiles of that many pixels of the image a side, in eval mode.
    ``backbone`` is timm's name of the encoder.
    """

    def __init__(
        self,
        features: int = 32,
        mixer: Callable[[int], nn.Module] | None = None,
        backbone: str = encoder.RELEASED,
    ):
        super().__init__()
        self.recompute = False
        widths = [features * 2**k for k in range(4)]
        self.encoder = encoder.create(backbone)
        channels = encoder.channels(self.encoder)
        self.pooled = sum(channels)
        self.reduce = nn.ModuleList(ReflectConv(a, b, 3, bias=False) for a, b in zip(channels, widths, strict=True))
        self.mixers = nn.ModuleList(mixer(width) if mixer else nn.Identity() for width in widths)
        self.fusion = nn.ModuleList(
            Fusion(width, max(features, width // 2), skip=k < 3) for k, width in enumerate(widths)
        )

    def forward(self, image: Tensor, tile: int | None = None) -> tuple[Tensor, Tensor]:
        with torch.autocast(image.device.type, enabled=False):  # in bf16 its 24 blocks alone cost the output 35 dB
            maps = encoder.maps(self.encoder, channels_last(single(image)), tile)
        pooled = torch.cat([single(m.mean((2, 3))) for m in maps], 1)
        half = tiling.coarse_side(tile, 2)
        eighth = tiling.coarse_side(tile, 8)  # the mixers' spline bases take eight times the memory
        mixers = [nn.Sequential(*layers) for layers in zip(self.reduce, self.mixers, strict=True)]
        skips = [tiling.apply_module(mix, m, tile=eighth) for m, mix in zip(maps, mixers, strict=True)]
        x = None
        for fuse, skip in zip(reversed(self.fusion), reversed(skips), strict=True):
            fuse = recomputed(fuse) if self.recompute else fuse
            x = fuse(skip, None, half) if x is None else fuse(x, skip, half)
        return x, pooled


class Head(nn.Module):
    """From features at half size to one map at full size: (N,F,H/2,W/2) -> (N,1,H,W), unbounded."""

    def __init__(self, features: int = 32):
        super().__init__()
        self.conv1 = ReflectConv(features, features // 2, 3)
        self.conv2 = ReflectConv(features // 2, 32, 3)
        self.conv3 = nn.Conv2d(32, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(self.conv1(x), scale_factor=2, mode="bilinear", align_corners=False)
        return single(self.conv3(self.conv2(x).relu_()))


def squash(x: Tensor, low: float, high: float) -> Tensor:
    """Map real numbers into [low, high] by tanh, as D4 and NeDR do for transmission, depth and density."""
    return low + (high - low) * (single(x).tanh() + 1) / 2


def initialise(network: nn.Module) -> None:
    """The released initialisation: convolutions with PyTorch's weights and zero biases, batch norm N(1, 0.02).

    Applied before the encoder gets its pretrained weights.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)
            nn.init.zeros_(module.bias)
