"""Errors for people: what was wrong, where, and what to do."""

import difflib
import sys
from collections.abc import Callable, Iterable


class UserError(Exception):
    """Something that the user can put right.

    The message is one line that names the thing and the remedy. The commands print it without a
    traceback and exit with status 2; from Python it is an ordinary exception. What a hostile file puts into it, line
    breaks or signs that steer a terminal, stands there as an escape, and what is endless is cut.
    """

    def __init__(self, message: str = ""):
        super().__init__(_one_line(f"{message}"))


LONGEST, END = 2_000, 500  # characters of a line, and how many of them are of its end


def _one_line(text: str) -> str:
    line = "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)
    return line if len(line) <= LONGEST else f"{line[: LONGEST - END - 5]} ... {line[-END:]}"


def nearest(name: str, names: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the name closest to ``name``, or the list of all names."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(names)}"


def run(main: Callable[[], int | None]) -> None:
    """Run a command's ``main`` and leave with its status, or with 2 and one line for a `UserError`."""
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
