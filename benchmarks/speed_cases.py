"""The cases that benchmarks.speed measures, each in its own process, so that memory is measured independently.

A case is NeDR's ``forward`` (whole image, `Method.dehaze`), ``step`` (adversarial training, all three optimisers) or
``tiled`` (a large image in tiles), by this code base or by the ``reference``, a step-by-step copy of the released code
(tests/models/nedr_reference.py), which takes the same weights; or ``loading``, the images for such steps.
"""

import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import models
from data import datasets, loading
from data.cache import Cache
from tests.models.nedr_reference import ReferenceTraining
from utils import config, memory
from utils import device as devices
from utils.training import batch_size, progress
from utils.training.compiling import compile_networks
from utils.training.updater import Updater

OVERRIDES = ("nedr.variant=released", "nedr.airlight=max", "nedr.encoder_weights=none", "train.ema=0")
CROP = 256  # pixels of a side of the crops loaded for training
WORKERS = 2  # processes that load them
SECONDS = 10.0  # a case is repeated for so long, but at least three times after the first pass


class Case(NamedTuple):
    """What is measured: whose code (``of``: ``reference`` or ``ours``), the precision and the size in pixels."""

    kind: str
    of: str
    precision: str
    height: int
    width: int
    batch: int = 1  # 0: the largest that fits
    compiled: bool = False
    checkpointing: bool = False

    @property
    def label(self) -> str:
        suffixes = [", compiled"] * self.compiled + [", checkpointing"] * self.checkpointing
        return "reference" if self.of == "reference" else self.precision + "".join(suffixes)


class Run(NamedTuple):
    """The measurements of a case: the seconds of every repeat, peak memory in bytes, FLOPs."""

    seconds: list[float]
    memory: int
    flops: int
    psnr: float | None = None  # in dB, reduced precision against float32
    batch: int = 1

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def measure(case: Case, device: torch.device, repeats: int) -> Run:
    """Run the case; ``memory`` is the peak minus the memory used before, such as weights and optimisers."""
    torch.manual_seed(0)
    if case.kind == "loading":
        return _loading(case, repeats)
    if not case.batch:
        case = case._replace(batch=_largest(case, device))
    if case.of == "ours":
        memory.keep_memory()
    run, compare = _reference(case, device) if case.of == "reference" else _ours(case, device)
    if case.compiled:
        run()
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _backward}) as counter:
        run()
    memory.release_memory()
    memory.reset_peak(device)
    before = memory.peak_memory(device)
    seconds = []
    start = time.perf_counter()
    while len(seconds) < 3 or (len(seconds) < repeats and time.perf_counter() - start < SECONDS):
        seconds.append(_timed(run, device))
    peak = memory.peak_memory(device) - before
    return Run(seconds, peak, counter.get_total_flops(), compare and compare(), case.batch)


def ceiling(device: torch.device, precision: str) -> float:
    """The best of a large matrix product and a large convolution on this machine, in FLOP/s."""
    dtype = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    size = 2048 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=dtype)
    x = torch.randn(1, 256, 128, 128, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    w = torch.randn(64, 256, 5, 5, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    flops = {lambda: a @ a: 2 * size**3, lambda: torch.conv2d(x, w, padding=2): 2 * 64 * 256 * 25 * 128**2}
    with torch.no_grad():
        return max(count / min(_timed(run, device) for _ in range(6)) for run, count in flops.items())


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _backward(grad: list[int], x: list[int], weight: list[int], *others: Any, **_: Any) -> int:
    """FLOPs of aten.convolution_backward; PyTorch's formula counts a depthwise weight's gradient as a dense one's."""
    return 2 * math.prod(grad) * math.prod(weight[1:]) * sum(others[-1][:2])  # the last: which gradients are wanted


def _reference(case: Case, device: torch.device) -> tuple[Callable, None]:
    torch.set_default_device(device)
    reference = ReferenceTraining().to(device)
    hazy, clear = _images(case, device)
    if case.kind == "step":
        reference.train()
        return lambda: reference.step(hazy, clear, torch.rand(case.batch, 1, 1, 1) + 0.6), None
    reference.eval()
    return torch.no_grad()(lambda: reference.net_h2c(hazy)), None


def _ours(case: Case, device: torch.device) -> tuple[Callable, Callable | None]:
    values = config.load(
        "nedr", models.settings_types(), overrides=(*OVERRIDES, f"precision={case.precision}", "train.steps=1000")
    )
    method = models.build(values)
    method.start()
    if case.checkpointing:
        method.save_memory()
    method.to(device)
    hazy, clear = _images(case, device)
    if case.compiled:
        compile_networks(method.named_children(), device, lambda line: print(line, file=sys.stderr))
    if case.kind == "step":
        updater = Updater(method.train().optimisers("train", values), progress.stages(values)[0], values, device)
        return lambda: updater.step(lambda b: method.losses(b, "train"), [{"hazy": hazy, "clear": clear}]), None
    method.eval()
    tile = 512 if case.kind == "tiled" else None

    def dehaze(precision: str = case.precision) -> Tensor:
        with devices.autocast(device, precision):
            return method.dehaze(hazy, tile)

    def compare() -> float:
        error = (dehaze().float() - dehaze("float32")).square().mean().item()
        return -10 * math.log10(error) if error else math.inf

    return dehaze, compare if case.precision != "float32" else None


def _largest(case: Case, device: torch.device) -> int:
    """The largest batch that fits into memory: doubled until it does not fit, then by bisection."""

    def fits(n: int) -> bool:
        if device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            _ours(case._replace(batch=n), device)[0]()
        except (MemoryError, RuntimeError) as error:
            if not memory.exhausted(error):
                raise
            return False
        return True

    n = 1
    while fits(n):
        n *= 2
    if n == 1:
        raise MemoryError("out of memory for a single crop")
    return batch_size.largest(n, fits)


def _loading(case: Case, repeats: int) -> Run:
    """Load batches of hazy and clear crops from images of the case's size, which are decoded before."""
    with tempfile.TemporaryDirectory() as folder:
        hazy, clear = _images(case._replace(batch=12), torch.device("cpu"))
        _save(hazy, Path(folder, "hazy"))
        _save(clear, Path(folder, "clear"))
        pools = (f"data.hazy={folder}/hazy", f"data.clear={folder}/clear", f"data.crop_size={CROP}")
        values = config.load("nedr", models.settings_types(), overrides=(*OVERRIDES, *pools))
        stream = datasets.training(values, "train", "unpaired", Cache(values.data.cache))
        with closing(iter(loading.loader(stream, 0, 10**6 * case.batch, case.batch, WORKERS))) as batches:
            _seconds_per_batch(batches)
            return Run([_seconds_per_batch(batches) for _ in range(max(3, repeats))], 0, 0, batch=case.batch)


def _seconds_per_batch(batches: Iterator[dict], count: int = 20) -> float:
    """The mean over ``count`` batches."""
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    return (time.perf_counter() - start) / count


def _save(images: Tensor, folder: Path) -> None:
    folder.mkdir()
    for k, pixels in enumerate((images * 255).byte().permute(0, 2, 3, 1).numpy()):
        Image.fromarray(pixels).save(folder / f"{k}.jpg")


def _images(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """Smooth random images with some noise, hazy and clear (N,3,H,W) in [0,1]."""
    coarse = torch.rand(2, case.batch, 3, 8, 8, device=device)
    smooth = torch.nn.functional.interpolate(coarse.flatten(0, 1), (case.height, case.width), mode="bicubic")
    smooth = (smooth + 0.05 * torch.randn_like(smooth)).clamp(0, 1).unflatten(0, (2, case.batch))
    return smooth[0] * 0.5 + 0.4, smooth[1]


if __name__ == "__main__":  # started by benchmarks.speed, with the case as JSON
    case, name, repeats, threads = json.loads(sys.argv[1])
    device = torch.device(name)
    if threads:
        torch.set_num_threads(threads)
    if case is None:
        precisions = ("float32", "bf16") if device.type == "cpu" else ("float32", "bf16", "fp16")
        machine = {precision: ceiling(device, precision) for precision in precisions}
        machine |= {"device": devices.describe(device), "threads": torch.get_num_threads()}
        print(json.dumps(machine | {"torch": torch.__version__}))
    else:
        print(json.dumps(measure(Case(*case), device, repeats)._asdict()))
