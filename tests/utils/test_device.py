"""Precisions that a device can do, and memory that is kept."""

import os
import subprocess
import sys

import pytest
import torch

from utils import device
from utils.errors import UserError

CPU = torch.device("cpu")


def test_a_processor_without_bf16_units_is_warned_about(monkeypatch):
    monkeypatch.setattr(device, "_is_arm", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    (remark,) = device.warnings(CPU, "bf16")
    assert "precision=float32 will be faster" in remark
    assert device.warnings(CPU, "float32") == []
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert device.warnings(CPU, "bf16") == []


def test_a_gpu_without_bf16_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "GeForce of 2016")
    with pytest.raises(UserError, match="GeForce of 2016 has no bf16; set precision=fp16 or precision=float32"):
        device.autocast(torch.device("cuda"), "bf16")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_kept_memory_causes_no_page_faults():
    """Page faults of a computation that is repeated: none, if its memory was kept."""
    program = """
import resource, torch
from utils import memory
def work(x):
    for _ in range(4):
        x = torch.cat([x, x.exp()])
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
{}
for k in range(8):
    before = faults() if k == 4 else before if k else 0
    work(torch.rand(2**20))
print(faults() - before)
"""
    faults = []
    for first in ("pass", "memory.keep_memory()"):
        command = [sys.executable, "-c", program.format(first)]
        faults.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    assert faults[1] * 5 < faults[0]


@pytest.mark.parametrize(("precision", "tf32"), [("float32", False), ("tf32", True), ("bf16", True), ("fp16", True)])
def test_tf32_on_a_gpu_follows_the_precision(monkeypatch, precision, tf32):
    """Of matrices and of convolutions alike; and the GPU that was asked for is the current one."""
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    parts = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [part.allow_tf32 for part in parts]
    try:
        device.prepare(torch.device("cuda", 1), precision)
        assert current == [torch.device("cuda", 1)]
        assert [part.allow_tf32 for part in parts] == [tf32, tf32]
    finally:
        for part, value in zip(parts, before, strict=True):
            part.allow_tf32 = value


def test_cudnn_benchmark_is_off_where_sizes_vary():
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        with device.without_benchmark():
            assert not torch.backends.cudnn.benchmark
        assert torch.backends.cudnn.benchmark
    finally:
        torch.backends.cudnn.benchmark = before


def test_tf32_needs_a_gpu():
    with pytest.raises(UserError, match="precision=tf32 needs a GPU"):
        device.autocast(torch.device("cpu"), "tf32")


def test_deterministic_mode_uses_only_deterministic_algorithms(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        device.prepare(torch.device("cpu"), "float32", deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.deterministic
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert device.warnings(torch.device("cuda"), "float32", True) == [
            "deterministic=true: slower; CUBLAS_WORKSPACE_CONFIG=:4096:8 is in force"
        ]
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":8:1")
        with pytest.raises(UserError, match="with CUBLAS_WORKSPACE_CONFIG=:8:1; unset it"):
            device.prepare(torch.device("cpu"), "float32", deterministic=True)
    finally:
        device.prepare(torch.device("cpu"), "float32")
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_operation_without_a_deterministic_form_is_named():
    message = "grid_sampler_2d_backward_cuda does not have a deterministic implementation, but you set ..."
    with (
        pytest.raises(UserError, match=r"^deterministic=true: grid_sampler_2d_backward_cuda has no .* on cpu"),
        device.deterministic_errors(torch.device("cpu")),
    ):
        raise RuntimeError(message)
    with pytest.raises(RuntimeError, match="other"), device.deterministic_errors(torch.device("cpu")):
        raise RuntimeError("other")
