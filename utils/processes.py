"""Processes of this machine: whether one runs, and its start time, which distinguishes reused process numbers."""

import os
import socket
import sys
from pathlib import Path

PROC = Path("/proc")


def host() -> str:
    """The name of this machine (or container)."""
    return socket.gethostname()


def started(pid: int) -> str:
    """The start time of a process: the id of the boot and clock ticks since then; "" where the system has none."""
    try:
        boot = PROC.joinpath("sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{_fields(pid)[19]}"
    except (OSError, IndexError):
        return ""


def started_at(pid: int) -> float:
    """The start time in seconds, as of `time.time`; minus infinity where the system has none."""
    try:
        lines = PROC.joinpath("stat").read_text().splitlines()
        [boot] = [int(line.split()[1]) for line in lines if line.startswith("btime ")]
        return boot + int(_fields(pid)[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return -float("inf")


def alive(pid: int) -> bool:
    """Whether a process of this number runs on this machine; True where that cannot be found out (Windows)."""
    if sys.platform == "win32":  # os.kill would end it
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True  # another user's
    try:
        return _fields(pid)[0] not in ("Z", "X")  # dead, but not yet collected by its parent
    except (OSError, IndexError):
        return True


def _fields(pid: int) -> list[str]:
    """/proc/PID/stat from the third field on, after the program's name, which may contain any character."""
    return PROC.joinpath(str(pid), "stat").read_text().rpartition(")")[2].split()
