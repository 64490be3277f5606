"""KAN-CID: channel mixing by Kolmogorov-Arnold layers (NeDR, arXiv 2511.13110; KAN, arXiv 2404.19756).

A KAN layer puts a learned one-dimensional function on every edge: y_o = sum_i f_oi(x_i), where
f_oi(x) = w_oi SiLU(x) + s_oi sum_b c_oib B_b(x) and the B_b are cubic B-splines on a uniform grid.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import ReflectConv, single

ORDER = 3  # cubic splines
INTERVALS = 5  # of the grid on [-1, 1]
STEP = 2 / INTERVALS
BASES = INTERVALS + ORDER
CENTRES = tuple(-1 + STEP * (b - 1) for b in range(BASES))  # the support of basis b is CENTRES[b] +- 2 STEP


def knots() -> Tensor:
    """The extended uniform grid (12,), from -2.2 to 2.2; official files hold it in ``grid`` for every input."""
    return torch.arange(-ORDER, INTERVALS + ORDER + 1, dtype=torch.float32) * STEP - 1


def bspline_bases(x: Tensor) -> Tensor:
    """The eight cubic B-spline bases of every value: (N,C,...) -> (N,8C,...), basis-major, at least float32.

    On a uniform grid each basis is the cardinal cubic B-spline of u = (x - centre) / step, whose closed form
    (max(2-|u|,0)^3 - 4 max(1-|u|,0)^3) / 6 needs no recursion. They sum to 1 on [-1,1] and vanish outside [-2.2,2.2].
    """
    x = single(x) / STEP
    u = torch.stack([(x - centre / STEP).abs() for centre in CENTRES], 1)
    outer, inner = (2 - u).clamp(min=0), (1 - u).clamp(min=0)
    return ((outer.pow(3) - 4 * inner.pow(3)) / 6).flatten(1, 2)


class _Activations(torch.autograd.Function):
    """SiLU and six times the bases of pixels (...,C): (...,9,C) in ``dtype``.

    The same as ``[silu(x), 6 bspline_bases(x)]``, computed one basis at a time in the processor's cache; only x is
    kept for the backward pass.
    """

    @staticmethod
    def forward(ctx, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x)
        x = single(x)
        out = x.new_empty(*x.shape[:-1], 1 + BASES, x.shape[-1], dtype=dtype)
        out[..., 0, :] = F.silu(x)
        for b, centre in enumerate(CENTRES, 1):
            _, outer, inner = _sides(x, centre)
            torch.sub(outer.pow_(3), inner.pow_(3), alpha=4, out=out[..., b, :])
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        dtype, x = x.dtype, single(x)
        total = torch.ops.aten.silu_backward(single(grad[..., 0, :]), x)
        for b, centre in enumerate(CENTRES, 1):
            u, outer, inner = _sides(x, centre)
            slope = torch.sub(inner.square_(), outer.square_(), alpha=0.25).mul_(u.sign_())
            total.addcmul_(slope, single(grad[..., b, :]), value=12 / STEP)
        return total.to(dtype), None


def _sides(x: Tensor, centre: float) -> tuple[Tensor, Tensor, Tensor]:
    """u = (x - centre) / step, max(2-|u|,0) and max(1-|u|,0)."""
    u = (x - centre).div_(STEP)
    outer = u.abs().neg_().add_(2).relu_()
    return u, outer, (outer - 1).relu_()


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
            fit = torch.linalg.lstsq(bases, noise, driver="gelsd").solution  # underdetermined: minimum norm
            self.spline_weight.copy_(fit.T.reshape(out_channels, in_channels, BASES))

    def forward(self, x: Tensor) -> Tensor:
        spline = (self.spline_weight * (self.spline_scaler / 6).unsqueeze(-1)).transpose(1, 2)
        weight = torch.cat([self.base_weight.unsqueeze(1), spline], 1).flatten(1)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        activations = _Activations.apply(x.permute(0, 2, 3, 1), dtype)
        return F.linear(activations.flatten(3), weight).permute(0, 3, 1, 2)


class KANCID(nn.Module):
    """KAN-CID: channel-independent 7x7 depthwise convolution, then channel-dependent KAN layers at every pixel.

    (N,C,H,W) -> (N,C,H,W), H and W at least 4 (reflection by 3). No residual connection.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.spatial = ReflectConv(channels, channels, 7, groups=channels)
        self.fc1 = KANLinear(channels, channels)
        self.fc2 = KANLinear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.spatial(x))))
