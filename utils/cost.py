"""What a method costs: parameters, multiply-accumulates, peak memory, and which weights exactly were used."""

import hashlib
import resource
import sys
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

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
    """Begin to watch the peak memory anew, where that can be done (on a GPU)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: allocated on the GPU since `reset_peak`, or resident in the whole process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def sha256(path: Path) -> str:
    """The digest of a file, which says which weights exactly a figure is of."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
