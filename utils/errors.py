"""Errors for people: what was wrong, where, and what to do."""

import difflib
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import PurePath
from typing import Any

LONGEST = 1000  # characters of a message
QUOTED = 120  # of what it quotes
PROBED = 60  # of a name for which the nearest is looked for
GAP = " ... "


class UserError(Exception):
    """Something that the user can put right.

    The message is one line that names the thing and the remedy. The commands print it without a
    traceback and exit with status 2; from Python it is an ordinary exception. Whatever it quotes, its text can be
    printed.
    """

    def __str__(self) -> str:
        return quoted(super().__str__(), LONGEST)


class UnfitError(UserError):
    """What is wrong with one of many images alone: the others can be done."""


def quoted(value: Any, most: int = QUOTED) -> str:
    """``value`` as a message quotes it: on one line, printable, without its middle where it is longer than ``most``.

    A text or a path as it is, all else as Python writes it. Bytes of a file's name that are no text become ``\\xe9``.
    """
    try:
        text = str(value) if isinstance(value, str | PurePath) else repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        text = "a number of thousands of digits"
    text = "".join(sign if sign.isprintable() else _escaped(sign) for sign in text)
    if len(text) <= most:
        return text
    end = most // 3
    return f"{text[: most - end - len(GAP)]}{GAP}{text[len(text) - end :]}"


def _escaped(sign: str) -> str:
    """A surrogate stands for a byte that is no text."""
    if "\udc80" <= sign <= "\udcff":
        return f"\\x{ord(sign) - 0xDC00:02x}"
    return sign.encode("unicode_escape").decode("ascii")


def nearest(name: Any, names: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the name closest to ``name``, or the list of all names."""
    names = sorted(names)
    close = difflib.get_close_matches(quoted(name, PROBED), names, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(names)}"


def run(main: Callable[[], int | None]) -> None:
    """Run a command's ``main`` and leave with its status, or with 2 and one line for a `UserError`.

    What Pillow and NumPy warn of in damaged files is not shown: it tells nothing that a user could put right.
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
