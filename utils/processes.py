"""Which process is meant: alive or gone, told from a later one of the same number."""

import os
import socket
import sys
from pathlib import Path

PROC = Path("/proc")


def host() -> str:
    """The name of this machine (or container)."""
    return socket.gethostname()


def started(pid: int) -> str:
    """When a process of this machine began, as its boot and clock ticks since; "" where the system does not tell."""
    try:
        boot = PROC.joinpath("sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{_fields(pid)[19]}"
    except (OSError, IndexError):
        return ""


def started_at(pid: int) -> float:
    """The same as a time of the clock (seconds, as of `time.time`); infinitely long ago where it is not told."""
    try:
        lines = PROC.joinpath("stat").read_text().splitlines()
        [boot] = [int(line.split()[1]) for line in lines if line.startswith("btime ")]
        return boot + int(_fields(pid)[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return -float("inf")


def alive(pid: int) -> bool:
    """Does a process of this number run on this machine? Where that cannot be asked (Windows): yes."""
    if sys.platform == "win32":  # os.kill would end it
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True  # another user's
    try:
        return _fields(pid)[0] not in ("Z", "X")  # dead, and only not yet collected by its parent
    except (OSError, IndexError):
        return True


def _fields(pid: int) -> list[str]:
    """/proc/PID/stat from the third field on: before it stands the program's name, which may hold anything."""
    return PROC.joinpath(str(pid), "stat").read_text().rpartition(")")[2].split()
