"""Signals that ask a command to end."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

# Ctrl-C, a scheduler's, and a terminal's that is closed (which Windows has not).
NUMBERS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
ONCE_MORE = b"\nCtrl-C: this run ends after the present step and saves; once more, and it ends at once\n"


class LeftError(Exception):
    """Work that can be done again was left when a signal came."""


@contextlib.contextmanager
def handled(handler: Callable[[int], None], at_once: bool = True) -> Iterator[None]:
    """Inside, SIGINT, SIGTERM and SIGHUP call ``handler`` with their number.

    With ``at_once``, a Ctrl-C after the first of them ends the process there and then, whatever it is doing. SIGHUP
    stays ignored where it was (nohup).
    """

    def first(number: int, _) -> None:
        handler(number)
        if at_once:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if number == signal.SIGINT:
                with contextlib.suppress(OSError):
                    os.write(2, ONCE_MORE)  # print could be in the middle of something

    ignored = {number for number in NUMBERS[2:] if signal.getsignal(number) == signal.SIG_IGN}
    numbers = [number for number in NUMBERS if number not in ignored]
    before = [signal.signal(number, first) for number in numbers]
    try:
        yield
    finally:
        for number, own in zip(numbers, before, strict=True):
            signal.signal(number, own)
