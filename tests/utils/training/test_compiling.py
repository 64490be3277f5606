"""torch.compile, and the fallback without it."""

import pytest
import torch
from torch import nn
from torch._dynamo.exc import Unsupported

from utils.training import compiling


@pytest.fixture
def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.ReLU())


def test_a_missing_compiler_is_reported_once_and_nothing_changes(network, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("\nno working C++ compiler was found\nand much more")

    monkeypatch.setattr(torch, "compile", refuse)
    said = []
    compiling.compile_networks([("removal", network)], torch.device("cpu"), said.append)
    assert said == [
        "warning: compile=true, but PyTorch cannot compile here (RuntimeError: no working C++ compiler was found); "
        "running uncompiled"
    ]
    assert network._compiled_call_impl is None
    assert network(torch.ones(1, 3)).shape == (1, 3)


def test_a_network_that_cannot_be_compiled_runs_uncompiled(network, monkeypatch):
    def broken(*_):
        raise Unsupported("what is this?")

    said, x = [], torch.ones(1, 3)
    expected = network(x)
    network._compiled_call_impl = compiling._guarded("removal", network, broken, said.append)
    assert torch.equal(network(x), expected)
    assert torch.equal(network(x), expected)
    assert len(said) == 1
    assert said[0].startswith("warning: removal cannot be compiled (Unsupported: what is this?")


def test_an_error_of_the_network_itself_is_not_hidden(network):
    def wrong(*_):
        raise ValueError("the network's own")

    network._compiled_call_impl = compiling._guarded("removal", network, wrong, print)
    with pytest.raises(ValueError, match="own"):
        network(torch.ones(1, 3))
