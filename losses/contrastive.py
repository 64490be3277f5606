"""Contrastive loss on VGG features: pulls the dehazed image towards the clear one and away from the hazy one."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from losses.perceptual import VGGFeatures

LAYERS = {"relu1_1": 1 / 32, "relu2_1": 1 / 16, "relu3_1": 1 / 8, "relu4_1": 1 / 4, "relu5_1": 1.0}


class GaussianContrastive(nn.Module):
    """Gaussian perceptual contrastive loss: 0 if the prediction is the clear image, always below 1.47.

    Three (N,3,H,W) in [0,1] -> scalar, the mean over the images. A layer's term is d(pred, clear) / (d(clear, hazy)
    + d(pred, hazy) + d(pred, clear) + 1e-6), with d(a, b) = 1 - exp(-m^2 / (2 sigma^2)) and m the mean of |a - b| over
    the layer's map; ``layers`` gives VGG19's layers and the weights of their terms. Only the prediction gets gradients.

    KA-Net's abstract (TPAMI 2024) only names such a loss; this form is our reconstruction, after the code that its
    first author released with C4RSD (TIP 2025). That code feeds VGG images of different ranges, without ImageNet's
    normalisation; here all three have the same range and are normalised.

    ``weights`` and ``key`` as in `VGGFeatures`. A method must hold this loss in a list, or VGG is saved with it.
    """

    def __init__(
        self,
        weights: str = "hub",
        sigma: float = 0.5,
        layers: Mapping[str, float] = LAYERS,
        key: str = "kanet.contrastive",
    ):
        super().__init__()
        self.vgg = VGGFeatures("vgg19", layers, weights, key)
        self.sigma = sigma
        self.layers = dict(layers)

    def forward(self, pred: Tensor, clear: Tensor, hazy: Tensor) -> Tensor:
        with torch.no_grad():
            positive, negative = self.vgg(clear), self.vgg(hazy)
        maps = self.vgg(pred)
        return sum(w * self._term(maps[name], positive[name], negative[name]) for name, w in self.layers.items()).mean()

    def _term(self, pred: Tensor, clear: Tensor, hazy: Tensor) -> Tensor:
        """A layer's term of each image's loss, from three maps. -> (N,)"""
        error = self._distance(pred, clear)
        return error / (self._distance(clear, hazy) + self._distance(pred, hazy) + error + 1e-6)

    def _distance(self, a: Tensor, b: Tensor) -> Tensor:
        difference = (a.float() - b.float()).abs().mean((1, 2, 3))
        return -torch.expm1(-difference.square() / (2 * self.sigma**2))
