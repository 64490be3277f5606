"""Steps that were left out, since a loss or a gradient was no number: known without a wait, and counted."""

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Step(NamedTuple):
    """A step: its number, whether it was left out (1, or 0), its losses by name, and what it was taken on."""

    number: int
    left_out: Tensor
    terms: dict[str, Tensor]
    batches: Sequence[dict]
    computed: torch.cuda.Event | None

    def what(self) -> str:
        """The words for what was no number."""
        for name, term in self.terms.items():
            if not term.isfinite().all():
                return f"the loss '{name}' has become {float(term)}"
        return "gradients have become NaN, infinite or too large for float32, here or in another process"


class Divergence:
    """Learns which steps were left out. ``row``: how many, one after the other, until now; ``good``: the last other.

    A GPU is not waited for: there a step is known some steps later, or when `known` is told to wait. Its forward pass
    may have spoilt the running statistics of ``networks``, which are then put back as they were.
    """

    def __init__(self, networks: Sequence[nn.Module], good: int):
        self.row, self.good, self.pending = 0, good, deque[Step]()
        buffers = [buffer for network in networks for buffer in network.buffers()]
        self.statistics = [buffer for buffer in buffers if buffer.is_floating_point()]
        self.kept = [buffer.clone() for buffer in self.statistics]

    def after(self, number: int, left_out: Tensor, terms: dict[str, Tensor], batches: Sequence[dict[str, Any]]) -> None:
        """Take note of a step; call it after every one, with what `Updater` says of it."""
        computed = None
        if left_out.is_cuda:
            left_out, computed = left_out.to("cpu", non_blocking=True), torch.cuda.Event()
            computed.record()
        self.pending.append(Step(number, left_out, terms, batches, computed))

    @torch.no_grad()
    def known(self, wait: bool = False) -> list[Step]:
        """The steps left out of which that was not known until now; ``wait``: up to the last one taken."""
        found, learnt = [], False
        while self.pending and (wait or self.pending[0].computed is None or self.pending[0].computed.query()):
            step, learnt = self.pending.popleft(), True
            if wait and step.computed is not None:
                step.computed.synchronize()
            if step.left_out:
                found.append(step)
                self.row += 1
            else:
                self.row, self.good = 0, step.number
        if self.kept and learnt and (found or not self.pending):
            pair = (self.statistics, self.kept) if found else (self.kept, self.statistics)
            torch._foreach_copy_(*pair)
        return found
