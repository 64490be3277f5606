"""Settings: typed dataclasses filled in layers, every value checked before anything is loaded.

The layers are configs.yml (every setting, its default and why, and the model's recipe), the experiment's own
config.yml and ``key=value`` from the command line, later ones winning. The dataclasses here and in the methods hold
types and ranges and no defaults, so that configs.yml is the one place where a default stands.

Where a setting is a text (a path, a name), what was written is taken as it stands: 2018, no and 12_30 are folders as
good as any. On the command line nothing in it is YAML, so that "# a: [b" is a name too.
"""

import contextlib
import dataclasses
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
from utils.config.schema import (
    Settings,
)
from utils.errors import UserError, nearest, quoted

DEFAULTS = Path(__file__).resolve().parents[2] / "configs.yml"
TAG = "tag:yaml.org,2002:"
READ_OTHERWISE = {TAG + name for name in ("bool", "int", "float", "timestamp", "merge", "value")}  # by YAML, unquoted
NULL = ("~", "null", "Null", "NULL")
LONGEST = 2**16  # characters of a file of settings; configs.yml has 17,000
MOST = 20_000  # values in it, aliases written out
QUOTED = re.compile(r"""'([^']|'')*'|"([^"\\]|\\.)*\"""")  # as a whole

# key=value as typed; or, of a command's own options, the key and the value itself, which then no one has to quote.
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

    configs.yml also holds ``recipes``: what of the shared sections differs for a model. ``methods`` maps every
    method's name to its settings dataclass; all their blocks are checked, one is used, and ``overrides`` may change
    that alone, or those of ``used``. Files may hold blocks of several methods.
    Raises `UserError` for an unknown key, a wrong type or a value that cannot work, naming where it stands.
    """
    if model not in methods:
        raise UserError(f"unknown model '{quoted(model)}'{nearest(model, methods)}")
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
            raise UserError(f"'{quoted(text)}': {block} is not in use here, {' and '.join(used)} is; {remedy}")


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
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise UserError(f"cannot read settings from {path}: it is no file")
        tree = _parsed(path.read_text(encoding="utf-8"), schema, str(path))
    except FileNotFoundError:
        raise UserError(f"no settings file {path}; create it (it may be empty) or name another folder") from None
    except yaml.YAMLError as error:
        told = quoted(" ".join(str(error).split()), 300)
        raise UserError(
            f"cannot read settings from {path}: {told}; mend that line (a text with signs of YAML's in it, as [ or "
            f"': ', wants quotes)"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read settings from {path}: {error}; it must be a text file in UTF-8") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold 'key: value' lines, not a {type(tree).__name__}")
    return tree


def _parsed(text: str, kind: Any, source: str) -> Any:
    """``text`` as YAML, see `_as_written`. Raises YAMLError, and `UserError` for a key twice and for what is no end."""
    if len(text) > LONGEST:
        raise UserError(f"{quoted(source)}: {len(text):,} characters; settings have {LONGEST:,} at most: shorten them")
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node, source)
        _check_keys(node, source, "", set())
        return loader.construct_document(_as_written(node, kind, source))
    except (yaml.YAMLError, UserError):
        raise
    except RecursionError:
        raise yaml.YAMLError("brackets in brackets, too deep") from None
    except (ValueError, OverflowError) as error:  # a sign that no letter has
        raise yaml.YAMLError(quoted(str(error))) from None
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    """Names the value, and its place, that is not of the kind that it says or looks like: there PyYAML raises any."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception:
            told = f"'{quoted(node.value)}' is no {node.tag.removeprefix(TAG)} that can be"
            raise yaml.constructor.ConstructorError(problem=told, problem_mark=node.start_mark) from None


def _check_size(node: yaml.Node, source: str) -> None:
    """Refuse aliases by which a few lines become millions, or go on without end."""
    sizes: dict[int, float] = {}

    def size(node: yaml.Node) -> float:
        if id(node) not in sizes:
            sizes[id(node)] = math.inf  # as long as it is met below itself
            parts = node.value if isinstance(node, yaml.CollectionNode) else []
            each = (part for pair in parts for part in pair) if isinstance(node, yaml.MappingNode) else parts
            sizes[id(node)] = 1 + sum(map(size, each))
        return sizes[id(node)]

    if size(node) > MOST:
        raise UserError(f"{quoted(source)}: aliases (*NAME) make it more than {MOST:,} values; write out what is meant")


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
            _check_keys(value, source, f"{prefix}{quoted(key.value, 60)}.", seen)
        for key, places in lines.items():
            if len(places) > 1:
                where = f"lines {', '.join(map(str, places[:-1]))} and {places[-1]}"
                raise UserError(
                    f"{quoted(source)}: '{quoted(prefix + key)}' stands {len(places)} times, in {where}, and all but "
                    f"the last would be lost; make them one"
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
            f"{source}, line {mark.line + 1}: YAML takes all from # on for a comment, but there is a path "
            f"'{quoted(line)}'; "
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
        yield tree, f"'{quoted(text)}'"


def _key(override: Override) -> tuple[str, str]:
    """The key of an override, and all of it as a text."""
    if not isinstance(override, str):
        return override[0], f"{override[0]}={override[1]}"
    key, sign, _ = override.partition("=")
    if not sign or not key.strip():
        raise UserError(
            f"cannot understand '{quoted(override)}'; settings on the command line read key=value, as train.batch=4"
        )
    return key.strip(), override


def _typed(assignment: str, kind: Any) -> Any:
    """The value in ``key=value`` as typed: a text as it stands; all else, and a list in brackets, as YAML has it.

    A text that is in quotes as a whole loses them, so that "null" can be a name where null is nothing.
    """
    value, source = assignment.partition("=")[2], f"'{quoted(assignment)}'"
    try:
        if _is_text(kind):
            return _text(value, kind, source)
        if "#" in value and not _hints(kind):
            raise UserError(f"cannot understand the value in {source}: a # begins no comment here; take it out")
        return _parsed(value, kind, source)
    except (yaml.YAMLError, RecursionError):
        raise UserError(
            f"cannot understand the value in {source}; write it as in a config.yml, names in a list with signs "
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
        with contextlib.suppress(
            yaml.YAMLError, ValueError, OverflowError
        ):  # a backslash before what it cannot stand before
            return yaml.safe_load(bare)
    return value


def _merge(tree: dict, layer: Mapping, schema: Mapping[str, Any], source: str, prefix: str) -> None:
    """Lay ``layer`` over ``tree``, refusing keys that the schema does not know."""
    for key, value in layer.items():
        if key == "model" and not prefix:  # written by dump(); the command line's --model decides
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
        raise UserError(f"the setting '{path}' stands in no layer; configs.yml must give its default")
    return convert(tree[name], kind, path)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
