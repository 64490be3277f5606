"""Errors for people: what was wrong, where, and what to do."""

import difflib
import sys
from collections.abc import Callable, Iterable


class UserError(Exception):
    """Something that the user can put right.

    The message is one line that names the thing and the remedy. The commands print it without a
    traceback and exit with status 2; from Python it is an ordinary exception.
    """


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
