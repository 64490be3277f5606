"""Steps that were left out because a loss or a gradient was not finite: detected without waiting for a GPU, counted."""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Step(NamedTuple):
    """A step: its number, whether it was left out (1, or 0), its losses by name, and its batches.

    ``computed``: the event of a GPU after which ``left_out`` is valid.
    """

    number: int
    left_out: Tensor
    terms: dict[str, Tensor]
    batches: Sequence[dict]
    computed: torch.cuda.Event | None

    def cause(self) -> str:
        """The reason, for a message: which loss was not finite, or that a gradient was not."""
        for name, term in self.terms.items():
            if not term.isfinite().all():
                return f"the loss '{name}' has become {float(term)}"
        return "gradients have become NaN, infinite or too large for float32, here or in another process"


class Divergence:
    """Detects which steps were left out, and restores the running statistics of ``networks`` after them.

    ``consecutive``: how many of the last steps were left out; ``last_good``: the number of the last step that was not.
    On a GPU a step is detected some steps later, without waiting, or when `detected` is called with ``wait``. Its
    forward pass may have made running statistics invalid: they are reset to those of the last good step.
    """

    def __init__(self, networks: Sequence[nn.Module], last_good: int):
        self.consecutive = 0
        self.last_good = last_good
        self.pending = deque[Step]()
        buffers = [buffer for network in networks for buffer in network.buffers()]
        self.statistics = [buffer for buffer in buffers if buffer.is_floating_point()]
        self.last_statistics = [buffer.clone() for buffer in self.statistics]

    def record(self, number: int, left_out: Tensor, terms: dict[str, Tensor], batches: Sequence[dict]) -> None:
        """Record a step; call it after every one, with the results of `Updater.step`."""
        computed = None
        if left_out.is_cuda:
            left_out = left_out.to("cpu", non_blocking=True)
            computed = torch.cuda.Event()
            computed.record()
        self.pending.append(Step(number, left_out, terms, batches, computed))

    @torch.no_grad()
    def detected(self, wait: bool = False) -> list[Step]:
        """The steps left out that were not returned before; ``wait``: up to the last step recorded."""
        left_out = []
        advanced = False
        while self.pending and (wait or self.pending[0].computed is None or self.pending[0].computed.query()):
            step = self.pending.popleft()
            advanced = True
            if wait and step.computed is not None:
                step.computed.synchronize()
            if step.left_out:
                left_out.append(step)
                self.consecutive += 1
            else:
                self.consecutive = 0
                self.last_good = step.number
        if self.last_statistics and advanced and left_out:
            torch._foreach_copy_(self.statistics, self.last_statistics)
        elif self.last_statistics and advanced and not self.pending:
            torch._foreach_copy_(self.last_statistics, self.statistics)
        return left_out
