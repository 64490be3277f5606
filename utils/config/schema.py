"""Sections of configs.yml that all methods share: types and ranges of the settings, without defaults."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from utils.config.convert import Count, CountOrZero, Ends, Fraction, Interval, Range, Rate, Weight, check_interval
from utils.errors import UserError


@dataclass
class Data:
    hazy: str | None
    clear: str | None
    depth: str | None
    pairs: list[str]
    root: str
    validation_pairs: list[str]
    validation_hazy: str | None
    validation_clear: str | None
    crop: Literal["short_side", "random", "view"]
    crop_size: Annotated[int, Range(16)] | tuple[Annotated[int, Range(16)], Annotated[int, Range(16)]]
    view: Annotated[Interval, Ends(0.05, 1)]
    flip: bool
    border: CountOrZero
    short_side: CountOrZero
    workers: CountOrZero
    cache: Annotated[float, Range(0)]

    @property
    def crop_shape(self) -> tuple[int, int]:
        """(height, width) of the crops; one number is a square."""
        return self.crop_size if isinstance(self.crop_size, tuple) else (self.crop_size, self.crop_size)


@dataclass
class Sometimes:
    """A change applied with a probability, by a value drawn uniformly from a range."""

    probability: Fraction
    range: Annotated[Interval, Ends(0.1, 10)]


@dataclass
class OutdoorDepth:
    """The fractions of synthetic outdoor depth maps that are not a ground plane, by type."""

    patches: Fraction
    dark_channel: Fraction
    noise: Fraction

    def __post_init__(self):
        if self.patches + self.dark_channel + self.noise > 1:
            raise UserError("haze.outdoor: the sum of the fractions is more than 1; lower one of them")


@dataclass
class Warp:
    """A change of given depth maps, applied with a probability: a power, and smooth noise of a strength."""

    probability: Fraction
    power: Annotated[Interval, Ends(0.1, 10)]
    noise: Annotated[Interval, Ends(0, 2)]


@dataclass
class Haze:
    """The distributions that `data.synthesis.random_haze` draws from."""

    density: Interval
    airlight: Annotated[Interval, Ends(0, 2)]
    colour: Fraction
    colour_probability: Fraction
    colours_of: str | None
    gamma: Sometimes
    gains: Sometimes
    light: Sometimes
    noise: Annotated[float, Range(0, 255)]
    depth: Literal["smooth", "outdoor"]
    outdoor: OutdoorDepth
    warp: Warp
    mix: Fraction

    def __post_init__(self):
        check_interval("haze.density", self.density)


@dataclass
class Illumination:
    probability: Fraction
    factor: Annotated[Interval, Ends(0, 1)]
    gamma: Annotated[Interval, Ends(0.1, 10)]


@dataclass
class Colour:
    probability: Fraction
    warmth: Annotated[Interval, Ends(-1, 1)]
    green: Annotated[Interval, Ends(-1, 1)]


@dataclass
class Scattering:
    probability: Fraction
    density: Annotated[Interval, Ends(0, 100)]


@dataclass
class SecondScattering:
    probability: Fraction
    transmission: Annotated[Interval, Ends(0, 1)]


@dataclass
class Blur:
    probability: Fraction
    sigma: Annotated[Interval, Ends(0.1, 50)]


@dataclass
class Noise:
    probability: Fraction
    shot: Annotated[Interval, Ends(0, 1)]
    read: Annotated[Interval, Ends(0, 1)]


@dataclass
class Jpeg:
    probability: Fraction
    quality: Annotated[tuple[int, int], Ends(1, 100)]


@dataclass
class Degradations:
    """The distributions that `data.degradations.degrade` draws from, in the order in which it applies them."""

    airlight: Annotated[Interval, Ends(0, 1)]
    illumination: Illumination
    colour: Colour
    haze: Scattering
    second_scattering: SecondScattering
    blur: Blur
    noise: Noise
    jpeg: Jpeg


@dataclass
class Train:
    init: str | None
    steps: CountOrZero
    batch: Count
    accumulate: Count
    schedule: Literal["constant", "multistep", "cosine", "epoch_cosine"]
    milestones: list[Annotated[float, Range(above=0)]]
    gamma: Rate
    floor: Fraction
    warm_up: CountOrZero
    cool_down: CountOrZero
    clip: Weight
    nonfinite: Count
    ema: Annotated[float, Range(0, 0.999999)]
    recalibrate: CountOrZero
    checkpointing: bool
    sync_batchnorm: bool
    export: Literal["float32", "float16"]


@dataclass
class WarmStart:
    steps: CountOrZero
    clear: str | None
    depth: str | None
    outdoor: str | None
    outdoor_share: Fraction
    replay: bool
    batch: Count
    learning_rate: Rate
    weight_decay: Weight
    schedule: Literal["constant", "cosine"]
    floor: Fraction
    warm_up: CountOrZero
    cool_down: CountOrZero
    clip: Weight


@dataclass
class Log:
    every: Count
    pictures_every: CountOrZero
    validate_every: CountOrZero
    validation_limit: CountOrZero
    save_every: Count


@dataclass
class Test:
    hazy: list[str]
    clear: list[str]
    output: str | None
    weights: list[str]
    benchmarks: list[str]
    data_root: str
    protocols: list[str]
    metrics: list[str]
    ema: bool
    self_ensemble: bool
    tile: Literal["auto"] | CountOrZero
    pictures: bool
    panels: bool
    format: Literal["auto", "png", "jpg", "webp"]
    quality: Annotated[int, Range(1, 100)]
    suffix: str | None
    strength: Annotated[float, Range(0, 4)]
    show: Literal["dehazed", "side_by_side", "transmission"]
    overwrite: bool
    temporal: bool
    smoothing: Annotated[float, Range(0, 60)]
    every: Count


@dataclass
class Settings:
    """All settings of a run. ``method`` is the block of configs.yml named by ``model``."""

    model: str
    seed: CountOrZero
    device: str
    precision: Literal["float32", "tf32", "bf16", "fp16"]
    compile: bool
    deterministic: bool
    data: Data
    haze: Haze
    degradations: Degradations
    train: Train
    warm_start: WarmStart
    log: Log
    test: Test
    method: Any
