"""Settings: typed dataclasses filled in layers, every value checked before anything is loaded.

The layers are configs.yml (every setting, its default and why, and the model's recipe), the experiment's own
config.yml and ``key=value`` from the command line, later ones winning. The dataclasses here and in the methods hold
types and ranges and no defaults, so that configs.yml is the one place where a default stands.
"""

import dataclasses
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml

from utils.errors import UserError, nearest

DEFAULTS = Path(__file__).resolve().parent.parent / "configs.yml"


@dataclass(frozen=True)
class Range:
    """Bounds of a number, both included unless ``above`` (excluded lower bound) is given."""

    low: float | None = None
    high: float | None = None
    above: float | None = None

    def check(self, value: float) -> str | None:
        """Return what is wrong with ``value``, or None."""
        if self.low is not None and value < self.low:
            return f"must be at least {self.low}"
        if self.high is not None and value > self.high:
            return f"must be at most {self.high}"
        if self.above is not None and value <= self.above:
            return f"must be greater than {self.above}"
        return None


@dataclass(frozen=True)
class Ends:
    """Bounds of both ends of an interval, included."""

    low: float
    high: float

    def check(self, interval: tuple[float, float]) -> str | None:
        """Return what is wrong with ``interval``, or None."""
        if self.low <= interval[0] <= interval[1] <= self.high:
            return None
        return f"must be two increasing numbers in [{self.low:g}, {self.high:g}]"


Count = Annotated[int, Range(1)]
CountOrZero = Annotated[int, Range(0)]
Weight = Annotated[float, Range(0)]
Rate = Annotated[float, Range(above=0, high=1)]
Fraction = Annotated[float, Range(0, 1)]
Interval = tuple[float, float]


def check_interval(name: str, interval: Interval, low: float = 0.0, high: float = float("inf")) -> None:
    """Raise `UserError` unless ``low <= interval[0] <= interval[1] <= high``."""
    wrong = Ends(low, high).check(interval)
    if wrong:
        raise UserError(f"{name}={list(interval)}: {wrong}")


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
    """A change that happens with a probability, by a value uniform in a range."""

    probability: Fraction
    range: Annotated[Interval, Ends(0.1, 10)]


@dataclass
class Haze:
    """What `data.haze.random_haze` draws from."""

    density: Interval
    airlight: Annotated[Interval, Ends(0, 2)]
    colour: Fraction
    colour_probability: Fraction
    gamma: Sometimes
    gains: Sometimes
    light: Sometimes
    noise: Annotated[float, Range(0, 255)]
    depth: Literal["smooth", "outdoor"]

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
    """What `data.haze.degrade` draws from, in the order in which things happen."""

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
    hazy: str | None
    clear: str | None
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


@dataclass
class Settings:
    """Everything that a run can be told. ``method`` holds the block of configs.yml named by ``model``."""

    model: str
    seed: CountOrZero
    device: str
    precision: Literal["float32", "tf32", "bf16", "fp16"]
    compile: bool
    data: Data
    haze: Haze
    degradations: Degradations
    train: Train
    warm_start: WarmStart
    log: Log
    test: Test
    method: Any


class Stage(NamedTuple):
    """One stage of training: so many steps, each of ``accumulate`` batches of ``batch`` pictures.

    ``schedule``, ``floor``, ``warm_up`` and ``cool_down`` as of `updater.schedule`; ``clip``: largest gradient norm.
    """

    name: str
    steps: int
    batch: int
    accumulate: int
    schedule: str
    floor: float = 0.0
    warm_up: int = 0
    cool_down: int = 0
    clip: float = 0.0

    @property
    def per_step(self) -> int:
        return self.batch * self.accumulate


def stages(settings: Settings) -> list[Stage]:
    """The stages of a run that have steps, in order: the supervised warm start, then the method's own game."""
    warm, train = settings.warm_start, settings.train
    both = [
        Stage("warm_start", warm.steps, warm.batch, 1, *_course(warm)),
        Stage("train", train.steps, train.batch, train.accumulate, *_course(train)),
    ]
    if not any(stage.steps for stage in both):
        raise UserError("warm_start.steps and train.steps are both 0: there is nothing to train; set one of them")
    return [stage for stage in both if stage.steps]


def _course(section: Train | WarmStart) -> tuple:
    return section.schedule, section.floor, section.warm_up, section.cool_down, section.clip


def load(
    model: str,
    methods: Mapping[str, type],
    files: Iterable[Path] = (),
    overrides: Iterable[str] = (),
    saved: Mapping | None = None,
) -> Settings:
    """Fill `Settings` for ``model`` from configs.yml, ``saved`` (a checkpoint's), ``files`` and ``key=value`` texts.

    configs.yml also holds ``recipes``: what of the shared sections differs for a model. ``methods`` maps every
    method's name to its settings dataclass; all their blocks are checked, one is used.
    Raises `UserError` for an unknown key, a wrong type or a value that cannot work, naming where it stands.
    """
    if model not in methods:
        raise UserError(f"unknown model '{model}'{nearest(model, methods)}")
    tree: dict = {}
    defaults = read_yaml(DEFAULTS)
    recipe = defaults.pop("recipes", {}).get(model, {})
    layers = [(defaults, str(DEFAULTS)), (recipe, f"{DEFAULTS}, recipes.{model}")]
    if saved is not None:
        layers.append((saved, "the checkpoint"))
    layers += [(read_yaml(path), str(path)) for path in files]
    layers += [(_assignment(text), f"'{text}'") for text in overrides]
    schema = _schema(methods)
    for layer, source in layers:
        _merge(tree, layer, schema, source, "")
    values = {name: _value(tree, name, kind, "") for name, kind in schema.items() if name not in methods}
    blocks = {name: _value(tree, name, kind, "") for name, kind in methods.items()}
    return Settings(model=model, method=blocks[model], **values)


def given(methods: Mapping[str, type], files: Iterable[Path] = (), overrides: Iterable[str] = ()) -> dict:
    """What ``files`` and ``overrides`` themselves say, as nested plain values, checked as by `load`."""
    tree: dict = {}
    layers = [(read_yaml(path), str(path)) for path in files]
    layers += [(_assignment(text), f"'{text}'") for text in overrides]
    for layer, source in layers:
        _merge(tree, layer, _schema(methods), source, "")
    return tree


def section(name: str, overrides: Iterable[str] = ()) -> Any:
    """One section of `Settings` by itself: configs.yml's, with ``key=value`` texts over it, keys as below the section.

    Raises `UserError` as `load` does.
    """
    schema = {name: get_type_hints(Settings, include_extras=True)[name]}
    tree: dict = {}
    _merge(tree, {name: read_yaml(DEFAULTS)[name]}, schema, str(DEFAULTS), "")
    for text in overrides:
        _merge(tree, _assignment(f"{name}.{text}"), schema, f"'{text}'", "")
    return _value(tree, name, schema[name], "")


def to_dict(settings: Settings) -> dict:
    """The settings in force as plain YAML-ready values, the method's block under its own name."""
    tree = dataclasses.asdict(settings)
    tree[settings.model] = tree.pop("method")
    return _plain(tree)


def dump(settings: Settings) -> str:
    """The settings in force as YAML text."""
    return yaml.safe_dump(to_dict(settings), sort_keys=False, allow_unicode=True)


def read_yaml(path: Path) -> dict:
    """The mapping in a YAML file; {} for an empty one. Raises `UserError` if it cannot be read."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no settings file {path}; create it (it may be empty) or name another folder") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read settings from {path}: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold 'key: value' lines, not a {type(tree).__name__}")
    return tree


def _schema(methods: Mapping[str, type]) -> dict[str, Any]:
    hints = get_type_hints(Settings, include_extras=True)
    return {name: kind for name, kind in hints.items() if name not in ("model", "method")} | dict(methods)


def _assignment(text: str) -> dict:
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise UserError(f"cannot understand '{text}'; settings on the command line read key=value, as train.batch=4")
    try:
        tree: Any = yaml.safe_load(value) if value.strip() else None
    except yaml.YAMLError:
        raise UserError(f"cannot understand the value in '{text}'") from None
    for part in reversed(key.strip().split(".")):
        tree = {part: tree}
    return tree


def _merge(tree: dict, layer: Mapping, schema: Mapping[str, Any], source: str, prefix: str) -> None:
    """Lay ``layer`` over ``tree``, refusing keys that the schema does not know."""
    for key, value in layer.items():
        if key == "model" and not prefix:  # written by dump(); the command line's --model decides
            continue
        if key not in schema:
            raise UserError(f"{source}: unknown setting '{prefix}{key}'{nearest(str(key), schema)}")
        if dataclasses.is_dataclass(schema[key]):
            if not isinstance(value, Mapping):
                raise UserError(f"{source}: '{prefix}{key}' is a section and needs settings below it, got {value!r}")
            hints = get_type_hints(schema[key], include_extras=True)
            _merge(tree.setdefault(key, {}), value, hints, source, f"{prefix}{key}.")
        else:
            tree[key] = value
            convert(value, schema[key], f"{source}: {prefix}{key}")


def _value(tree: Mapping, name: str, kind: Any, prefix: str) -> Any:
    path = prefix + name
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind, include_extras=True)
        return kind(**{key: _value(tree.get(name, {}), key, hint, f"{path}.") for key, hint in hints.items()})
    if name not in tree:
        raise UserError(f"the setting '{path}' stands in no layer; configs.yml must give its default")
    return convert(tree[name], kind, path)


def convert(value: Any, kind: Any, path: str) -> Any:
    """``value`` as ``kind``; YAML reads 1e-4 as text, so numbers are converted by the field's type."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        value = convert(value, args[0], path)
        wrong = args[1].check(value)
        if wrong:
            raise UserError(f"{path}={value}: {wrong}")
        return value
    if origin in (Union, types.UnionType):
        return _either(value, args, path)
    if origin is Literal:
        if value not in args:
            raise UserError(f"{path}={value}: must be one of {', '.join(map(str, args))}{_hint(value, args)}")
        return value
    if origin is list:
        if value is None or (args[0] is str and isinstance(value, str)):  # none, or one alone
            value = [] if value is None else [value]
        return [convert(item, args[0], path) for item in _sequence(value, path)]
    if origin is tuple:
        items = _sequence(value, path)
        if len(items) != len(args):
            raise UserError(f"{path}={value}: needs {len(args)} values in brackets, got {len(items)}")
        return tuple(convert(item, arg, path) for item, arg in zip(items, args, strict=True))
    return _scalar(value, kind, path)


def _either(value: Any, kinds: tuple, path: str) -> Any:
    """``value`` as None or as one of some words, where ``kinds`` has these, else as the kind that remains.

    Of a number and several in brackets, the one that ``value`` looks like.
    """
    if value is None and type(None) in kinds:
        return None
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    if value in words:
        return value
    others = [kind for kind in kinds if kind is not type(None) and get_origin(kind) is not Literal]
    several = [kind for kind in others if get_origin(kind) is tuple]
    rest = several[0] if several and isinstance(value, list | tuple) else others[0]
    try:
        return convert(value, rest, path)
    except UserError as error:
        raise UserError(" or ".join([str(error), *words])) from None


def _scalar(value: Any, kind: type, path: str) -> Any:
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str):
        return value
    if kind is int and type(value) is int:  # not by way of float, which holds 53 bits
        return value
    if kind in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = float("nan")
        if kind is float and number == number and abs(number) != float("inf"):
            return number
        if kind is int and number.is_integer():
            return int(number)
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    raise UserError(f"{path}={value!r}: needs {words[kind]}")


def _sequence(value: Any, path: str) -> list:
    if not isinstance(value, list | tuple):
        raise UserError(f"{path}={value!r}: needs a list in brackets")
    return list(value)


def _hint(value: Any, choices: Iterable) -> str:
    hint = nearest(str(value), map(str, choices))
    return hint if "did you mean" in hint else ""


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
