"""The cost of a method: parameters and multiply-accumulates."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

SIDE = 256  # pixels: MACs are given at SIDE x SIDE, as in papers


def parameters(module: nn.Module, children: Collection[str]) -> int:
    """The number of parameters in these children of ``module``; buffers are not counted."""
    return sum(p.numel() for name, p in module.named_parameters() if name.split(".")[0] in children)


def macs(dehaze: Callable[[Tensor], Tensor], device: torch.device | str = "cpu", side: int = SIDE) -> int:
    """Multiply-accumulates of convolutions and matrix products for one image of ``side`` x ``side`` pixels.

    Half of PyTorch's FLOP count; element-wise operations are not counted, as in papers.
    """
    with FlopCounterMode(display=False) as counter:
        dehaze(torch.zeros(1, 3, side, side, device=device))
    return counter.get_total_flops() // 2
