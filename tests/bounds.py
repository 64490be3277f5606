"""Work on hostile input in a forked child, within bounds of time and memory, and the verdict on it. For POSIX systems.

    found = bounds.run(lambda: models.load(path), folder)
    assert not found.fault, found.fault

It may end well or with a `UserError` of one line. A fault is any other exception, a hang, too much memory, a crash, a
program started, a connection made, or something in the file system changed outside ``folder``.
"""

import faulthandler
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from utils import memory
from utils.errors import UserError

SECONDS, BYTES = 20.0, 2**29
LONGEST = 1_000  # characters of a line
LIMIT = 4  # times the bytes: what the system refuses to give, so that a bomb does not take the whole machine
STARTS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "subprocess.Popen")
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
CONNECTS = ("socket.connect", "socket.bind")


class Verdict(NamedTuple):
    """``refused``: the `UserError`'s message; ``fault``: what must not be; both empty where the work ended well."""

    refused: str = ""
    fault: str = ""


def run(work: Callable[[], Any], folder: Path, seconds: float = SECONDS, most: int = BYTES) -> Verdict:
    """Do ``work`` in a child, in at most so many ``seconds`` and ``most`` bytes more than this process has now."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        _child(work, folder.resolve(), seconds, most, writing)
    os.close(writing)
    with open(reading, "rb") as file:
        written = file.read()
    _, status = os.waitpid(child, 0)
    if written:
        return Verdict(**json.loads(written))
    if os.WIFEXITED(status):
        return Verdict(fault="ended without a word")
    number = os.WTERMSIG(status)
    why = f"not done after {seconds:g} s" if number == signal.SIGALRM else f"died of {signal.Signals(number).name}"
    return Verdict(fault=why)


def _child(work: Callable[[], Any], folder: Path, seconds: float, most: int, pipe: int) -> None:
    """The child's whole life: its verdict goes into ``pipe``."""
    found = Verdict(fault="the child could not begin")
    try:
        faulthandler.disable()
        quiet = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(quiet, stream)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        before = _status("VmRSS:")
        resource.setrlimit(resource.RLIMIT_DATA, (_status("VmData:") + LIMIT * most,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        done: list[str] = []
        sys.addaudithook(lambda event, given: done.extend(_forbidden(event, given, folder)))
        found = _verdict(work)
        grown = _status("VmHWM:") - before
        if done:
            found = Verdict(fault=f"did {done[0]}")
        elif grown > most and not found.fault:
            found = Verdict(fault=f"took {grown / 2**20:.0f} MiB")
    except BaseException:
        found = Verdict(fault=traceback.format_exc())
    finally:
        os.write(pipe, json.dumps(found._asdict()).encode())
        os._exit(0)


def _verdict(work: Callable[[], Any]) -> Verdict:
    try:
        work()
    except UserError as error:
        message = f"{error}"
        one_line = message.isprintable() and len(message) <= LONGEST
        return Verdict(refused=message) if one_line else Verdict(fault=f"not one line: {message!r:.{LONGEST}}")
    except BaseException:
        return Verdict(fault=traceback.format_exc()[-10_000:])
    return Verdict()


def _forbidden(event: str, given: tuple, folder: Path) -> list[str]:
    """What an audit event says of what must not be done; a path that is a number is an open file's."""
    if event in STARTS or event in CONNECTS:
        return [f"{event} {given!r:.200}"]
    writes = event == "open" and isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if not (writes or event in CHANGES) or not isinstance(given[0], str | bytes | os.PathLike):
        return []
    path = Path(os.path.realpath(os.fsdecode(given[0])))
    allowed = path.is_relative_to(folder) or path == Path(os.devnull) or path.is_relative_to("/proc/self")
    return [] if allowed else [f"{event} {path}"]


def _status(name: str) -> int:
    """A figure of this process in bytes; 0 where the system tells none."""
    try:
        lines = memory.PROCESS.joinpath("status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)
