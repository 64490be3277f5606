"""AKNet as its released code computes it, step by step and without a trick, from an official state dict: an oracle."""

import torch
import torch.nn.functional as F
from torch import Tensor


def network(state: dict[str, Tensor], x: Tensor, border: str) -> list[Tensor]:
    """Hazy (N,3,H,W) -> outputs at a quarter, half and full size. ``border``: zero | reflect."""
    x2 = F.interpolate(x, scale_factor=0.5)
    x4 = F.interpolate(x2, scale_factor=0.5)
    z2, z4 = shallow(state, "SCM2", x2), shallow(state, "SCM1", x4)
    r1 = stage(state, "Encoder.0", block(state, "feat_extract.0", x))
    z = torch.cat([block(state, "feat_extract.1", r1, stride=2), z2], 1)
    r2 = stage(state, "Encoder.1", block(state, "FAM2.merge", z, active=False))
    z = torch.cat([block(state, "feat_extract.2", r2, stride=2), z4], 1)
    z = stage(state, "Encoder.2", block(state, "FAM1.merge", z, active=False))
    z = stage(state, "Decoder.0", bottleneck(state, z))
    y4 = block(state, "ConvsOut.0", z, active=False) + x4
    z = stage(state, "Decoder.1", block(state, "Convs.0", torch.cat(fusion(state, "ff1", r2, z, border), 1)))
    y2 = block(state, "ConvsOut.1", z, active=False) + x2
    z = stage(state, "Decoder.2", block(state, "Convs.1", torch.cat(fusion(state, "ff2", r1, z, border), 1)))
    return [y4, y2, block(state, "feat_extract.5", z, active=False) + x]


def conv(state: dict, name: str, x: Tensor, stride: int = 1, groups: int = 1) -> Tensor:
    weight = state[f"{name}.weight"]
    padding = weight.shape[2] // 2, weight.shape[3] // 2
    return F.conv2d(x, weight, state[f"{name}.bias"], stride, padding, groups=groups)


def block(state: dict, name: str, x: Tensor, stride: int = 1, active: bool = True) -> Tensor:
    x = conv(state, f"{name}.main.0", x, stride)
    return F.gelu(x) if active else x


def stage(state: dict, name: str, x: Tensor) -> Tensor:
    for k in range(4):
        inner = f"{name}.layers.{k}.main"
        x = block(state, f"{inner}.1", block(state, f"{inner}.0", x), active=False) + x
    return x


def shallow(state: dict, name: str, x: Tensor) -> Tensor:
    for k in range(4):
        x = block(state, f"{name}.main.{k}", x, active=k < 3)
    return F.instance_norm(x, weight=state[f"{name}.main.4.weight"], bias=state[f"{name}.main.4.bias"])


def bottleneck(state: dict, x: Tensor, name: str = "bottelneck") -> Tensor:
    o = F.gelu(conv(state, f"{name}.in_conv.0", x))
    a = conv(state, f"{name}.fac_conv", o.mean((2, 3), keepdim=True))
    f = torch.fft.ifft2(a * torch.fft.fft2(o)).abs()
    g = conv(state, f"{name}.conv", f.mean((2, 3), keepdim=True)) * f
    d = o.shape[1]
    square, wide, tall = o.split([d // 2, d // 4, d // 4], 1)
    large = [
        conv(state, f"{name}.dw_33", square, groups=d // 2),
        conv(state, f"{name}.dw_13", wide, groups=d // 4),
        conv(state, f"{name}.dw_31", tall, groups=d // 4),
    ]
    total = x + torch.cat(large, 1) + conv(state, f"{name}.dw_11", o, groups=d) + fgm(state, g, f"{name}.fgm")
    return conv(state, f"{name}.out_conv", total.relu())


def fgm(state: dict, g: Tensor, name: str) -> Tensor:
    p, q = conv(state, f"{name}.dwconv1", g), conv(state, f"{name}.dwconv2", g)
    return state[f"{name}.alpha"] * torch.fft.ifft2(p * torch.fft.fft2(q)).abs() + state[f"{name}.beta"] * g


def fusion(state: dict, name: str, fine: Tensor, coarse: Tensor, border: str) -> tuple[Tensor, Tensor]:
    m = conv(state, f"{name}.hr_channel_compressor", fine)
    m = m + F.interpolate(conv(state, f"{name}.lr_channel_compressor", coarse), scale_factor=2)
    low = kernels(conv(state, f"{name}.content_encoder", m), state[f"{name}.hamming_lowpass"])
    high = kernels(conv(state, f"{name}.content_encoder2", m), state[f"{name}.hamming_highpass"])
    up = F.interpolate(coarse, scale_factor=2)
    return fine - carafe(fine, high, border), carafe(up, low, border) + up


def kernels(x: Tensor, window: Tensor) -> Tensor:
    x = x.softmax(1) * window.flatten().view(1, -1, 1, 1)
    return x / x.sum(1, keepdim=True)


def carafe(x: Tensor, kernels: Tensor, border: str) -> Tensor:
    """Each pixel's own weighted sum of its k x k neighbourhood: x (N,C,H,W), kernels (N,k*k,H,W)."""
    n, channels, height, width = x.shape
    side = round(kernels.shape[1] ** 0.5)
    padded = F.pad(x, (side // 2,) * 4, mode="constant" if border == "zero" else border)
    windows = F.unfold(padded, side).view(n, channels, side**2, height, width)
    return (windows * kernels.unsqueeze(1)).sum(2)
