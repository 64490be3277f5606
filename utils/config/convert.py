"""Values of settings: their types and ranges, and the conversion of text and YAML values to them."""

import os
import types
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from utils.errors import UserError, nearest, quoted


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
    message = Ends(low, high).check(interval)
    if message:
        raise UserError(f"{name}={list(interval)}: {message}")


def convert(value: Any, kind: Any, path: str) -> Any:
    """``value`` as ``kind``; YAML reads 1e-4 as text, so numbers are converted by the field's type."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        value = convert(value, args[0], path)
        message = args[1].check(value)
        if message:
            raise UserError(f"{path}={quoted(value)}: {message}")
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(value, args, path)
    if origin is Literal:
        if value not in args:
            raise UserError(f"{path}={quoted(value)}: must be one of {', '.join(map(str, args))}{_hint(value, args)}")
        return value
    if origin is list:
        if value is None or (args[0] is str and isinstance(value, str)):  # None, or a single string
            value = [] if value is None else [value]
        return [convert(item, args[0], path) for item in _sequence(value, path)]
    if origin is tuple:
        items = _sequence(value, path)
        if len(items) != len(args):
            raise UserError(f"{path}={quoted(value)}: needs {len(args)} values in brackets, got {len(items)}")
        return tuple(convert(item, arg, path) for item, arg in zip(items, args, strict=True))
    return _convert_scalar(value, kind, path)


def _convert_union(value: Any, kinds: tuple, path: str) -> Any:
    """``value`` as None or as one of the literal words of ``kinds``, or else as their remaining type.

    If a number and a tuple remain, a list becomes the tuple.
    """
    if value in (None, "") and type(None) in kinds:  # an empty path would mean the current folder
        return None
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    if value in words:
        return value
    others = [kind for kind in kinds if kind is not type(None) and get_origin(kind) is not Literal]
    tuples = [kind for kind in others if get_origin(kind) is tuple]
    remaining = tuples[0] if tuples and isinstance(value, list | tuple) else others[0]
    try:
        return convert(value, remaining, path)
    except UserError as error:
        raise UserError(" or ".join([str(error), *words])) from None


def _convert_scalar(value: Any, kind: type, path: str) -> Any:
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str) and value:
        return _check_path_text(value, path)
    if kind is int and type(value) is int and abs(value) < 2**63:  # not converted by float, which has 53 bits
        return value
    if kind in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = float("nan")
        if kind is float and number == number and abs(number) != float("inf"):
            return number
        if kind is int and number.is_integer() and abs(number) < 2**63:
            return int(number)
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    more = " of at most 64 bits" if kind is int and type(value) is int else ""
    if kind is str and value in (None, ""):
        raise UserError(f"{path} is empty: needs text")
    quotes = "; put it in quotes" if kind is str else ""
    raise UserError(f"{path}={_literal(value)}: needs {words[kind]}{more}{quotes}")


def _check_path_text(text: str, path: str) -> str:
    """``text``, if it can be a path. Raises `UserError`."""
    try:
        valid = b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        valid = False
    if not valid:
        raise UserError(f"{path}={_literal(text)}: no path can contain such a character; remove it")
    return text


def _literal(value: Any) -> str:
    """``value`` for a message, with quotes around a string."""
    return f"'{quoted(value)}'" if isinstance(value, str) else quoted(value)


def _sequence(value: Any, path: str) -> list:
    if not isinstance(value, list | tuple):
        raise UserError(f"{path}={_literal(value)}: needs a list in brackets")
    return list(value)


def _hint(value: Any, choices: Iterable) -> str:
    hint = nearest(value, map(str, choices))
    return hint if "did you mean" in hint else ""
