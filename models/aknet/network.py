"""The network of AKNet, as in its released code; derived from OKNet (Cui et al., AAAI 2024).

Some operations are computed faster: channel gates without transforms, large kernels by FFT, fusion without unfolding
(`models.aknet.fusion`). Results differ from the released code's by rounding alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.aknet.fusion import Fusion
from models.layers import single

KERNEL = 63  # side of the bottleneck's large kernels
BLOCKS = 4  # residual blocks of each encoder and decoder stage


def conv(a: int, b: int, side: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(a, b, side, stride, side // 2)


class ResBlock(nn.Module):
    """x + conv(GELU(conv(x)))."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1, self.conv2 = conv(channels, channels), conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.gelu(self.conv1(x))).add_(x)


def stage(channels: int) -> nn.Sequential:
    return nn.Sequential(*(ResBlock(channels) for _ in range(BLOCKS)))


class Shallow(nn.Sequential):
    """Features of a down-sampled image (SCM of MIMO-UNet): (N,3,h,w) -> (N,C,h,w)."""

    def __init__(self, channels: int):
        quarter, half = channels // 4, channels // 2
        convs = conv(3, quarter), conv(quarter, half, 1), conv(half, half), conv(half, channels, 1)
        norm = nn.InstanceNorm2d(channels, affine=True)
        super().__init__(convs[0], nn.GELU(), convs[1], nn.GELU(), convs[2], nn.GELU(), convs[3], norm)


class FGM(nn.Module):
    """Frequency gate: alpha |F^-1(p F(q))| + beta x, where p and q are 1x1 convolutions of x (N,C,h,w).

    As published, p is a map over pixels, and pixel (i,j) multiplies frequency (i,j) of the un-shifted spectrum: the
    gate's effect depends on the size of the image.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.gate, self.signal = conv(channels, channels, 1), conv(channels, channels, 1)
        self.alpha = nn.Parameter(torch.zeros(channels, 1, 1))
        self.beta = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled() and x.device.type == "cpu" and not self.alpha.any():  # a GPU would synchronise
            return self.beta * x
        return self.alpha * filtered(single(self.signal(x)), single(self.gate(x))) + self.beta * x


def filtered(signal: Tensor, gate: Tensor) -> Tensor:
    """|F^-1(gate F(signal))| for real maps (...,h,w), by half spectra.

    The gate's even part, gate(k) + gate(-k), gives a real result, its odd part an imaginary one.
    """
    size = signal.shape[-2:]
    half = size[1] // 2
    spectrum = torch.fft.rfft2(signal)
    mirrored = torch.cat([gate[..., :1], gate[..., size[1] - half :].flip(-1)], -1).flip(-2).roll(1, -2)
    gate = gate[..., : half + 1]
    real = torch.fft.irfft2((gate + mirrored) / 2 * spectrum, s=size)
    imaginary = torch.fft.irfft2((gate - mirrored) / 2j * spectrum, s=size)
    return torch.complex(real, imaginary).abs()  # not hypot, whose gradient at 0 is NaN


def large_kernel(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Depthwise convolution, zero outside, by FFT: (N,C,h,w), weight (C,1,k,l), k and l odd, -> (N,C,h,w)."""
    (height, width), (top, left) = x.shape[-2:], (side // 2 for side in weight.shape[-2:])
    size = [fast_size(max(side + radius, 2 * radius + 1)) for side, radius in ((height, top), (width, left))]
    padded = F.pad(single(x), (left, size[1] - width - left, top, size[0] - height - top))
    spectrum = torch.fft.rfft2(padded) * torch.fft.rfft2(single(weight).squeeze(1), s=size).conj()
    return torch.fft.irfft2(spectrum, s=size)[..., :height, :width] + bias.view(-1, 1, 1)


def fast_size(size: int) -> int:
    """The next even number without prime factors above 5: a fast size for Fourier transforms."""
    size += size % 2
    cofactor = size
    for prime in (2, 3, 5):
        while cofactor % prime == 0:
            cofactor //= prime
    return size if cofactor == 1 else fast_size(size + 2)


class Bottleneck(nn.Module):
    """Large kernels in space plus two channel gates and `FGM` in frequency: (N,C,h,w) -> same shape."""

    def __init__(self, channels: int):
        super().__init__()
        half, quarter = channels // 2, channels // 4
        self.enter, self.leave = conv(channels, channels, 1), conv(channels, channels, 1)
        self.frequency_gate, self.spatial_gate = conv(channels, channels, 1), conv(channels, channels, 1)
        self.fgm = FGM(channels)
        self.square = nn.Conv2d(half, half, KERNEL, padding=KERNEL // 2, groups=half)
        self.wide = nn.Conv2d(quarter, quarter, (1, KERNEL), padding=(0, KERNEL // 2), groups=quarter)
        self.tall = nn.Conv2d(quarter, quarter, (KERNEL, 1), padding=(KERNEL // 2, 0), groups=quarter)
        self.point = nn.Conv2d(channels, channels, 1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        o = F.gelu(self.enter(x))
        return self.leave((x + large_kernel(o, *self._kernels()) + self.fgm(self._gated(o))).relu())

    def _gated(self, o: Tensor) -> Tensor:
        """Both channel gates. A constant times a spectrum is a constant times the map: |F^-1(a F(o))| = |a| |o|."""
        magnitude = o.abs()
        a = self.frequency_gate(o.mean((2, 3), keepdim=True)).abs()
        return self.spatial_gate(a * magnitude.mean((2, 3), keepdim=True)) * a * magnitude

    def _kernels(self) -> tuple[Tensor, Tensor]:
        """The four depthwise convolutions as one: weights (C,1,63,63) and biases (C,)."""
        radius = KERNEL // 2
        wide = F.pad(self.wide.weight, (0, 0, radius, radius))
        tall = F.pad(self.tall.weight, (radius, radius))
        weight = torch.cat([self.square.weight, wide, tall])
        bias = torch.cat([self.square.bias, self.wide.bias, self.tall.bias])
        return weight + F.pad(self.point.weight, (radius,) * 4), bias + self.point.bias


class AKNetNetwork(nn.Module):
    """Hazy images (N,3,H,W) in [0,1] -> clear ones at a quarter, half and full size, unclamped.

    H and W are multiples of 4, at least 8. ``width`` (a multiple of 4; 32 as published) is the number of channels at
    full size; it doubles with every halving. ``border`` as in `Fusion`.
    """

    def __init__(self, width: int = 32):
        super().__init__()
        widths = [width, 2 * width, 4 * width]  # at full, half and quarter size
        self.stem = conv(3, width)
        self.down = nn.ModuleList(conv(a, 2 * a, stride=2) for a in widths[:2])
        self.shallow = nn.ModuleList(Shallow(c) for c in widths[1:])
        self.attach = nn.ModuleList(conv(2 * c, c) for c in widths[1:])  # FAM: joins `shallow` to the features
        self.encoder = nn.ModuleList(stage(c) for c in widths)
        self.bottleneck = Bottleneck(widths[2])
        self.decoder = nn.ModuleList(stage(c) for c in widths)
        self.fusion = nn.ModuleList(Fusion(c) for c in widths[:2])
        self.head = nn.ModuleList(conv(c, 3) for c in widths)

    def forward(self, hazy: Tensor, border: str = "zero") -> tuple[Tensor, Tensor, Tensor]:
        half, quarter = hazy[..., ::2, ::2], hazy[..., ::4, ::4]
        fine = self.encoder[0](F.gelu(self.stem(hazy)))
        middle = self.encoder[1](self._descend(fine, half, 0))
        coarse = self.encoder[2](self._descend(middle, quarter, 1))
        coarse = self.decoder[2](self.bottleneck(coarse))
        middle = self.fusion[1](middle, coarse, border)  # reassigned, so that the encoder's map is freed
        middle = self.decoder[1](middle)
        fine = self.fusion[0](fine, middle, border)
        fine = self.decoder[0](fine)
        return self.head[2](coarse) + quarter, self.head[1](middle) + half, self.head[0](fine) + hazy

    def _descend(self, features: Tensor, image: Tensor, level: int) -> Tensor:
        """Features at half their size, merged with those of the image at that size."""
        features = F.gelu(self.down[level](features))
        return self.attach[level](torch.cat([features, self.shallow[level](image)], 1))
