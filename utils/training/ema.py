"""Averaged weights (EMA), which validation and export use."""

import contextlib
import copy
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from utils.checkpoint import load_strict


class EMA:
    """Exponential moving average of some children of ``method``, parameters and buffers alike.

    The first step copies the weights; then the decay rises to ``decay`` as (1 + n) / (10 + n) after n steps, so that
    the initial weights do not dominate short runs. With ``decay`` 0 the average is the model itself and costs nothing.
    """

    def __init__(self, method: nn.Module, names: Iterable[str], decay: float):
        self.method = method
        self.decay = decay
        self.steps = 0
        self.live = nn.ModuleDict({name: getattr(method, name) for name in names})
        self.average = copy.deepcopy(self.live) if decay else None

    @torch.no_grad()
    def update(self) -> None:
        """Add the current weights to the average; call it after every step. Does not wait for a GPU."""
        if self.average is None:
            return
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps)) if self.steps else 0.0
        for averaged, current in _by_type(self.average, self.live):
            if decay and averaged[0].is_floating_point():
                torch._foreach_lerp_(averaged, current, 1 - decay)
            else:  # counters
                torch._foreach_copy_(averaged, current)
        self.steps += 1

    @contextlib.contextmanager
    def applied(self):
        """Inside, ``method`` has the averaged children and is in eval mode; both are restored afterwards."""
        children = self.average if self.average is not None else self.live
        modes = {module: module.training for module in self.method.modules()}
        try:
            for name, child in children.items():
                setattr(self.method, name, child)
            yield self.method.eval()
        finally:
            for name, child in self.live.items():
                setattr(self.method, name, child)
            for module, mode in modes.items():
                module.training = mode

    def state_dict(self) -> dict:
        """Weights by their names in ``method``, and how many steps were averaged; {} without EMA."""
        if self.average is None:
            return {}
        return {"weights": self.average.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        """Continue from ``state``, or, where it is {} (averaging was off until now), from the current weights."""
        if self.average is None:
            return
        load_strict(self.average, state["weights"] if state else self.live.state_dict(), "the averaged weights")
        self.steps = int(state["steps"]) if state else 0  # a tensor in earlier checkpoints


def _by_type(*modules: nn.Module) -> Iterable[list[list[Tensor]]]:
    """Parameters and buffers of each of ``modules``, which have the same structure, grouped by type."""
    groups = defaultdict(lambda: [[] for _ in modules])
    tensors = [itertools.chain(module.parameters(), module.buffers()) for module in modules]
    for corresponding in zip(*tensors, strict=True):
        for members, tensor in zip(groups[corresponding[0].dtype], corresponding, strict=True):
            members.append(tensor)
    return groups.values()


@contextlib.contextmanager
def buffers_restored(module: nn.Module) -> Iterator[None]:
    """Inside, the buffers of ``module`` (running statistics) may change; they are restored afterwards."""
    copies = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, copied in copies:
            buffer.copy_(copied)
