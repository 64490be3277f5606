"""KA-Net's network: TransWeather's encoder, decoder and tail around a block that removes degradations.

Feng et al., TPAMI 46(12), 2024, as in the released code; encoder, decoder and tail after TransWeather (Valanarasu et
al., CVPR 2022). Maps within the transformer blocks are (N,h,w,C), elsewhere (N,C,h,w).
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from models.kanet.removal import RemovalBlock
from utils.errors import UserError

WIDTH = 64  # as published
MULTIPLE, MINIMUM = 16, 48  # of the sides of images
DROP_PATH = 0.1  # of the last block; it rises from 0 in equal steps
QUERIES = 48


class Embed(nn.Module):
    """Strided convolution and layer norm: (N,a,H,W) -> (N,h,w,b)."""

    def __init__(self, a: int, b: int, kernel: int = 3, stride: int = 2):
        super().__init__()
        self.conv = nn.Conv2d(a, b, kernel, stride, padding=kernel // 2)
        self.norm = nn.LayerNorm(b)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(_channels_last(self.conv(x)))


class Attention(nn.Module):
    """Self-attention whose keys and values come from a map ``reduction`` times as coarse. (N,h,w,C) -> same shape."""

    def __init__(self, channels: int, heads: int, reduction: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(channels, channels)
        self.key_value = nn.Linear(channels, 2 * channels)
        self.project = nn.Linear(channels, channels)
        # Rows and columns beyond the last complete cell are ignored.
        self.reduce = nn.Conv2d(channels, channels, reduction, reduction) if reduction > 1 else None
        self.norm = nn.LayerNorm(channels) if reduction > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        coarse = x if self.reduce is None else self.norm(_channels_last(self.reduce(_channels_first(x))))
        key, value = self.key_value(coarse).flatten(1, 2).chunk(2, -1)
        attended = attend(self.query(x).flatten(1, 2), key, value, self.heads)
        return self.project(attended).view_as(x)


class QueryAttention(nn.Module):
    """Attention of learned queries, each for a run of positions in raster order. (N,h,w,C) -> same shape.

    The released code repeats its 48 queries to one a position (by nearest neighbours) and attends with all of them;
    here the 48 attend once and their results are repeated: the same output, at a cost linear in the positions.
    """

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.queries = nn.Parameter(torch.randn(1, QUERIES, channels))
        self.query = nn.Linear(channels, channels)
        self.key_value = nn.Linear(channels, 2 * channels)
        self.project = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        key, value = self.key_value(x).flatten(1, 2).chunk(2, -1)
        query = self.query(self.queries).expand(len(x), -1, -1)
        attended = self.project(attend(query, key, value, self.heads))
        return F.interpolate(attended.mT, size=key.shape[1], mode="nearest").mT.reshape(x.shape)


class MLP(nn.Module):
    """Linear, depthwise 3x3 convolution, GELU, linear. (N,h,w,C) -> same shape."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.expand = nn.Linear(channels, hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.contract = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.contract(F.gelu(_channels_last(self.depthwise(_channels_first(self.expand(x))))))


class Block(nn.Module):
    """A transformer block: x + attention, then x + MLP, both of the normalised x. (N,h,w,C) -> same shape."""

    def __init__(self, channels: int, attention: nn.Module, ratio: int, drop: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=1e-6)
        self.attention = attention
        self.norm2 = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = MLP(channels, ratio * channels)
        self.drop = DropPath(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """Blocks one after the other and a layer norm: (N,h,w,C) -> (N,C,h,w)."""

    def __init__(self, channels: int, heads: int, reduction: int, drops: list[float]):
        super().__init__()
        self.blocks = nn.Sequential(
            *(Block(channels, Attention(channels, heads, reduction), 2, drop) for drop in drops)
        )
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return _channels_first(self.norm(self.blocks(x)))


class Encoder(nn.Module):
    """(N,3,H,W) in [-1,1] -> maps of w, 2w, 5w and 8w channels at 1/4, 1/8, 1/16 and 1/32 (sizes rounded up).

    A side path ("intra-patch") embeds each stage's input to its blocks at the next stage's size, applies a block of
    its own, and is added to the next stage's embedding.
    """

    def __init__(self, width: int):
        super().__init__()
        dims = widths(width)
        rates = _drop_rates(8)
        self.embed = nn.ModuleList([Embed(3, dims[0], 7, 4), *map(Embed, dims[:3], dims[1:])])
        self.stages = nn.ModuleList(
            Stage(dims[k], (1, 2, 4, 4)[k], (4, 2, 2, 1)[k], rates[2 * k : 2 * k + 2]) for k in range(4)
        )
        self.side_embed = nn.ModuleList(map(Embed, dims[:3], dims[1:]))
        self.side_stages = nn.ModuleList(
            Stage(dims[k + 1], (1, 2, 2)[k], (4, 2, 2)[k], [rates[2 * k]]) for k in range(3)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        maps, side = [x], 0
        for k, stage in enumerate(self.stages):
            x = self.embed[k](maps[-1]) + side
            if k < len(self.side_stages):
                side = _channels_last(self.side_stages[k](self.side_embed[k](_channels_first(x))))
            maps.append(stage(x))
        return maps[1:]


class Decoder(nn.Module):
    """Blocks of learned queries on half the size: (N,C,h,w) -> (N,C,h/2,w/2), rounded up."""

    def __init__(self, channels: int):
        super().__init__()
        self.embed = Embed(channels, channels)
        rates = _drop_rates(16)[:3]
        self.blocks = nn.Sequential(*(Block(channels, QueryAttention(channels, 8), 4, rate) for rate in rates))
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return _channels_first(self.norm(self.blocks(self.embed(x))))


class ResidualUnit(nn.Module):
    """x + conv(ReLU(conv(x))), 3x3. Same shape."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x).relu())


class Tail(nn.Module):
    """From the decoder's map to the image's size, in six doublings, with the encoder's maps added as skips.

    The decoder's map (N,8w,h,w) and the encoder's four -> (N,w/8,H,W).
    """

    def __init__(self, width: int):
        super().__init__()
        w1, w2, w5, w8 = widths(width)
        steps = [w8, w8, w5, w2, w1, width // 4, width // 8]
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, 2) for a, b in pairwise(steps))
        self.refine = nn.ModuleList(ResidualUnit(channels) for channels in steps[2:-1])

    def forward(self, x: Tensor, maps: list[Tensor]) -> Tensor:
        deepest, *others = reversed(maps)
        x = _crop(self.up[0](x), deepest) + deepest
        for k, skip in enumerate(others):
            x = self.refine[k](_crop(self.up[k + 1](x), skip)) + skip
        return self.up[5](self.refine[3](self.up[4](x)))


class KANetwork(nn.Module):
    """Hazy images (N,3,H,W) in [0,1] -> clear ones (N,3,H,W) in (-1,1), and z (N,8w), the mean deepest features.

    H and W are multiples of 16, at least 48. The clear images should lie in [0,1], as their targets do, though the
    final tanh can go below 0: the released code scales only its input to [-1,1]. z is used in training only.
    ``width``, w, is 64 as published and must be a multiple of 8.
    """

    def __init__(self, width: int = WIDTH):
        super().__init__()
        check_width(width)
        self.encoder = Encoder(width)
        self.removal = RemovalBlock(8 * width)
        self.decoder = Decoder(8 * width)
        self.tail = Tail(width)
        self.last = nn.Conv2d(width // 8, 3, 3, padding=1, padding_mode="reflect")

    def forward(self, hazy: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.encoder(2 * hazy - 1)
        x = self.tail(self.decoder(self.removal(maps[-1])), maps)
        return self.last(x).float().tanh(), maps[-1].float().mean((2, 3))


def widths(width: int) -> tuple[int, int, int, int]:
    """The numbers of channels of the encoder's maps."""
    return width, 2 * width, 5 * width, 8 * width


def check_width(width: int) -> None:
    """Raise `UserError` for a width by which the narrowest layers or the attention heads are not divisible."""
    if width < 8 or width % 8:
        raise UserError(f"kanet.width={width}: must be a multiple of 8 (64 as published)")


@torch.no_grad()
def initialise(network: KANetwork) -> None:
    """The released initialisation of the transformers; the other parts keep PyTorch's."""
    for module in (*network.encoder.modules(), *network.decoder.modules()):
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1] // module.groups
            nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
            nn.init.zeros_(module.bias)


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Multi-head softmax attention: queries (N,Q,C), keys and values (N,K,C) -> (N,Q,C)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _crop(x: Tensor, like: Tensor) -> Tensor:
    """The upper left part of a map, in the size of ``like``: the encoder rounds sizes up."""
    return x[..., : like.shape[2], : like.shape[3]]


def _drop_rates(blocks: int) -> list[float]:
    return [DROP_PATH * k / (blocks - 1) for k in range(blocks)]


def _channels_first(x: Tensor) -> Tensor:
    """(N,h,w,C) -> (N,C,h,w)."""
    return x.permute(0, 3, 1, 2)


def _channels_last(x: Tensor) -> Tensor:
    """(N,C,h,w) -> (N,h,w,C)."""
    return x.permute(0, 2, 3, 1)
