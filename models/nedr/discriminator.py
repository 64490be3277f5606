"""The 70x70 PatchGAN discriminator (Isola et al., 1611.07004), spectrally normalised (Miyato et al., 1802.05957)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import channels_last, single


class SpectralConv(nn.Module):
    """A 4x4 convolution without bias, padding 1, and the divisor that gives its weight a spectral norm of 1.

    Names and numbers are those of torch.nn.utils.spectral_norm with one power iteration at each pass.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.stride = stride
        self.weight_orig = nn.Parameter(torch.empty(out_channels, in_channels, 4, 4))
        nn.init.kaiming_uniform_(self.weight_orig, a=math.sqrt(5))  # nn.Conv2d's
        self.register_buffer("weight_u", F.normalize(torch.randn(out_channels), dim=0))
        self.register_buffer("weight_v", F.normalize(torch.randn(in_channels * 16), dim=0))

    @torch.compiler.disable  # compiled, it would recompute u from its buffer after that was updated
    def sigma(self) -> Tensor:
        """The estimate of the weight's spectral norm, a scalar with a gradient; training runs one power iteration."""
        with torch.autocast(self.weight_orig.device.type, enabled=False):
            weight = self.weight_orig.permute(0, 2, 3, 1).flatten(1)
            u = self.weight_u.clone()
            v = self.weight_v.view(-1, 4, 4).permute(1, 2, 0).flatten()  # in the weight's order in memory
            if self.training:
                with torch.no_grad():
                    v = F.normalize(weight.T @ u, dim=0)
                    u = F.normalize(weight @ v, dim=0)
                    self.weight_u.copy_(u)
                    self.weight_v.copy_(v.view(4, 4, -1).permute(2, 0, 1).flatten())
            return u @ (weight @ v)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        """The convolution with the weight divided by ``scale``."""
        return F.conv2d(x, self.weight_orig / scale, stride=self.stride, padding=1)


class Discriminator(nn.Module):
    """Is a patch real? (N,3,H,W) in [0,1] -> logits (N,1,H/8-2,W/8-2); H and W at least 24.

    Several batches of one shape are processed in one pass, with the results of one pass per batch: each runs the power
    iteration once, in the given order. There is no bias, and LeakyReLU(s x) = s LeakyReLU(x) for s > 0, so the pass
    uses the spectral norms of the first batch, and the logits of each other batch are corrected by one factor.
    (If all norms were divided out at the end, large weights would overflow in half precision.)

    The released network ends in a sigmoid; here the sigmoid is part of the adversarial loss.
    """

    def __init__(self):
        super().__init__()
        widths, strides = [3, 64, 128, 256, 512, 1], [2, 2, 2, 1, 1]
        shapes = zip(widths[:-1], widths[1:], strides, strict=True)
        self.convs = nn.ModuleList(SpectralConv(a, b, stride) for a, b, stride in shapes)

    def forward(self, *images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The logits of one batch, or a tuple of those of several."""
        sigmas = [[conv.sigma() for conv in self.convs] for _ in images]
        x = channels_last(torch.cat(images))
        for conv, sigma in zip(self.convs[:-1], sigmas[0][:-1], strict=True):
            x = F.leaky_relu(conv(x, sigma), 0.2, inplace=True)
        raw = single(self.convs[-1](x, sigmas[0][-1])).chunk(len(images))
        first = math.prod(sigmas[0])
        logits = tuple(part * (first / math.prod(norms)) for part, norms in zip(raw, sigmas, strict=True))
        return logits if len(images) > 1 else logits[0]
