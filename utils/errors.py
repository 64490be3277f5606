"""Errors that the user can correct: what was wrong, where, and what to do."""

import difflib
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import PurePath
from typing import Any

LONGEST = 1000  # characters of a message
QUOTED = 120  # characters of a quoted value
COMPARED = 60  # characters of a name whose nearest match is searched
ELLIPSIS = " ... "


class UserError(Exception):
    """An error that the user can correct.

    The message is one printable line with the cause and the remedy. The commands print it without a traceback and exit
    with status 2; from Python it is an ordinary exception.
    """

    def __str__(self) -> str:
        return quoted(super().__str__(), LONGEST)


class ImageError(UserError):
    """An error of a single image among many; the others can still be processed."""


def quoted(value: Any, most: int = QUOTED) -> str:
    """``value`` for a message: on one line, printable, its middle cut out where it is longer than ``most``.

    Strings and paths as they are, other values by `repr`. Undecodable bytes of a file name become ``\\xe9``.
    """
    try:
        text = str(value) if isinstance(value, str | PurePath) else repr(value)
    except ValueError:  # Python does not convert integers of more than 4300 digits to text
        text = "a number of thousands of digits"
    text = "".join(character if character.isprintable() else _escaped(character) for character in text)
    if len(text) <= most:
        return text
    end = most // 3
    return f"{text[: most - end - len(ELLIPSIS)]}{ELLIPSIS}{text[len(text) - end :]}"


def _escaped(character: str) -> str:
    """The escape sequence of a character; a surrogate stands for an undecodable byte."""
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def nearest(name: Any, names: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the name closest to ``name``, or the list of all names."""
    names = sorted(names)
    matches = difflib.get_close_matches(quoted(name, COMPARED), names, n=1, cutoff=0.5)
    return f"; did you mean '{matches[0]}'?" if matches else f"; known: {', '.join(names)}"


def run(main: Callable[[], int | None]) -> None:
    """Run a command's ``main`` and exit with its status, or with 2 and one line for a `UserError`.

    Warnings of Pillow and NumPy about damaged files are not shown: a user cannot act on them.
    """
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"(PIL|numpy|data)\.")
    try:
        status = main()
    except UserError as error:
        sys.exit(_fail(f"error: {error}", 2))
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted", 130))
    sys.exit(status or 0)


def _fail(line: str, status: int) -> int:
    print(line, file=sys.stderr)
    return status
