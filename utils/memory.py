"""Memory: how much is free, its peak use, which errors mean a lack of it, and returning it to the system."""

import contextlib
import ctypes
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import torch

PROCESS = Path("/proc/self")


def reset_peak(device: torch.device) -> None:
    """Reset the peak of used memory: on a GPU, and of a process on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            PROCESS.joinpath("clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes since `reset_peak`: allocated on the GPU, or else resident in the whole process.

    Where the system cannot reset the peak (not Linux) it is that since the process began, and 0 where the system
    reports none (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if peak := _status("VmHWM:"):
        return peak
    try:
        import resource  # here, not above: Windows has none
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# Messages of PyTorch, cuBLAS and oneDNN about a lack of memory. oneDNN's seldom mean anything else.
EXHAUSTED = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED", "bad_alloc")
EXHAUSTED += ("could not create a primitive", "could not create a memory object")


M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h


def exhausted(error: Exception) -> bool:
    """Whether ``error`` means a lack of memory; on a CPU PyTorch has no special exception for it."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or any(message in str(error) for message in EXHAUSTED)


@contextlib.contextmanager
def shortage_as(make_error: Callable[[], Exception]) -> Iterator[None]:
    """Turns a lack of memory inside into the error that ``make_error`` returns; all other errors stay."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not exhausted(error):
            raise
        raise make_error() from None


def keep_memory() -> None:
    """Let the C library (glibc) keep freed memory for the next pass, rather than return it and fetch it page by page.

    For programs that repeat a computation: NeDR's float32 pass over 620x460 pixels takes half as long.
    `release_memory` still returns free memory. Does nothing where the user has set MALLOC_*.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((M_MMAP_THRESHOLD, 2**30), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 2**26)):
            mallopt(option, value)


def release_memory() -> None:
    """Return freed memory to the system, where the C library can (glibc); takes about 30 ms.

    Images of different sizes fragment its heap: after 40 of them NeDR had 2.7 GB resident instead of 0.9.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def free_memory(device: torch.device) -> float:
    """Bytes that can still be allocated on ``device``; infinity where nothing is known."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return min(_available(), _group_limit(), _process_limit())


def _available(file: Path = Path("/proc/meminfo")) -> float:
    """The memory that Linux estimates to be available without swapping, in bytes."""
    for line in _read(file).splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return math.inf


def _group_limit(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes left within the memory limits of this process's control groups (a container's, a batch system's).

    They count the file cache as used; its inactive part is added back, since it can be reclaimed.
    """
    free = math.inf
    for line in _read(groups).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            base, limit, used, cache = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):  # version 1
            base, limit, used = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        for folder in {base / group, *(base / above for above in group.parents), base}:
            most = _read(folder / limit).strip()
            taken = _read(folder / used).strip()
            if most.isdecimal() and taken.isdecimal():  # "max" is no limit
                stat = dict(entry.split() for entry in _read(folder / "memory.stat").splitlines())
                free = min(free, int(most) - int(taken) + int(stat.get(cache, 0)))
    return max(0, free)


def _process_limit() -> float:
    """Bytes left within the limits that a shell or a batch system sets for this process (ulimit -v, -d)."""
    try:
        import resource  # here, not above: Windows has none
    except ImportError:
        return math.inf
    free = math.inf
    for limit, taken in ((resource.RLIMIT_AS, "VmSize:"), (resource.RLIMIT_DATA, "VmData:")):
        most = resource.getrlimit(limit)[0]
        if most != resource.RLIM_INFINITY:
            free = min(free, most - _status(taken))
    return max(0, free)


def _status(name: str) -> int:
    """A memory figure of this process in bytes; 0 where the system reports none."""
    lines = _read(PROCESS / "status").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
