"""The three generators: haze removal, haze production and depth (NeDR, arXiv 2511.13110, after D4, CVPR 2022)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import encoder
from models.layers import BatchNorm, ReflectConv, channels_last, recomputed, single
from models.nedr import airlight as heads
from models.nedr.implicit import IDRM
from models.nedr.kan import KANCID
from models.nedr.residual import DREM
from models.pyramid import Head, Pyramid, squash
from utils import physics, tiling

TRANSMISSION_RANGE = (0.05, 0.95)


class Removal(NamedTuple):
    """The removal network's outputs for hazy images (N,3,H,W)."""

    clear: Tensor  # J (N,3,H,W) in [0,1]
    density: Tensor  # beta (N,1,1,1)
    transmission: Tensor  # t (N,1,H,W)
    airlight: Tensor  # A (N,3,1,1)

    @property
    def depth(self) -> Tensor:
        """d (N,1,H,W), -ln(t) / beta."""
        return -self.transmission.log() / self.density


class Haze(NamedTuple):
    """The haze that the removal network estimates in its input images (N,3,H,W)."""

    density: Tensor  # beta (N,1,1,1)
    transmission: Tensor  # t (N,1,query H,query W)
    airlight: Tensor  # A (N,3,1,1)


class RemovalNet(nn.Module):
    """Haze removal (`net_h2c`): hazy -> transmission, density and airlight, and by them the clear image.

    H and W are multiples of 32, at least 64, with KAN-CID at least 128 (it reflects by 3 at 1/32).
    ``kan_cid``, ``idrm`` and ``drem`` switch the published modules; with all three off this is D4's network.
    ``airlight_head`` adds a head for the airlight, see `airlight.create`.
    """

    def __init__(
        self,
        features: int = 32,
        density_range: tuple[float, float] = (0.6, 1.8),
        kan_cid: bool = True,
        idrm: bool = True,
        drem: bool = True,
        positional: bool = True,
        airlight_head: str | None = None,
        airlight_bounds: tuple[float, float] = (0.5, 1.15),
        backbone: str = encoder.RELEASED,
        idrm_hidden: int = 256,
        drem_growth: int = 64,
        transmission_range: tuple[float, float] = TRANSMISSION_RANGE,
    ):
        super().__init__()
        self.density_range = density_range
        self.transmission_range = transmission_range
        self.recompute = False
        self.pyramid = Pyramid(features, KANCID if kan_cid else None, backbone)
        self.idrm = IDRM(features, idrm_hidden, features, positional) if idrm else None
        self.drem = DREM(features, drem_growth) if drem else nn.Identity()
        self.head = Head(features)
        pooled = self.pyramid.pooled
        self.density = nn.Sequential(nn.Linear(pooled, 64), nn.Linear(64, 1))
        self.airlight = heads.create(airlight_head, pooled, airlight_bounds) if airlight_head else None

    def forward(self, hazy: Tensor, airlight: str = "max", guided: bool = False, tile: int | None = None) -> Removal:
        """``airlight``: max | dark_channel | learned; ``guided`` refines t by the guided filter before its use.

        ``tile`` computes the same in tiles of that many pixels a side, in eval mode: only the maps of the widest
        layers are split, so density, airlight and positions are those of the whole image.
        """
        beta, t, A = self.estimate_haze(hazy, airlight, tile)
        if guided:
            t = physics.guided_filter(hazy, t, tile=tile)
        clear = tiling.apply(lambda piece, window: physics.restore(piece, window.cut(t), A), hazy, tile=tile)
        return Removal(clear, beta, t, A)

    def estimate_haze(self, hazy: Tensor, airlight: str = "max", tile: int | None = None, query: int = 1) -> Haze:
        """The haze alone, as in `forward`. ``query``: IDRM is evaluated for t at this multiple of the image's size."""
        x, pooled = self.pyramid(hazy, tile)
        with torch.autocast(hazy.device.type, enabled=False):  # every pixel depends on these few numbers
            beta = squash(self.density(pooled.detach()), *self.density_range)[..., None, None]
        if query > 1 and self.idrm is not None:
            t = self._transmission(x, size=tuple(query * side for side in x.shape[2:]))
        else:
            halo = 1 + tiling.reach(self.drem, self.head)  # IDRM sees one pixel
            transmission = recomputed(self._transmission) if self.recompute else self._transmission
            t = tiling.apply(transmission, x, tile=tiling.coarse_side(tile, 2), halo=halo, up=2)
        with torch.autocast(hazy.device.type, enabled=False):
            return Haze(beta, t, self.estimate_airlight(hazy, pooled, t, airlight))

    def _transmission(
        self, features: Tensor, window: tiling.Window | None = None, size: tuple[int, int] | None = None
    ) -> Tensor:
        """t of a piece of the image, from features at half its size; ``size`` as in `IDRM`."""
        if self.idrm is not None:
            features = self.idrm(features, size, window)
        return squash(self.head(self.drem(features)), 0, 1).clamp(*self.transmission_range)

    def estimate_airlight(self, hazy: Tensor, pooled: Tensor, t: Tensor, kind: str) -> Tensor:
        """(N,3,1,1) by the per-channel maximum, the dark channel or the learned head."""
        if kind == "max":
            return physics.max_airlight(hazy)
        if kind == "dark_channel":
            return physics.dark_channel_airlight(hazy)
        return self.airlight(pooled, hazy, t)


class DepthNet(nn.Module):
    """Depth of a clear image (`net_depth`): (N,3,H,W) -> (N,1,H,W) in ``depth_range``; H, W multiples of 32."""

    def __init__(
        self,
        features: int = 32,
        depth_range: tuple[float, float] = (0.2, 5.0),
        backbone: str = encoder.RELEASED,
    ):
        super().__init__()
        self.depth_range = depth_range
        self.pyramid = Pyramid(features, backbone=backbone)
        self.head = Head(features)

    def forward(self, clear: Tensor) -> Tensor:
        return squash(self.head(self.pyramid(clear)[0]), *self.depth_range)


class ConvBlock(nn.Module):
    """3x3 convolution with reflection padding, optional batch norm, optional LeakyReLU 0.2."""

    def __init__(self, a: int, b: int, stride: int = 1, norm: bool = True, active: bool = True):
        super().__init__()
        self.conv = ReflectConv(a, b, 3, stride)
        activation = nn.LeakyReLU(0.2, inplace=True) if active else nn.Identity()
        self.norm = BatchNorm(b, act=activation) if norm else activation

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class ProductionNet(nn.Module):
    """Haze production (`net_c2h`): the scattering model, then a residual network that refines its output.

    clear (N,3,H,W) in [0,1], depth (N,1,H,W), density (N,1,1,1) -> hazy (N,3,H,W) in [0,1]; H, W multiples of 4.
    ``airlight`` (N,3,1,1): by default the per-channel maximum of the clear image.
    """

    def __init__(self, width: int = 32):
        super().__init__()
        b = width
        self.encode = nn.ModuleList(
            [
                ConvBlock(3, b // 2, norm=False),
                ConvBlock(b // 2, b),
                ConvBlock(b, 2 * b, stride=2),
                ConvBlock(2 * b, 4 * b, stride=2),
            ]
        )
        self.residual = nn.ModuleList(
            nn.Sequential(ConvBlock(4 * b, 4 * b), ConvBlock(4 * b, 4 * b, active=False)) for _ in range(4)
        )
        self.decode = nn.ModuleList(
            [
                ConvBlock(8 * b, 2 * b),
                ConvBlock(4 * b, b, norm=False),
                ConvBlock(2 * b, b, norm=False),
                ConvBlock(b, 3, norm=False),
            ]
        )

    def forward(self, clear: Tensor, depth: Tensor, density: Tensor, airlight: Tensor | None = None) -> Tensor:
        A = physics.max_airlight(clear) if airlight is None else airlight
        scattered = channels_last(physics.scatter(clear, physics.transmission(depth, density), A))
        residual = single(self._refine(scattered)).tanh()
        return ((2 * scattered - 1 + residual).clamp(-1, 1) + 1) / 2

    def _refine(self, x: Tensor) -> Tensor:
        enc0, enc1, enc2, enc3 = self.encode
        x1 = enc1(enc0(x))
        x2 = enc2(x1)
        x3 = enc3(x2)
        y = x3
        for block in self.residual:
            y = y + block(y)
        dec1, dec2, dec3, dec4 = self.decode
        y = dec1(_upsample(torch.cat([y, x3], 1)))
        y = dec2(_upsample(torch.cat([y, x2], 1)))
        return dec4(dec3(torch.cat([y, x1], 1)))


def _upsample(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
