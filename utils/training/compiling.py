"""torch.compile for a method's networks; where it does not work, a warning is logged and they run uncompiled."""

from collections.abc import Callable, Iterable

import torch
from torch import nn

Say = Callable[[str], None]


def compile_networks(networks: Iterable[tuple[str, nn.Module]], device: torch.device, say: Say) -> None:
    """Let PyTorch compile these networks at their first pass, in place; weights' names and copies are unaffected.

    Where it cannot (no C++ compiler on a CPU, no Triton on a GPU, unsupported code) the network runs uncompiled, and
    ``say`` is called with a warning of one line.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # the compiler's stages raise different types
        return say(f"warning: compile=true, but PyTorch cannot compile here ({_line(error)}); running uncompiled")
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
            say(f"warning: {name} cannot be compiled ({_line(error)}); it runs uncompiled")
            return network(*args, **kwargs)

    return call


def _line(error: Exception) -> str:
    """The error's type and the first line of its message that is not blank."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
