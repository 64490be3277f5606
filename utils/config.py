"""Settings: typed dataclasses filled in layers, every value checked before anything is loaded.

The layers are configs.yml (every setting, its default and why, and the model's recipe), the experiment's own
config.yml and ``key=value`` from the command line, later ones winning. The dataclasses here and in the methods hold
types and ranges and no defaults, so that configs.yml is the one place where a default stands.

Where a setting is a text (a path, a name), what was written is taken as it stands: 2018, no and 12_30 are folders as
good as any. On the command line nothing in it is YAML, so that "# a: [b" is a name too.
"""

import contextlib
import dataclasses
import os
import re
import types
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml

from utils.errors import UserError, nearest

DEFAULTS = Path(__file__).resolve().parent.parent / "configs.yml"
TAG = "tag:yaml.org,2002:"
READ_OTHERWISE = {TAG + name for name in ("bool", "int", "float", "timestamp", "merge", "value")}  # by YAML, unquoted
NULL = ("~", "null", "Null", "NULL")
QUOTED = re.compile(r"""'([^']|'')*'|"([^"\\]|\\.)*\"""")  # as a whole

# key=value as typed; or, of a command's own options, the key and the value itself, which then no one has to quote.
Override = str | tuple[str, Any]


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
    overrides: Iterable[Override] = (),
    saved: Mapping | None = None,
    used: Collection[str] = (),
) -> Settings:
    """Fill `Settings` for ``model`` from configs.yml, ``saved`` (a checkpoint's), ``files`` and ``key=value`` texts.

    configs.yml also holds ``recipes``: what of the shared sections differs for a model. ``methods`` maps every
    method's name to its settings dataclass; all their blocks are checked, one is used, and ``overrides`` may change
    that alone, or those of ``used``. Files may hold blocks of several methods.
    Raises `UserError` for an unknown key, a wrong type or a value that cannot work, naming where it stands.
    """
    if model not in methods:
        raise UserError(f"unknown model '{model}'{nearest(model, methods)}")
    tree: dict = {}
    overrides, schema = list(overrides), _schema(methods)
    defaults = read_yaml(DEFAULTS, schema)
    recipe = defaults.pop("recipes", {}).get(model, {})
    layers = [(defaults, str(DEFAULTS)), (recipe, f"{DEFAULTS}, recipes.{model}")]
    if saved is not None:
        layers.append((saved, "the checkpoint"))
    for layer, source in (*layers, *_layers(files, overrides, schema)):
        _merge(tree, layer, schema, source, "")
    check_used(used or (model,), methods, overrides)
    values = {name: _value(tree, name, kind, "") for name, kind in schema.items() if name not in methods}
    blocks = {name: _value(tree, name, kind, "") for name, kind in methods.items()}
    return Settings(model=model, method=blocks[model], **values)


def given(methods: Mapping[str, type], files: Iterable[Path] = (), overrides: Iterable[Override] = ()) -> dict:
    """What ``files`` and ``overrides`` themselves say, as nested plain values, checked as by `load`."""
    tree, schema = {}, _schema(methods)
    for layer, source in _layers(files, overrides, schema):
        _merge(tree, layer, schema, source, "")
    return tree


def check_used(used: Collection[str], methods: Mapping[str, type], overrides: Iterable[Override]) -> None:
    """Refuse, of known ``overrides``, one of a method that is not ``used``: it would do nothing. Raises `UserError`."""
    for key, text in map(_key, overrides):
        block, _, rest = key.partition(".")
        if block in methods and block not in used:
            fitting = [name for name in used if _kind(methods[name], rest) is not None]
            remedy = (
                f"write {fitting[0]}.{rest}" if fitting else f"take it out: {' and '.join(used)} has no such setting"
            )
            raise UserError(f"'{text}': {block} is not in use here, {' and '.join(used)} is; {remedy}")


def section(name: str, overrides: Iterable[Override] = ()) -> Any:
    """One section of `Settings` by itself: configs.yml's, with ``key=value`` texts over it, keys as below the section.

    Raises `UserError` as `load` does.
    """
    schema = {name: get_type_hints(Settings, include_extras=True)[name]}
    tree: dict = {}
    _merge(tree, {name: read_yaml(DEFAULTS, schema)[name]}, schema, str(DEFAULTS), "")
    below = [f"{name}.{each}" if isinstance(each, str) else (f"{name}.{each[0]}", each[1]) for each in overrides]
    for layer, source in _layers((), below, schema):
        _merge(tree, layer, schema, source, "")
    return _value(tree, name, schema[name], "")


def to_dict(settings: Settings) -> dict:
    """The settings in force as plain YAML-ready values, the method's block under its own name."""
    tree = dataclasses.asdict(settings)
    tree[settings.model] = tree.pop("method")
    return _plain(tree)


def dump(settings: Settings) -> str:
    """The settings in force as YAML text."""
    return yaml.safe_dump(to_dict(settings), sort_keys=False, allow_unicode=True)


def read_yaml(path: Path, schema: Mapping[str, Any] | None = None) -> dict:
    """The mapping in a YAML file; {} for an empty one. Values that are texts by ``schema`` stay as they are written.

    Raises `UserError` if it cannot be read, if a key stands twice, or if a path lost its end to a comment.
    """
    try:
        tree = _parsed(path.read_text(encoding="utf-8"), schema, str(path))
    except FileNotFoundError:
        raise UserError(f"no settings file {path}; create it (it may be empty) or name another folder") from None
    except yaml.YAMLError as error:
        raise UserError(
            f"cannot read settings from {path}: {' '.join(str(error).split())}; mend that line (a text with signs of "
            f"YAML's in it, as [ or ': ', wants quotes)"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read settings from {path}: {error}; it must be a text file in UTF-8") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold 'key: value' lines, not a {type(tree).__name__}")
    return tree


def _parsed(text: str, kind: Any, source: str) -> Any:
    """``text`` as YAML, see `_as_written`. Raises YAMLError, and `UserError` for a key that stands twice."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_keys(node, source, "", set())
        return loader.construct_document(_as_written(node, kind, source))
    finally:
        loader.dispose()


def _check_keys(node: yaml.Node, source: str, prefix: str, seen: set[int]) -> None:
    """Refuse a key that stands twice in a mapping: YAML would forget the first. Merge keys (<<) may be several."""
    if id(node) in seen:  # an alias, perhaps of what it stands in
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_keys(item, source, prefix, seen)
    elif isinstance(node, yaml.MappingNode):
        lines = defaultdict(list)
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != f"{TAG}merge":
                lines[key.value].append(key.start_mark.line + 1)
            _check_keys(value, source, f"{prefix}{key.value}.", seen)
        for key, places in lines.items():
            if len(places) > 1:
                where = f"lines {', '.join(map(str, places[:-1]))} and {places[-1]}"
                raise UserError(
                    f"{source}: '{prefix}{key}' stands {len(places)} times, in {where}, and all but the last would be "
                    f"lost; make them one"
                )


def _as_written(node: yaml.Node, kind: Any, source: str) -> yaml.Node:
    """``node`` with a text wherever ``kind`` is one, though YAML would read a number, a date or a yes in it."""
    if isinstance(node, yaml.MappingNode):
        hints, pairs = _hints(kind), []
        for key, value in node.value:
            inner = kind if key.tag == f"{TAG}merge" else hints.get(key.value) if key.id == "scalar" else None
            pairs.append((key, _as_written(value, inner, source)))
        return yaml.MappingNode(node.tag, pairs, node.start_mark, node.end_mark) if hints else node
    if isinstance(node, yaml.SequenceNode):
        item = get_args(kind)[0] if get_origin(kind) is list else kind if _hints(kind) else None
        if item is None:
            return node
        items = [_as_written(each, item, source) for each in node.value]
        return yaml.SequenceNode(node.tag, items, node.start_mark, node.end_mark)
    if not _is_text(kind) or node.style is not None:  # quoted
        return node
    _check_whole(node, source)
    return yaml.ScalarNode(f"{TAG}str", node.value) if node.tag in READ_OTHERWISE else node


def _check_whole(node: yaml.ScalarNode, source: str) -> None:
    """Refuse a text that a comment has cut, as in ``hazy: # 1/hazy``, where what stands there is the path of a file."""
    mark = node.start_mark
    line = mark.buffer[mark.pointer :].partition("\n")[0].rstrip("\0").strip()
    if "#" in line and line != node.value and os.path.exists(os.path.expanduser(line)):
        raise UserError(
            f"{source}, line {mark.line + 1}: YAML takes all from # on for a comment, but there is a path '{line}'; "
            f"put it in quotes"
        )


def _is_text(kind: Any) -> bool:
    """Is that a text, a text or nothing, or a list of texts?"""
    several = get_origin(kind) in (list, Union, types.UnionType)
    return kind is str or (several and str in get_args(kind))


def _hints(kind: Any) -> Mapping[str, Any]:
    """The kinds of the settings in a section; none, if ``kind`` is not one."""
    if dataclasses.is_dataclass(kind):
        return get_type_hints(kind, include_extras=True)
    return kind if isinstance(kind, Mapping) else {}


def _kind(section: Any, key: str) -> Any:
    """The kind of the setting ``key`` (a.b.c) in ``section``; None if there is no such."""
    for part in key.split("."):
        section = _hints(section).get(part)
    return section


def _schema(methods: Mapping[str, type]) -> dict[str, Any]:
    hints = get_type_hints(Settings, include_extras=True)
    return {name: kind for name, kind in hints.items() if name not in ("model", "method")} | dict(methods)


def _layers(
    files: Iterable[Path], overrides: Iterable[Override], schema: Mapping[str, Any]
) -> Iterator[tuple[dict, str]]:
    """What ``files`` and ``overrides`` say, as nested values, with the words for where it stands."""
    for path in files:
        yield read_yaml(path, schema), str(path)
    for each in overrides:
        key, text = _key(each)
        tree = _typed(text, _kind(schema, key)) if isinstance(each, str) else each[1]
        for part in reversed(key.split(".")):
            tree = {part: tree}
        yield tree, f"'{text}'"


def _key(override: Override) -> tuple[str, str]:
    """The key of an override, and all of it as a text."""
    if not isinstance(override, str):
        return override[0], f"{override[0]}={override[1]}"
    key, sign, _ = override.partition("=")
    if not sign or not key.strip():
        raise UserError(
            f"cannot understand '{override}'; settings on the command line read key=value, as train.batch=4"
        )
    return key.strip(), override


def _typed(assignment: str, kind: Any) -> Any:
    """The value in ``key=value`` as typed: a text as it stands; all else, and a list in brackets, as YAML has it.

    A text that is in quotes as a whole loses them, so that "null" can be a name where null is nothing.
    """
    value = assignment.partition("=")[2]
    try:
        if _is_text(kind):
            return _text(value, kind, f"'{assignment}'")
        if "#" in value and not _hints(kind):
            raise UserError(f"cannot understand the value in '{assignment}': a # begins no comment here; take it out")
        return _parsed(value, kind, f"'{assignment}'")
    except yaml.YAMLError:
        raise UserError(
            f"cannot understand the value in '{assignment}'; write it as in a config.yml, names in a list with signs "
            f"of YAML's in quotes"
        ) from None


def _text(value: str, kind: Any, source: str) -> Any:
    """What ``value`` says where a text, nothing or a list of texts is wanted."""
    bare, several = value.strip(), get_origin(kind) is list
    if not bare or (bare in NULL and kind is not str):
        return None
    if several and bare[0] + bare[-1] == "[]" and yaml.compose(bare).end_mark.index == len(bare):  # no comment after it
        return _parsed(bare, kind, source)
    if QUOTED.fullmatch(bare):
        with contextlib.suppress(yaml.YAMLError):  # a backslash before what it cannot stand before
            return yaml.safe_load(bare)
    return value


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
    if value in (None, "") and type(None) in kinds:  # an empty text would be taken for the folder where one stands
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
    if kind is str and isinstance(value, str) and value:
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
    if kind is str and value in (None, ""):
        raise UserError(f"{path} is empty: needs text")
    quotes = "; put it in quotes" if kind is str else ""
    raise UserError(f"{path}={value!r}: needs {words[kind]}{quotes}")


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
