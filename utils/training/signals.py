"""Signals that end a command."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

# From Ctrl-C, from a scheduler, and from a terminal that is closed (not on Windows).
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
FIRST_INTERRUPT = b"\nCtrl-C: this run saves and ends after the current step; a second Ctrl-C ends it immediately\n"


class InterruptedWorkError(Exception):
    """Repeatable work was interrupted by a signal."""


@contextlib.contextmanager
def handled(handler: Callable[[int], None], at_once: bool = True) -> Iterator[None]:
    """Inside, SIGINT, SIGTERM and SIGHUP call ``handler`` with their number.

    With ``at_once``, a Ctrl-C after the first signal ends the process immediately. SIGHUP stays ignored if it was
    (nohup).
    """

    def first(number: int, _) -> None:
        handler(number)
        if at_once:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if number == signal.SIGINT:
                with contextlib.suppress(OSError):
                    os.write(2, FIRST_INTERRUPT)  # print is not safe in a signal handler

    ignored = {number for number in SIGNALS[2:] if signal.getsignal(number) == signal.SIG_IGN}
    numbers = [number for number in SIGNALS if number not in ignored]
    before = [signal.signal(number, first) for number in numbers]
    try:
        yield
    finally:
        for number, handler_before in zip(numbers, before, strict=True):
            signal.signal(number, handler_before)
