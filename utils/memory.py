"""Memory: what is free, what was used at most, what an error says of a lack of it, and giving it back."""

import contextlib
import ctypes
import math
import os
import sys
from pathlib import Path, PurePosixPath

import torch

PROCESS = Path("/proc/self")


def reset_peak(device: torch.device) -> None:
    """Begin to watch the peak memory anew: on a GPU, and of a process on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            PROCESS.joinpath("clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes since `reset_peak`: allocated on the GPU, or else resident in the whole process.

    Where the system cannot forget an earlier peak (not on Linux), it is that of the process since it began, and 0 where
    it tells none (Windows).
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


# PyTorch's, cuBLAS's and oneDNN's words for a lack of memory. The last ones' could mean more, but seldom do.
EXHAUSTED = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED", "bad_alloc")
EXHAUSTED += ("could not create a primitive", "could not create a memory object")


M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h


def exhausted(error: Exception) -> bool:
    """Is this a lack of memory? On a CPU PyTorch has no exception of its own for it."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or any(words in str(error) for words in EXHAUSTED)


def keep_memory() -> None:
    """Let the C library (glibc) keep freed memory for the next pass, rather than return it and fetch it page by page.

    For programs that compute the same again and again: NeDR's float32 pass over 620x460 pixels takes half as long.
    `release_memory` still gives back what is free. Nothing is done where the user has set MALLOC_* himself.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((M_MMAP_THRESHOLD, 2**30), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 2**26)):
            mallopt(option, value)


def release_memory() -> None:
    """Give freed memory back to the system, where the C library can (glibc); costs some 30 ms.

    Between images of different sizes its heap frays: 40 of them left NeDR with 2.7 GB resident in place of 0.9.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def free_memory(device: torch.device) -> float:
    """Bytes that may still be taken on ``device``: infinity where nothing is known."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return min(_available(), _group_limit(), _process_limit())


def _available(file: Path = Path("/proc/meminfo")) -> float:
    """What Linux thinks can be had without swapping."""
    for line in _read(file).splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return math.inf


def _group_limit(own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """What the control groups of this process (a container's, a batch system's) leave of their memory limits.

    File cache counts as used there, but gives way: the inactive part of it is added back.
    """
    free = math.inf
    for line in _read(own).splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds == "":  # version 2
            base, limit, used, cache = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in kinds.split(","):  # version 1
            base, limit, used = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        for folder in {base / group, *(base / above for above in group.parents), base}:
            most, taken = _read(folder / limit).strip(), _read(folder / used).strip()
            if most.isdecimal() and taken.isdecimal():  # "max" is no limit
                stat = dict(entry.split() for entry in _read(folder / "memory.stat").splitlines())
                free = min(free, int(most) - int(taken) + int(stat.get(cache, 0)))
    return max(0, free)


def _process_limit() -> float:
    """What the limits that a shell or a batch system sets (ulimit -v, -d) leave this process."""
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
    """A figure of this process in bytes; 0 where the system tells none."""
    lines = _read(PROCESS / "status").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
