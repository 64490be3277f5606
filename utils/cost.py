"""What a method costs: parameters, multiply-accumulates, peak memory, and which weights exactly were used."""

import contextlib
import hashlib
import sys
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

PROCESS = Path("/proc/self")
SIDE = 256  # pixels: MACs are given at SIDE x SIDE, as papers do


def parameters(module: nn.Module, children: Collection[str]) -> int:
    """How many numbers were learned in these children of ``module``; buffers are not counted."""
    return sum(p.numel() for name, p in module.named_parameters() if name.split(".")[0] in children)


def macs(dehaze: Callable[[Tensor], Tensor], device: torch.device | str = "cpu", side: int = SIDE) -> int:
    """Multiply-accumulates of convolutions and matrix products for one picture of ``side`` x ``side`` pixels.

    Half of what PyTorch's FLOP counter counts; element-wise work is not in it, as in other papers' figures.
    """
    with FlopCounterMode(display=False) as counter:
        dehaze(torch.zeros(1, 3, side, side, device=device))
    return counter.get_total_flops() // 2


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
    with contextlib.suppress(OSError):
        for line in PROCESS.joinpath("status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource  # here, not above: Windows has none
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def sha256(path: Path) -> str:
    """The digest of a file, which says which weights exactly a figure is of."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
