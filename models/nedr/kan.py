"""KAN-CID: channel mixing by Kolmogorov-Arnold layers (NeDR, arXiv 2511.13110; KAN, arXiv 2404.19756).

A KAN layer puts a learned one-dimensional function on every edge: y_o = sum_i f_oi(x_i), where
f_oi(x) = w_oi SiLU(x) + s_oi sum_b c_oib B_b(x) and the B_b are cubic B-splines on a uniform grid.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import ReflectConv, pointwise

ORDER = 3  # cubic splines
INTERVALS = 5  # of the grid on [-1, 1]
STEP = 2 / INTERVALS
BASES = INTERVALS + ORDER
CENTRES = tuple(-1 + STEP * (b - 1) for b in range(BASES))  # basis b lives on CENTRES[b] +- 2 STEP


def knots() -> Tensor:
    """The extended uniform grid (12,), from -2.2 to 2.2: what official files hold in ``grid`` for every input."""
    return torch.arange(-ORDER, INTERVALS + ORDER + 1, dtype=torch.float32) * STEP - 1


def bspline_bases(x: Tensor) -> Tensor:
    """The eight cubic B-spline bases of every value: (N,C,...) -> (N,8C,...), basis-major, float32.

    On a uniform grid each basis is the cardinal cubic B-spline of u = (x - centre) / step, whose closed form
    (max(2-|u|,0)^3 - 4 max(1-|u|,0)^3) / 6 needs no recursion. They sum to 1 on [-1,1] and vanish outside [-2.2,2.2].
    """
    return _Bases.apply(x)


class _Bases(torch.autograd.Function):
    """Keeps x alone for the backward pass, an eighth of what it gives."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        outer, inner = _sides(x)[1:]
        return outer.pow(3).sub_(inner.pow(3), alpha=4).div_(6).flatten(1, 2)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        u, outer, inner = _sides(x)
        slope = inner.square_().mul_(4).sub_(outer.square_()).mul_(u.sign_()).mul_(0.5 / STEP)
        return (grad.unflatten(1, (BASES, -1)) * slope).sum(1).to(x.dtype)


def _sides(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u, max(2-|u|,0) and max(1-|u|,0) of every value and basis, (N,8,C,...)."""
    centres = torch.tensor(CENTRES, device=x.device).view(-1, *[1] * (x.dim() - 1))
    u = (x.float().unsqueeze(1) - centres) / STEP
    far = u.abs()
    return u, (2 - far).clamp_(min=0), (1 - far).clamp_(min=0)


class KANLinear(nn.Module):
    """A KAN layer over the channel dimension: (N,in,H,W) -> (N,out,H,W).

    The SiLU branch and the eight bases are stacked as 9 in channels, so that the layer is one 1x1 convolution.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.base_weight = nn.Parameter(torch.empty(out_channels, in_channels))
        self.spline_weight = nn.Parameter(torch.empty(out_channels, in_channels, BASES))
        self.spline_scaler = nn.Parameter(torch.empty(out_channels, in_channels))
        nn.init.kaiming_uniform_(self.base_weight, a=math.sqrt(5))
        nn.init.kaiming_uniform_(self.spline_scaler, a=math.sqrt(5))
        with torch.no_grad():  # a least-squares fit of small noise at the grid points
            points = knots()[ORDER:-ORDER]
            bases = bspline_bases(points[:, None]).reshape(len(points), BASES)
            noise = (torch.rand(len(points), in_channels * out_channels) - 0.5) * 0.1 / INTERVALS
            fit = torch.linalg.lstsq(bases, noise, driver="gelsd").solution  # under-determined: minimum norm
            self.spline_weight.copy_(fit.T.reshape(out_channels, in_channels, BASES))

    def forward(self, x: Tensor) -> Tensor:
        spline = (self.spline_weight * self.spline_scaler.unsqueeze(-1)).transpose(1, 2).flatten(1)
        weight = torch.cat([self.base_weight, spline], 1)
        return pointwise(torch.cat([F.silu(x.float()), bspline_bases(x)], 1), weight)


class KANCID(nn.Module):
    """KAN-CID: channel-independent 7x7 depthwise convolution, then channel-dependent KAN layers at every pixel.

    (N,C,H,W) -> (N,C,H,W), H and W at least 4 (reflection by 3). No residual around it.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.spatial = ReflectConv(channels, channels, 7, groups=channels)
        self.fc1 = KANLinear(channels, channels)
        self.fc2 = KANLinear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.spatial(x))))
