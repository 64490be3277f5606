"""torch.compile for a method's networks, given up with one line where it cannot work."""

from collections.abc import Callable, Iterable

import torch
from torch import nn

Say = Callable[[str], None]


def compile_networks(networks: Iterable[tuple[str, nn.Module]], device: torch.device, say: Say) -> None:
    """Let PyTorch compile these networks at their first pass, in place; names of weights and copies stay as they are.

    Where it cannot (no C++ compiler on a CPU, no Triton on a GPU, code that it does not understand), the network goes
    on as it is, and ``say`` hears why, in one line.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # each of its stages has exceptions of its own
        return say(f"warning: compile=true, but PyTorch cannot compile here ({_line(error)}); going on without")
    for name, network in networks:
        if next(network.parameters(), None) is not None:
            network.compile()
            network._compiled_call_impl = _guarded(name, network, network._compiled_call_impl, say)
    return None


def _guarded(name: str, network: nn.Module, compiled: Callable, say: Say) -> Callable:
    def call(*args, **kwargs):
        try:
            return compiled(*args, **kwargs)
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
            network._compiled_call_impl = None
            say(f"warning: {name} cannot be compiled ({_line(error)}); it goes on as it is")
            return network(*args, **kwargs)

    return call


def _line(error: Exception) -> str:
    """The first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
