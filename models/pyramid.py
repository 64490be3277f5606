"""EfficientNet-lite3 encoder (timm) and fusion decoder, shared by the removal and the depth network.

The decoder is MiDaS-small's (Ranftl et al., 1907.01341), as in D4 (Yang et al., CVPR 2022) and NeDR (2511.13110).
"""

from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import ReflectConv, channels_last, pointwise, quicken, recomputed
from utils import tiling
from utils.checkpoint import read_weights
from utils.errors import UserError

BACKBONE = "tf_efficientnet_lite3"
ENCODER_CHANNELS = (32, 48, 136, 384)  # at strides 4, 8, 16, 32
STRIDE = 32
STAGES = (slice(0, 2), slice(2, 3), slice(3, 5), slice(5, 7))  # the encoder's blocks that end at those strides


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
    ``tile``: the side, in pixels of x, of the tiles in which it is refined.
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
        # Of the whole: with aligned corners the positions between which it interpolates depend on the whole size.
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


class Pyramid(nn.Module):
    """Encoder, mixers and decoder: (N,3,H,W) in [0,1] -> features (N,F,H/2,W/2) and pooled maps (N,600).

    H and W are multiples of 32, at least 64. ``mixer`` makes the module that works on each encoder map at F, 2F,
    4F and 8F channels (NeDR's KAN-CID; None for none). The pooled maps carry gradients; detach where not wanted.
    The encoder, 4 % of NeDR's operations, stays in float32 under autocast.
    ``tile`` computes the same, map by map, in tiles of that many pixels of the picture a side, in eval mode.
    """

    def __init__(self, features: int = 32, mixer: Callable[[int], nn.Module] | None = None):
        super().__init__()
        widths, self.recompute = [features * 2**k for k in range(4)], False
        encoder = timm.create_model(BACKBONE, features_only=True, out_indices=(1, 2, 3, 4), pretrained=False)
        self.encoder = quicken(encoder)
        self.reduce = nn.ModuleList(
            ReflectConv(a, b, 3, bias=False) for a, b in zip(ENCODER_CHANNELS, widths, strict=True)
        )
        self.mixers = nn.ModuleList(mixer(width) if mixer else nn.Identity() for width in widths)
        self.fusion = nn.ModuleList(
            Fusion(width, max(features, width // 2), skip=k < 3) for k, width in enumerate(widths)
        )

    def forward(self, image: Tensor, tile: int | None = None) -> tuple[Tensor, Tensor]:
        with torch.autocast(image.device.type, enabled=False):  # in bf16 its 24 blocks alone cost 35 dB of the output
            maps = self._encode(channels_last(image.float()), tile)
        pooled = torch.cat([m.mean((2, 3), dtype=torch.float32) for m in maps], 1)
        half, eighth = tiling.part(tile, 2), tiling.part(tile, 8)  # the mixers' spline bases are eight times as large
        mixers = [nn.Sequential(*layers) for layers in zip(self.reduce, self.mixers, strict=True)]
        skips = [tiling.through(mix, m, tile=eighth) for m, mix in zip(maps, mixers, strict=True)]
        x = None
        for fuse, skip in zip(reversed(self.fusion), reversed(skips), strict=True):
            fuse = recomputed(fuse) if self.recompute else fuse
            x = fuse(skip, None, half) if x is None else fuse(x, skip, half)
        return x, pooled

    def _encode(self, image: Tensor, tile: int | None) -> list[Tensor]:
        """The encoder's maps, each made from the one before.

        All but the first are cut into tiles of ``tile`` / 2 of their own pixels, not of the picture's: the coarser the
        map, the wider its halo is, and the less memory it takes.
        """
        encoder = self.encoder
        first, *others = (encoder.blocks[blocks] for blocks in STAGES)
        x = tiling.through(nn.Sequential(encoder.conv_stem, encoder.bn1, first), image, tile=tile, down=4)
        maps = [x]
        for stage in others:
            x = tiling.through(stage, x, tile=tiling.part(tile, 2), down=2)
            maps.append(x)
        return maps


class Head(nn.Module):
    """From features at half size to one map at full size: (N,F,H/2,W/2) -> (N,1,H,W), before any squashing."""

    def __init__(self, features: int = 32):
        super().__init__()
        self.conv1 = ReflectConv(features, features // 2, 3)
        self.conv2 = ReflectConv(features // 2, 32, 3)
        self.conv3 = nn.Conv2d(32, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(self.conv1(x), scale_factor=2, mode="bilinear", align_corners=False)
        return self.conv3(self.conv2(x).relu_()).float()


def squash(x: Tensor, low: float, high: float) -> Tensor:
    """Map any real number into [low, high] by tanh, as D4 and NeDR do for transmission, depth and density."""
    return low + (high - low) * (x.float().tanh() + 1) / 2


def initialise(network: nn.Module) -> None:
    """The released start of training: convolutions with PyTorch's weights and zero biases, batch norm N(1, 0.02).

    Applied before the encoder gets its own weights.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)
            nn.init.zeros_(module.bias)


def load_encoder(pyramids: list[Pyramid], weights: str, key: str) -> None:
    """Give every encoder its start: ``hub`` (ImageNet weights through timm), a file of them, or ``none``.

    A file is timm's tf_efficientnet_lite3 as .safetensors or .pth. Raises `UserError` with the remedy,
    the setting ``key``.
    """
    if weights == "none":
        return
    state = _hub_weights(key) if weights == "hub" else read_weights(Path(weights))
    for pyramid in pyramids:
        own = pyramid.encoder.state_dict()
        missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
        wrong = [key for key in own if key in state and state[key].shape != own[key].shape]
        if missing or wrong:
            raise UserError(
                f"{weights} does not hold the weights of timm's {BACKBONE}: {len(missing)} tensors missing, "
                f"{len(wrong)} of another shape, first {(missing + wrong)[0]}; save them with "
                f"timm.create_model('{BACKBONE}', pretrained=True).state_dict()"
            )
        pyramid.encoder.load_state_dict({key: state[key] for key in own if key in state}, strict=False)


def _hub_weights(key: str) -> dict[str, Tensor]:
    try:
        return timm.create_model(BACKBONE, pretrained=True).state_dict()
    except Exception as error:  # whatever the hub client raises offline: many kinds, one remedy
        raise UserError(
            f"the ImageNet weights of {BACKBONE} cannot be had from the hub ({type(error).__name__}); put timm's "
            f"file on this machine and set {key}=FILE, or train from scratch with {key}=none"
        ) from None
