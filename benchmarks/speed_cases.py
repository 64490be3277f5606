"""What benchmarks.speed measures, one case in a process of its own: so each has its own memory, and no other's heap.

A case is NeDR's ``forward`` (whole image, `Method.dehaze`), ``step`` (adversarial training, all three optimisers) or
``tiled`` (a large image in tiles), by this code base or by the ``reference``, the released code written down step by
step (tests/models/nedr_reference.py), which takes the same weights; or ``loading``, the images for such steps.
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
from utils import config, device, memory
from utils.training import batch_size, progress
from utils.training.compiling import compile_networks
from utils.training.updater import Updater

OVERRIDES = ("nedr.variant=released", "nedr.airlight=max", "nedr.encoder_weights=none", "train.ema=0")
CROP, WORKERS = 256, 2  # pixels of the images loaded for training, and processes that do it
SECONDS = 10.0  # a case is repeated until it has taken so long, but at least thrice after the first pass


class Case(NamedTuple):
    """What is measured: of whom (``reference`` or ``ours``), in what precision, at what size in pixels."""

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
        further = [", compiled"] * self.compiled + [", checkpointing"] * self.checkpointing
        return "reference" if self.of == "reference" else self.precision + "".join(further)


class Run(NamedTuple):
    """How often a case was run, and what it took: medians and extremes in seconds, memory in bytes."""

    seconds: list[float]
    memory: int
    flops: int
    psnr: float | None = None  # of reduced precision, against float32; dB
    batch: int = 1

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def measure(case: Case, place: torch.device, repeats: int) -> Run:
    """Run the case; memory is the peak beyond what the process held before, weights and optimisers not counted."""
    torch.manual_seed(0)
    if case.kind == "loading":
        return _loading(case, repeats)
    if not case.batch:
        case = case._replace(batch=_largest(case, place))
    if case.of == "ours":
        memory.keep_memory()
    act, compare = _reference(case, place) if case.of == "reference" else _ours(case, place)
    if case.compiled:
        act()
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _backward}) as counter:
        act()
    memory.release_memory()
    memory.reset_peak(place)
    before, seconds, began = memory.peak_memory(place), [], time.perf_counter()
    while len(seconds) < 3 or (len(seconds) < repeats and time.perf_counter() - began < SECONDS):
        seconds.append(_timed(act, place))
    taken = memory.peak_memory(place) - before
    return Run(seconds, taken, counter.get_total_flops(), compare and compare(), case.batch)


def ceiling(place: torch.device, precision: str) -> float:
    """The best of a large matrix product and a large convolution on this machine, in FLOP/s."""
    dtype = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    size = 2048 if place.type == "cpu" else 8192
    a = torch.randn(size, size, device=place, dtype=dtype)
    x = torch.randn(1, 256, 128, 128, device=place, dtype=dtype).to(memory_format=torch.channels_last)
    w = torch.randn(64, 256, 5, 5, device=place, dtype=dtype).to(memory_format=torch.channels_last)
    works = {lambda: a @ a: 2 * size**3, lambda: torch.conv2d(x, w, padding=2): 2 * 64 * 256 * 25 * 128**2}
    with torch.no_grad():
        return max(flops / min(_timed(work, place) for _ in range(6)) for work, flops in works.items())


def _timed(act: Callable[[], Any], place: torch.device) -> float:
    _wait(place)
    start = time.perf_counter()
    act()
    _wait(place)
    return time.perf_counter() - start


def _wait(place: torch.device) -> None:
    if place.type == "cuda":
        torch.cuda.synchronize(place)


def _backward(grad: list[int], x: list[int], weight: list[int], *others: Any, **_: Any) -> int:
    """FLOPs of aten.convolution_backward; PyTorch's formula takes a depthwise weight's gradient for a dense one's."""
    return 2 * math.prod(grad) * math.prod(weight[1:]) * sum(others[-1][:2])  # the last one: which gradients


def _reference(case: Case, place: torch.device) -> tuple[Callable, None]:
    torch.set_default_device(place)
    reference = ReferenceTraining().to(place)
    hazy, clear = _pictures(case, place)
    if case.kind == "step":
        reference.train()
        return lambda: reference.step(hazy, clear, torch.rand(case.batch, 1, 1, 1) + 0.6), None
    reference.eval()
    return torch.no_grad()(lambda: reference.net_h2c(hazy)), None


def _ours(case: Case, place: torch.device) -> tuple[Callable, Callable | None]:
    values = config.load(
        "nedr", models.settings_types(), overrides=(*OVERRIDES, f"precision={case.precision}", "train.steps=1000")
    )
    method = models.build(values)
    method.start()
    if case.checkpointing:
        method.save_memory()
    method.to(place)
    hazy, clear = _pictures(case, place)
    if case.compiled:
        compile_networks(method.named_children(), place, lambda line: print(line, file=sys.stderr))
    if case.kind == "step":
        updater = Updater(method.train().optimisers("train", values), progress.stages(values)[0], values, place)
        return lambda: updater.step(lambda b: method.losses(b, "train"), [{"hazy": hazy, "clear": clear}]), None
    method.eval()
    tile = 512 if case.kind == "tiled" else None

    def dehaze(precision: str = case.precision) -> Tensor:
        with device.autocast(place, precision):
            return method.dehaze(hazy, tile)

    def compare() -> float:
        error = (dehaze().float() - dehaze("float32")).square().mean().item()
        return -10 * math.log10(error) if error else math.inf

    return dehaze, compare if case.precision != "float32" else None


def _largest(case: Case, place: torch.device) -> int:
    """The most crops that can be trained on at once: doubled until they do not fit, then by bisection."""

    def fits(n: int) -> bool:
        if place.type == "cuda":
            torch.cuda.empty_cache()
        try:
            _ours(case._replace(batch=n), place)[0]()
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
    """Batches of hazy and clear crops, of images of the case's size that have been decoded before."""
    with tempfile.TemporaryDirectory() as folder:
        hazy, clear = _pictures(case._replace(batch=12), torch.device("cpu"))
        _save(hazy, Path(folder, "hazy"))
        _save(clear, Path(folder, "clear"))
        pools = (f"data.hazy={folder}/hazy", f"data.clear={folder}/clear", f"data.crop_size={CROP}")
        values = config.load("nedr", models.settings_types(), overrides=(*OVERRIDES, *pools))
        stream = datasets.training(values, "train", "unpaired", Cache(values.data.cache))
        with closing(iter(loading.loader(stream, 0, 10**6 * case.batch, case.batch, WORKERS))) as batches:
            _several(batches)
            return Run([_several(batches) for _ in range(max(3, repeats))], 0, 0, batch=case.batch)


def _several(batches: Iterator[dict], count: int = 20) -> float:
    """Seconds for one of so many batches."""
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    return (time.perf_counter() - start) / count


def _save(pictures: Tensor, folder: Path) -> None:
    folder.mkdir()
    for k, picture in enumerate((pictures * 255).byte().permute(0, 2, 3, 1).numpy()):
        Image.fromarray(picture).save(folder / f"{k}.jpg")


def _pictures(case: Case, place: torch.device) -> tuple[Tensor, Tensor]:
    """Smooth images with some grain, hazy and clear (N,3,H,W) in [0,1]."""
    coarse = torch.rand(2, case.batch, 3, 8, 8, device=place)
    smooth = torch.nn.functional.interpolate(coarse.flatten(0, 1), (case.height, case.width), mode="bicubic")
    smooth = (smooth + 0.05 * torch.randn_like(smooth)).clamp(0, 1).unflatten(0, (2, case.batch))
    return smooth[0] * 0.5 + 0.4, smooth[1]


if __name__ == "__main__":  # started by benchmarks.speed, with the case as JSON
    case, place, repeats, threads = json.loads(sys.argv[1])
    if threads:
        torch.set_num_threads(threads)
    if case is None:
        kinds = ("float32", "bf16") if torch.device(place).type == "cpu" else ("float32", "bf16", "fp16")
        found = {kind: ceiling(torch.device(place), kind) for kind in kinds}
        found |= {"device": device.describe(torch.device(place)), "threads": torch.get_num_threads()}
        print(json.dumps(found | {"torch": torch.__version__}))
    else:
        print(json.dumps(measure(Case(*case), torch.device(place), repeats)._asdict()))
