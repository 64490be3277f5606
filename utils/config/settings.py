"""Settings: typed dataclasses filled in layers, every value checked before anything is loaded.

The layers are configs.yml (every setting, its default and why, and the model's recipe), the experiment's config.yml and
``key=value`` from the command line; later ones override earlier ones. The dataclasses here and in the methods have
types and ranges but no defaults: configs.yml is the only place for a default.

The text of a string setting (a path, a name) is taken literally: 2018, no and 12_30 are valid folder names. On the
command line it is not YAML at all, so that "# a: [b" is a valid name, too.
"""

import contextlib
import copy
import dataclasses
import functools
import math
import os
import re
import types
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from utils.config.convert import convert
from utils.config.schema import Settings
from utils.errors import UserError, nearest, quoted

DEFAULTS = Path(__file__).resolve().parents[2] / "configs.yml"
TAG = "tag:yaml.org,2002:"
RETYPED_TAGS = {TAG + name for name in ("bool", "int", "float", "timestamp", "merge", "value")}  # of unquoted texts
NULL = ("~", "null", "Null", "NULL")
MAX_CHARACTERS = 2**16  # of a settings file; configs.yml has 17,000
MAX_VALUES = 20_000  # of a settings file, with aliases expanded
QUOTED_TEXT = re.compile(r"""'([^']|'')*'|"([^"\\]|\\.)*\"""")

# key=value as typed; or, from a command's own options, the key and the value itself, which needs no quoting.
Override = str | tuple[str, Any]


def load(
    model: str,
    methods: Mapping[str, type],
    files: Iterable[Path] = (),
    overrides: Iterable[Override] = (),
    saved: Mapping | None = None,
    used: Collection[str] = (),
) -> Settings:
    """Fill `Settings` for ``model`` from configs.yml, ``saved`` (a checkpoint's), ``files`` and ``key=value`` texts.

    configs.yml also has ``recipes``: overrides of the shared sections for a model. ``methods`` maps every method's name
    to its settings dataclass; all their blocks are checked, one is used, and ``overrides`` may change only that one, or
    those of ``used``. Files may have blocks of several methods.
    Raises `UserError` for an unknown key, a wrong type or an invalid value; the message names its source.
    """
    if model not in methods:
        raise UserError(f"unknown model '{quoted(model)}'{nearest(model, methods)}")
    tree: dict = {}
    overrides, schema = list(overrides), _schema(methods)
    defaults = _defaults(schema)
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
    """The settings in ``files`` and ``overrides`` only, as nested plain values, checked as by `load`."""
    tree, schema = {}, _schema(methods)
    for layer, source in _layers(files, overrides, schema):
        _merge(tree, layer, schema, source, "")
    return tree


def check_used(used: Collection[str], methods: Mapping[str, type], overrides: Iterable[Override]) -> None:
    """Refuse ``overrides`` of a method that is not ``used``: they would have no effect. Raises `UserError`."""
    for key, text in map(_split_key, overrides):
        block, _, rest = key.partition(".")
        if block in methods and block not in used:
            matches = [name for name in used if _setting_type(methods[name], rest) is not None]
            remedy = f"remove it: {' and '.join(used)} has no such setting"
            if matches:
                remedy = f"write {matches[0]}.{rest}"
            raise UserError(f"'{quoted(text)}': {block} is not in use here, {' and '.join(used)} is; {remedy}")


def section(name: str, overrides: Iterable[Override] = ()) -> Any:
    """One section of `Settings` by itself, from configs.yml and ``overrides`` with keys relative to the section.

    Raises `UserError` as `load` does.
    """
    schema = {name: get_type_hints(Settings, include_extras=True)[name]}
    tree: dict = {}
    _merge(tree, {name: _defaults(schema)[name]}, schema, str(DEFAULTS), "")
    full = [f"{name}.{each}" if isinstance(each, str) else (f"{name}.{each[0]}", each[1]) for each in overrides]
    for layer, source in _layers((), full, schema):
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
    """The mapping in a YAML file; {} for an empty one. Values that are strings by ``schema`` are taken literally.

    Raises `UserError` if it cannot be read, if a key occurs twice, or if a comment cuts off the end of a path.
    """
    try:
        if path.exists() and not path.is_file():  # reading a pipe would block
            raise UserError(f"cannot read settings from {path}: it is not a file")
        tree = _parse(path.read_text(encoding="utf-8"), schema, str(path))
    except FileNotFoundError:
        raise UserError(f"no settings file {path}; create it (it may be empty) or name another folder") from None
    except yaml.YAMLError as error:
        message = quoted(" ".join(str(error).split()), 300)
        raise UserError(
            f"cannot read settings from {path}: {message}; correct that line (a text with YAML syntax in it, such as [ "
            f"or ': ', needs quotes)"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read settings from {path}: {error}; it must be a text file in UTF-8") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold 'key: value' lines, not a {type(tree).__name__}")
    return tree


def _parse(text: str, kind: Any, source: str) -> Any:
    """The value of the YAML ``text``, see `_typed_node`. Raises YAMLError, and `UserError` as the checks it calls."""
    if len(text) > MAX_CHARACTERS:
        raise UserError(
            f"{quoted(source)}: {len(text):,} characters; settings have {MAX_CHARACTERS:,} at most: shorten them"
        )
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node, source)
        _check_keys(node, source, "", set())
        return loader.construct_document(_typed_node(node, kind, source))
    except (yaml.YAMLError, UserError):
        raise
    except RecursionError:
        raise yaml.YAMLError("brackets are nested too deeply") from None
    except (ValueError, OverflowError) as error:  # an invalid character code
        raise yaml.YAMLError(quoted(str(error))) from None
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    """Raises a ConstructorError with the position of a value that is invalid for its tag; PyYAML raises any type."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception:
            problem = f"'{quoted(node.value)}' is not a valid {node.tag.removeprefix(TAG)}"
            raise yaml.constructor.ConstructorError(problem=problem, problem_mark=node.start_mark) from None


def _check_size(node: yaml.Node, source: str) -> None:
    """Refuse aliases that expand a few lines to millions of values, or endlessly."""
    sizes: dict[int, float] = {}

    def size(node: yaml.Node) -> float:
        if id(node) not in sizes:
            sizes[id(node)] = math.inf  # for a node that contains itself
            parts = node.value if isinstance(node, yaml.CollectionNode) else []
            each = (part for pair in parts for part in pair) if isinstance(node, yaml.MappingNode) else parts
            sizes[id(node)] = 1 + sum(map(size, each))
        return sizes[id(node)]

    if size(node) > MAX_VALUES:
        raise UserError(f"{quoted(source)}: aliases (*NAME) make it more than {MAX_VALUES:,} values; use fewer aliases")


def _check_keys(node: yaml.Node, source: str, prefix: str, seen: set[int]) -> None:
    """Refuse a key that occurs twice in a mapping: YAML would ignore the first. Merge keys (<<) may be repeated."""
    if id(node) in seen:  # an alias, perhaps of a node that contains it
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
            _check_keys(value, source, f"{prefix}{quoted(key.value, 60)}.", seen)
        for key, numbers in lines.items():
            if len(numbers) > 1:
                where = f"lines {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
                raise UserError(
                    f"{quoted(source)}: '{quoted(prefix + key)}' occurs {len(numbers)} times, in {where}, and all but "
                    f"the last would be ignored; keep one"
                )


def _typed_node(node: yaml.Node, kind: Any, source: str) -> yaml.Node:
    """``node`` with a string wherever ``kind`` is one, where YAML would read a number, a date or a boolean."""
    if isinstance(node, yaml.MappingNode):
        hints = _hints(kind)
        pairs = []
        for key, value in node.value:
            inner = kind if key.tag == f"{TAG}merge" else hints.get(key.value) if key.id == "scalar" else None
            pairs.append((key, _typed_node(value, inner, source)))
        return yaml.MappingNode(node.tag, pairs, node.start_mark, node.end_mark) if hints else node
    if isinstance(node, yaml.SequenceNode):
        item = get_args(kind)[0] if get_origin(kind) is list else kind if _hints(kind) else None
        if item is None:
            return node
        items = [_typed_node(each, item, source) for each in node.value]
        return yaml.SequenceNode(node.tag, items, node.start_mark, node.end_mark)
    if not _is_text(kind) or getattr(node, "style", None) is not None:  # quoted
        return node
    _check_comment(node, source)
    return yaml.ScalarNode(f"{TAG}str", node.value) if node.tag in RETYPED_TAGS else node


def _check_comment(node: yaml.ScalarNode, source: str) -> None:
    """Refuse a text that a comment cuts off, as in ``hazy: # 1/hazy``, where the whole line is an existing path."""
    mark = node.start_mark
    line = mark.buffer[mark.pointer :].partition("\n")[0].rstrip("\0").strip()
    if "#" in line and line != node.value and os.path.exists(os.path.expanduser(line)):
        raise UserError(
            f"{source}, line {mark.line + 1}: for YAML a comment begins at the #, but there is a path "
            f"'{quoted(line)}'; put it in quotes"
        )


def _is_text(kind: Any) -> bool:
    """Whether ``kind`` is a string, an optional string, or a list of strings."""
    composite = get_origin(kind) in (list, Union, types.UnionType)
    return kind is str or (composite and str in get_args(kind))


def _hints(kind: Any) -> Mapping[str, Any]:
    """The types of the settings in a section; none, if ``kind`` is not a section."""
    if dataclasses.is_dataclass(kind):
        return get_type_hints(kind, include_extras=True)
    return kind if isinstance(kind, Mapping) else {}


def _setting_type(section: Any, key: str) -> Any:
    """The type of the setting ``key`` (a.b.c) in ``section``; None if there is no such setting."""
    for part in key.split("."):
        section = _hints(section).get(part)
    return section


def _defaults(schema: Mapping[str, Any]) -> dict:
    return copy.deepcopy(_read_defaults(tuple(schema.items())))


@functools.cache
def _read_defaults(schema: tuple[tuple[str, Any], ...]) -> dict:
    """configs.yml, read once for each schema: parsing it took most of the time of `load`."""
    return read_yaml(DEFAULTS, dict(schema))


def _schema(methods: Mapping[str, type]) -> dict[str, Any]:
    hints = get_type_hints(Settings, include_extras=True)
    return {name: kind for name, kind in hints.items() if name not in ("model", "method")} | dict(methods)


def _layers(
    files: Iterable[Path], overrides: Iterable[Override], schema: Mapping[str, Any]
) -> Iterator[tuple[dict, str]]:
    """The nested values of each of ``files`` and ``overrides``, with a description of the source."""
    for path in files:
        yield read_yaml(path, schema), str(path)
    for each in overrides:
        key, text = _split_key(each)
        tree = _typed_value(text, _setting_type(schema, key)) if isinstance(each, str) else each[1]
        for part in reversed(key.split(".")):
            tree = {part: tree}
        yield tree, f"'{quoted(text)}'"


def _split_key(override: Override) -> tuple[str, str]:
    """The key of an override, and the whole override as text."""
    if not isinstance(override, str):
        return override[0], f"{override[0]}={override[1]}"
    key, sign, _ = override.partition("=")
    if not sign or not key.strip():
        raise UserError(
            f"cannot understand '{quoted(override)}'; settings on the command line are key=value, as train.batch=4"
        )
    return key.strip(), override


def _typed_value(assignment: str, kind: Any) -> Any:
    """The value in ``key=value``: literal for a string; parsed as YAML for other types and for lists in brackets.

    Quotes around a whole string are removed, so that "null" can be a name where null means None.
    """
    value = assignment.partition("=")[2]
    source = f"'{quoted(assignment)}'"
    try:
        if _is_text(kind):
            return _text_value(value, kind, source)
        if "#" in value and not _hints(kind):
            raise UserError(f"cannot understand the value in {source}: there are no comments (#) here; remove it")
        return _parse(value, kind, source)
    except (yaml.YAMLError, RecursionError):
        raise UserError(
            f"cannot understand the value in {source}; write it as in a config.yml, with quotes around names in a list "
            f"that contain YAML syntax"
        ) from None


def _text_value(value: str, kind: Any, source: str) -> Any:
    """The string, None or list of strings that ``value`` means for the type ``kind``."""
    bare = value.strip()
    if not bare or (bare in NULL and kind is not str):
        return None
    bracketed = get_origin(kind) is list and bare[0] + bare[-1] == "[]"
    if bracketed and yaml.compose(bare).end_mark.index == len(bare):  # no comment after it
        return _parse(bare, kind, source)
    if QUOTED_TEXT.fullmatch(bare):
        with contextlib.suppress(yaml.YAMLError, ValueError, OverflowError):  # an invalid escape sequence
            return yaml.safe_load(bare)
    return value


def _merge(tree: dict, layer: Mapping, schema: Mapping[str, Any], source: str, prefix: str) -> None:
    """Override values of ``tree`` by those of ``layer``; raises `UserError` for keys that the schema does not have."""
    for key, value in layer.items():
        if key == "model" and not prefix:  # written by dump(); --model of the command line applies
            continue
        if key not in schema:
            name = prefix + (key if isinstance(key, str) else quoted(key))
            raise UserError(f"{source}: unknown setting '{quoted(name)}'{nearest(key, schema)}")
        if dataclasses.is_dataclass(schema[key]):
            if not isinstance(value, Mapping):
                raise UserError(
                    f"{source}: '{prefix}{key}' is a section and needs settings below it, got {quoted([value])[1:-1]}"
                )
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
        raise UserError(f"the setting '{path}' has no value; configs.yml must give its default")
    return convert(tree[name], kind, path)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
