"""Signals that ask a command to end."""

import contextlib
import signal
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def handled(handler: Callable[[int], None]) -> Iterator[None]:
    """Inside, SIGINT (Ctrl-C) and SIGTERM (a scheduler's) call ``handler`` with their number."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: handler(number)) for number in numbers]
    try:
        yield
    finally:
        for number, own in zip(numbers, before, strict=True):
            signal.signal(number, own)
