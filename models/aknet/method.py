"""AKNet: supervised training on pairs, with L1 at three scales in space and in frequency (as in the released code)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor
from torch.optim import Adam, Optimizer

from losses.frequency import frequency_loss, scaled
from models.aknet import official
from models.aknet.network import AKNetNetwork
from models.method import About, Loss, Method
from utils import config
from utils.checkpoint import load_strict
from utils.config import Interval, Range, Rate, Weight, check_interval
from utils.errors import UserError

SCALES = (0.25, 0.5, 1)  # of the network's outputs, in their order


@dataclass
class AKNetSettings:
    width: Annotated[int, Range(8, 512)]
    border: Literal["zero", "reflect"]
    learning_rate: Rate
    betas: Interval
    frequency_weight: Weight

    def __post_init__(self):
        check_interval("aknet.betas", self.betas, high=0.999999)
        if self.width % 4:
            raise UserError(f"aknet.width={self.width}: must be a multiple of 4 (32 as published)")


class AKNet(Method):
    """AKNet, one network trained on pairs of images.

    Its frequency gate depends on the size of the image (`models.aknet.network.FGM`): trained on crops, it is a
    different operator at full size. It is published so and tested on whole images; in tiles the results differ.
    """

    about = About(
        "AKNet (HKNet), a network with large kernels, frequency gates and frequency-aware fusion",
        "code: github.com/PoetryLin/AKNet; of the family of OKNet, Cui, Ren and Knoll, AAAI 2024",
        "pairs: RESIDE's ITS or OTS, or another set of hazy and clear images",
    )
    Settings = AKNetSettings
    multiple = 4
    minimum = 8
    test_time = ("border",)
    inference = ("network",)
    averaged = ("network",)
    stages: ClassVar[dict[str, str]] = {"train": "paired"}

    def __init__(self, settings: AKNetSettings):
        super().__init__(settings)
        self.network = AKNetNetwork(settings.width)

    @classmethod
    def check(cls, settings: config.Settings) -> None:
        for size in settings.data.crop_shape:
            if size % cls.multiple:
                raise UserError(f"data.crop_size={size}: aknet needs a multiple of {cls.multiple}")

    @classmethod
    def recognises(cls, state: dict) -> bool:
        return official.recognise(state)

    @classmethod
    def from_official(cls, state: dict, settings: AKNetSettings) -> "AKNet | None":
        """A released AKNet file; ``settings`` supplies the border rule, which such files do not record."""
        if not cls.recognises(state):
            return None
        settings.width = official.WIDTH
        method = cls(settings)
        weights, method.skipped = official.translate(state)
        load_strict(method.network, weights, "the official AKNet file")
        return method

    def to_official(self) -> dict[str, Any]:
        if self.settings.width != official.WIDTH:
            raise UserError(
                f"aknet.width={self.settings.width}: the released network is {official.WIDTH} wide; train with that"
            )
        return {"model": official.export(self.network.state_dict())}

    def optimisers(self, stage: str, settings: config.Settings) -> dict[str, Optimizer]:
        s = self.settings
        return {"network": Adam(self.network.parameters(), lr=s.learning_rate, betas=s.betas, eps=1e-8, fused=True)}

    def losses(self, batch: dict[str, Tensor], stage: str) -> Iterator[Loss]:
        """L1 of the images and of their spectra, both at three scales."""
        weight = self.settings.frequency_weight
        restored = self.network(batch["hazy"], self.settings.border)
        pairs = list(zip(restored, scaled(batch["clear"], SCALES), strict=True))
        terms = {"content": sum(F.l1_loss(a, b) for a, b in pairs)}
        total = terms["content"]
        if weight:
            terms["frequency"] = sum(frequency_loss(a, b) for a, b in pairs)
            total = total + weight * terms["frequency"]
        yield Loss("network", total, terms)

    def restore(self, hazy: Tensor) -> Tensor:
        return self.network(hazy, self.settings.border)[-1].clamp(0, 1)
