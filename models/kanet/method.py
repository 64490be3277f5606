"""KA-Net (Feng et al., "Advancing Real-World Image Dehazing: Perspective, Modules, and Training", TPAMI 2024).

Where this comes from: the network is that of the released code, to the last number. The training was never released.
The paper's abstract names what is in it: haze made with several degradations at once, samples weighted so that their
features become independent, a Gaussian perceptual contrastive loss. Everything beyond these names - formulas, weights,
rates, and so what `losses` computes - is a reconstruction, after the same first author's other published code (CGID,
TCSVT 2024; C4RSD, TIP 2025) and StableNet (CVPR 2021). Figures trained by it are not the paper's.
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
    """KA-Net, one network trained on pairs whose hazy half is made from clear images with several degradations.

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
        self.ruler: list[GaussianContrastive] = []  # in a list: a loss is no part of the method's weights
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
        """A released KA-Net file. Its random features are not in it: they are those of our fixed seed."""
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
        """The released initialisation; no pre-training is known of."""
        initialise(self.network)
        if self.settings.contrastive_weight:
            self._contrastive()  # what cannot be had is refused now

    def optimisers(self, stage: str, settings: config.Settings) -> dict[str, Optimizer]:
        s = self.settings
        return {"network": Adam(self.network.parameters(), lr=s.learning_rate, betas=s.betas, fused=True)}

    def losses(self, batch: dict[str, Tensor], stage: str) -> Iterator[Loss]:
        """Each sample's L1, weighted so that the deepest features become independent, and the contrastive loss.

        The prediction is neither scaled nor clamped, as in the same author's released training code: what the tanh
        sends below 0 is pulled up by the L1.
        """
        weight, hazy, clear = self.settings.contrastive_weight, batch["hazy"], batch["clear"]
        predicted, z = self.network(hazy)
        shares = self.sample_weights(z.detach())
        terms = {"reconstruction": (shares * (predicted - clear).abs().mean((1, 2, 3))).sum()}
        total = terms["reconstruction"]
        if weight:
            terms["contrastive"] = self._contrastive().to(hazy.device)(predicted, clear, hazy)
            total = total + weight * terms["contrastive"]
        yield Loss("network", total, terms)

    def restore(self, hazy: Tensor) -> Tensor:
        return self.network(hazy)[0].clamp(0, 1)

    def _contrastive(self) -> GaussianContrastive:
        """The contrastive loss, made when it is first needed: a resumed run does not `start`."""
        if not self.ruler:
            c = self.settings.contrastive
            self.ruler = [GaussianContrastive(c.weights, c.sigma, key="kanet.contrastive")]
        return self.ruler[0]
