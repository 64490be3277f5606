import mmap
import sys

import pytest
import torch
from torch import nn

from models import cost
from utils import files, memory

CPU = torch.device("cpu")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.used = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1))
        self.unused = nn.Linear(10, 10)

    def forward(self, x):
        return self.used(x)


def test_parameters_are_those_of_the_parts_that_are_used_without_buffers():
    assert cost.parameters(Net(), ["used"]) == (4 * 3 * 9 + 4) + 8 + (3 * 4 + 3)
    assert cost.parameters(Net(), []) == 0


def test_macs_of_convolutions():
    with torch.no_grad():
        assert cost.macs(Net().eval(), side=32) == 32 * 32 * (4 * 3 * 9 + 3 * 4)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets an earlier peak")
def test_the_peak_is_that_since_the_reset():
    size = 200 * 2**20
    block = mmap.mmap(-1, size)  # not from the heap, which may keep what is freed
    block.write(bytes(size))
    before = memory.peak_memory(CPU)
    assert before >= size
    block.close()
    memory.reset_peak(CPU)
    assert memory.peak_memory(CPU) < before - size / 2


def test_without_a_resettable_peak_that_of_the_process_is_given(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "PROCESS", tmp_path / "absent")
    memory.reset_peak(CPU)
    assert memory.peak_memory(CPU) > 2**20


def test_the_digest_of_a_file(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"abc")
    assert files.sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
