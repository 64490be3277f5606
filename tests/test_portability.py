"""What holds on systems that lack what is Linux's alone."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

ELSEWHERE = """
import importlib, os, pkgutil, signal, sys
import numpy, PIL, safetensors, skimage, tensorboard, timm, torch, torchvision, tqdm, yaml  # theirs may ask
import torch.utils.tensorboard, torch.utils.flop_counter, multiprocessing.pool, skimage.metrics, skimage.data
from pathlib import Path
for name in ("resource", "fcntl", "termios", "pwd", "grp", "_posixshmem"):
    sys.modules[name] = None
for module, names in (
    (os, ("sched_getaffinity", "fork", "killpg", "getuid", "geteuid", "getpgid", "setsid", "uname", "statvfs")),
    (signal, ("SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGCHLD", "alarm", "pthread_sigmask")),
):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
sys.platform = "win32"
from utils import memory
memory.PROCESS = Path("nowhere")
for package in ("utils", "data", "models", "losses", "benchmarks"):
    for module in pkgutil.walk_packages([package], f"{package}."):
        importlib.import_module(module.name)
import test, train
from data import loading
cpu = torch.device("cpu")
memory.reset_peak(cpu)
print(memory.peak_memory(cpu), memory.free_memory(cpu) > 0)
import models
print(models.load().dehaze(torch.rand(1, 3, 64, 64)).shape)
"""


@pytest.mark.slow
def test_every_module_works_without_unix_only_features():
    done = subprocess.run([sys.executable, "-c", ELSEWHERE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["0 True", "torch.Size([1, 3, 64, 64])"]
