"""The 70x70 PatchGAN discriminator (Isola et al., 1611.07004), spectrally normalised (Miyato et al., 1802.05957)."""

from torch import Tensor, nn
from torch.nn.utils import spectral_norm


class Discriminator(nn.Module):
    """Is a patch real? (N,3,H,W) in [0,1] -> logits (N,1,H/8-2,W/8-2); H and W at least 24.

    The released network ends in a sigmoid; here that belongs to the adversarial loss.
    """

    def __init__(self):
        super().__init__()
        widths, strides = [3, 64, 128, 256, 512, 1], [2, 2, 2, 1, 1]
        self.convs = nn.ModuleList(
            spectral_norm(nn.Conv2d(a, b, 4, stride, 1, bias=False))
            for a, b, stride in zip(widths[:-1], widths[1:], strides, strict=True)
        )
        self.activation = nn.LeakyReLU(0.2)

    def forward(self, image: Tensor) -> Tensor:
        x = image
        for conv in self.convs[:-1]:
            x = self.activation(conv(x))
        return self.convs[-1](x)
