"""Settings of NeDR and D4: their types and ranges, and checks of their combinations."""

from dataclasses import dataclass
from typing import Annotated, Literal

from models.pyramid import STRIDE
from utils.config import Ends, Interval, Range, Rate, Weight, check_interval
from utils.errors import UserError


@dataclass
class Perceptual:
    network: Literal["vgg16", "vgg19", "efficientnet_lite0"]
    layers: list[str]
    weights: str


@dataclass
class DarkChannelEnergy:
    fidelity: Weight
    omega: Annotated[float, Range(0, 1)]
    size: Annotated[int, Range(1, 255)]


@dataclass
class NeDRSettings:
    block = "nedr"  # of configs.yml

    variant: Literal["published", "released"]
    kan_cid: bool
    idrm: bool
    drem: bool
    base_channels: Annotated[int, Range(8, 512)]
    idrm_hidden: Annotated[int, Range(1, 4096)]
    drem_growth: Annotated[int, Range(1, 1024)]
    encoder: str
    encoder_weights: str
    encoder_rate: Weight
    working_size: Annotated[int, Range(0, 2048)]
    query: Literal[1, 2, 4]
    guided_radius: Annotated[int, Range(0, 100)]
    transmission_range: Interval
    airlight: Literal["max", "dark_channel", "learned"]
    airlight_head: Literal["pooled", "statistics"]
    airlight_bounds: Annotated[Interval, Ends(0, 2)]
    guided_filter: bool
    balance: Literal["none", "image"]
    density_range: Interval
    depth_range: Interval
    airlight_range: Interval
    learning_rate: Rate
    betas: tuple[float, float]
    discriminator_rate: Weight
    gan: Literal["lsgan", "vanilla", "hinge"]
    gan_weight: Weight
    cycle_weight: Weight
    density_weight: Weight
    depth_weight: Weight
    airlight_weight: Weight
    found_airlight_weight: Weight
    psnr_weight: Weight
    scales: list[Annotated[float, Range(above=0, high=4)]]
    perceptual_weight: Weight
    perceptual: Perceptual
    dark_channel_weight: Weight
    tv_weight: Weight
    identity_weight: Weight
    dark_channel_energy_weight: Weight
    dark_channel_energy: DarkChannelEnergy
    frozen_statistics: bool
    trained: Literal["all", "weights", "airlight"]

    @property
    def cycles(self) -> bool:
        """Does any loss with a weight need synthetic or rehazed images?"""
        weights = (self.gan_weight, self.cycle_weight, self.density_weight, self.perceptual_weight, self.depth_weight)
        return any(weights) or (self.airlight == "learned" and self.airlight_weight > 0)

    @property
    def trains_generators(self) -> bool:
        """Does adversarial training have a loss for the generators? The other terms only regularise."""
        terms = (self.gan_weight, self.cycle_weight, self.density_weight, self.identity_weight)
        return any((*terms, self.dark_channel_energy_weight))

    def __post_init__(self):
        check_interval(f"{self.block}.density_range", self.density_range, low=1e-3)
        check_interval(f"{self.block}.depth_range", self.depth_range)
        check_interval(f"{self.block}.airlight_range", self.airlight_range, high=1)
        check_interval(f"{self.block}.transmission_range", self.transmission_range, low=1e-3, high=1)
        check_interval(f"{self.block}.betas", self.betas, high=0.999999)
        if self.base_channels % 4:
            raise UserError(
                f"{self.block}.base_channels={self.base_channels}: must be a multiple of 4 (64 as published)"
            )
        if 0 < self.working_size < STRIDE:
            raise UserError(
                f"{self.block}.working_size={self.working_size}: too few pixels; set 0 (full size), or {STRIDE} or "
                f"more (160 to 256 work well)"
            )
        if self.query > 1 and not self.idrm:
            raise UserError(f"{self.block}.query={self.query}: only IDRM is asked at other sizes, and it is off; set 1")
        if not self.scales:
            raise UserError(f"{self.block}.scales=[]: name at least one, as [1.0]")
        if self.dark_channel_energy.size % 2 == 0:
            raise UserError(
                f"{self.block}.dark_channel_energy.size={self.dark_channel_energy.size}: a window needs a central "
                f"pixel; set an odd number, such as 15"
            )
        if self.variant == "released" and self.airlight == "learned":
            raise UserError(
                f"{self.block}.airlight=learned: the released variant has no airlight head; set max or dark_channel"
            )


def minimum_side(settings: NeDRSettings) -> int:
    """The smallest side of an image: KAN-CID pads by 3 at 1/32, so it needs 4 pixels there; residual units need 2."""
    return 4 * STRIDE if settings.kan_cid else 2 * STRIDE
