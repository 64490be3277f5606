"""KA-Net (Feng et al., "Advancing Real-World Image Dehazing: Perspective, Modules, and Training", TPAMI 2024).

Provenance: the network is that of the released code, number for number. The training code was never released. The
paper's abstract names its parts: haze synthesised with several degradations at once, samples weighted so that their
features become independent, a Gaussian perceptual contrastive loss. Everything beyond these names - formulas, weights,
learning rates, and so `losses` - is a reconstruction, after the same first author's other published code (CGID,
TCSVT 2024; C4RSD, TIP 2025) and StableNet (CVPR 2021). Models trained with it do not reproduce the paper's figures.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.optim import Adam, Optimizer

from losses import sample_weights
from losses.contrastive import GaussianContrastive
from losses.sample_weights import Decorrelation, Positive
from models.kanet import official
from models.kanet.network import MINIMUM, MULTIPLE, KANetwork, check_width, initialise
from models.method import About, Loss, Method
from utils import config
from utils.config import Count, Interval, Rate, Weight, check_interval
from utils.errors import UserError


@dataclass
class Contrastive:
    weights: str
    sigma: Positive


@dataclass
class KANetSettings:
    width: Count
    random_features: Literal["fixed", "resampled"]
    learning_rate: Rate
    betas: Interval
    sample_weights: Decorrelation
    contrastive_weight: Weight
    contrastive: Contrastive

    def __post_init__(self):
        check_interval("kanet.betas", self.betas, high=0.999999)
        check_width(self.width)


class KANet(Method):
    """KA-Net, one network trained on pairs whose hazy images are synthesised from clear ones with several degradations.

    Images are padded by reflection to a multiple of 64, where the network's maps need no cropping, and cropped back;
    the released test script instead cuts off up to 15 pixels a side. An inference file needs ``network`` alone.
    """

    about = About(
        "Advancing Real-World Image Dehazing: Perspective, Modules, and Training",
        "Feng, Ma, Meng, Zhou, Liu and Su, TPAMI 46(12), 9303-9320, 2024",
        "clear images, made hazy with several degradations (ours; none is released)",
    )
    Settings = KANetSettings
    multiple = 64
    minimum = 64
    test_time = ("random_features",)
    inference = ("network",)
    averaged = ("network",)
    stages: ClassVar[dict[str, str]] = {"train": "degraded"}

    def __init__(self, settings: KANetSettings):
        super().__init__(settings)
        self.network = KANetwork(settings.width)
        self.sample_weights = sample_weights.make(settings.sample_weights, 8 * settings.width)
        self.contrastive_loss: list[GaussianContrastive] = []  # in a list, so that its weights are not the method's
        self.accept(settings)

    @classmethod
    def check(cls, settings: config.Settings) -> None:
        for size in settings.data.crop_shape:
            if size % MULTIPLE or size < MINIMUM:
                raise UserError(
                    f"data.crop_size={size}: kanet needs a multiple of {MULTIPLE}, at least {MINIMUM}; best one of 64"
                )

    @classmethod
    def recognises(cls, state: dict) -> bool:
        return official.recognise(state)

    @classmethod
    def from_official(cls, state: dict, settings: KANetSettings) -> "KANet | None":
        """A released KA-Net file. It does not hold the random features: they are those of our fixed seed."""
        if not cls.recognises(state):
            return None
        settings.width = official.width(state)
        method = cls(settings)
        del method.sample_weights
        method.skipped = official.load(method.network, state)
        return method

    def to_official(self) -> dict[str, Any]:
        return official.export(self.network)

    def accept(self, settings: KANetSettings) -> None:
        super().accept(settings)
        self.network.removal.remove.random.resampled = settings.random_features == "resampled"

    def start(self) -> None:
        """The released initialisation; no pre-training is documented."""
        initialise(self.network)
        if self.settings.contrastive_weight:
            self._get_contrastive_loss()  # fails now, not in the first step, if its weights are unavailable

    def optimisers(self, stage: str, settings: config.Settings) -> dict[str, Optimizer]:
        s = self.settings
        return {"network": Adam(self.network.parameters(), lr=s.learning_rate, betas=s.betas, fused=True)}

    def losses(self, batch: dict[str, Tensor], stage: str) -> Iterator[Loss]:
        """Each sample's L1, weighted so that the deepest features become independent, and the contrastive loss.

        The prediction is neither scaled nor clamped, as in the same author's released training code: the L1 corrects
        outputs of the tanh below 0.
        """
        hazy, clear = batch["hazy"], batch["clear"]
        predicted, z = self.network(hazy)
        weights = self.sample_weights(z.detach())
        terms = {"reconstruction": (weights * (predicted - clear).abs().mean((1, 2, 3))).sum()}
        total = terms["reconstruction"]
        if self.settings.contrastive_weight:
            terms["contrastive"] = self._get_contrastive_loss().to(hazy.device)(predicted, clear, hazy)
            total = total + self.settings.contrastive_weight * terms["contrastive"]
        yield Loss("network", total, terms)

    def restore(self, hazy: Tensor) -> Tensor:
        return self.network(hazy)[0].clamp(0, 1)

    def _get_contrastive_loss(self) -> GaussianContrastive:
        """The contrastive loss, created on first use: a resumed run does not call `start`."""
        if not self.contrastive_loss:
            c = self.settings.contrastive
            self.contrastive_loss = [GaussianContrastive(c.weights, c.sigma, key="kanet.contrastive")]
        return self.contrastive_loss[0]
