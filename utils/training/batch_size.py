"""Batches that do not fit into the memory: found out in time, and said in one line with the largest that would.

A GPU says when its memory is used up; the largest batch that fits is then found by trial. On a CPU Linux promises
memory that it does not have and kills the process that uses it, so there the need is foreseen before a stage begins.
"""

import contextlib
import copy
import gc
import math
import mmap
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from utils import checkpoint, memory
from utils.batchnorm import SyncBatchNorm
from utils.config import Settings
from utils.device import autocast, describe
from utils.distributed import Ranks
from utils.errors import UserError
from utils.memory import exhausted, release_memory
from utils.training.progress import Stage
from utils.training.updater import Updater, parameters_of

# Bytes a pixel of a batch above which a step is measured first, far more than methods take: NeDR, the largest, took 26
# thousand at full width in float32 (AKNet 11, KA-Net 6).
AMPLE_BYTES = 100_000
FRAYED = 1.05  # steps that follow one another take up to so much of what is measured: the heap frays


class Guard:
    """Takes the steps of a ``stage`` of ``method``; that its batch does not fit becomes a `UserError`.

    On a CPU this is foreseen before the first step: forward and backward for one and for two pictures are measured on a
    copy of the method, unless there is ample room. That takes the time of half a step or so and changes no number of
    the run. After an error the run cannot go on: on a GPU the weights have then left it.
    """

    def __init__(self, method: nn.Module, stage: Stage, settings: Settings, device: torch.device, ranks: Ranks):
        self.method, self.stage, self.settings, self.device, self.ranks = method, stage, settings, device, ranks
        self.foreseen = device.type != "cpu"

    def step(self, updater: Updater, batches: Sequence[dict]) -> dict[str, Tensor]:
        """`Updater.step` on ``batches``. Raises `UserError` if there is too little memory for it."""
        if not self.foreseen:
            self.foresee(updater, batches[0])
            self.foreseen = True
        with contextlib.suppress(_LackError), _watched():
            return updater.step(lambda batch: self.method.losses(batch, self.stage.name), batches)
        raise self.refusal(self.try_out(batches[0]))  # out here the error is gone, and what it held of the step

    def foresee(self, updater: Updater, batch: dict[str, Any]) -> None:
        """Measure what the stage needs on a CPU. Raises `UserError`, in all processes, if that is more than is free."""
        free, most = self.free(), self.stage.batch
        if batch["hazy"][:, 0].numel() * AMPLE_BYTES <= free or not _measurable():
            return
        with self.double() as method, _AtMost(free):
            needs = measure(lambda n: self.play(method, batch, n), method, min(2, most))
        needs = [FRAYED * need + _moments(updater) for need in needs]
        fitting = min(most if len(needs) == min(2, most) else len(needs), _fitting(needs, free))
        fitting, needs = min(self.ranks.exchange((fitting, needs)))
        if fitting < most:
            raise self.refusal(fitting, free, needs)

    def free(self) -> float:
        """Bytes that this process may take on the CPU: its share of what the cache of pictures will leave."""
        release_memory()
        [least] = self.ranks.agree(-int(min(memory.free_memory(self.device), 2**60)))  # read before others measure
        return (-least - self.settings.data.cache * 2**30) / self.ranks.local_world

    def try_out(self, batch: dict[str, Any]) -> int:
        """The most pictures of a ``batch`` too large that fit, by trial of forward and backward; 0: not even one."""
        release(self.method, self.device)
        if self.device.type == "cuda":
            self.method.cpu()  # makes room for its double, which, unlike it, talks to no other process
        with self.double() as method:
            return largest(self.stage.batch, lambda n: self.fits(method, batch, n))

    def fits(self, method: nn.Module, batch: dict[str, Any], n: int) -> bool:
        with contextlib.suppress(_LackError), _watched():
            release(method, self.device)
            self.play(method, batch, n)
            return True
        return False

    @contextlib.contextmanager
    def double(self) -> Iterator[nn.Module]:
        """A copy of the method, to compute with as one likes: random states are put back afterwards."""
        states, method = checkpoint.random_states(), copy.deepcopy(self.method).to(self.device)
        for each in method.modules():
            if isinstance(each, SyncBatchNorm):
                each.eval()  # needs as much memory and does not wait for the other processes
        try:
            yield method
        finally:
            release(method, self.device)
            checkpoint.set_random_states(states)

    def play(self, method: nn.Module, batch: dict[str, Any], n: int) -> None:
        """Forward and backward of all losses for the first ``n`` pictures of ``batch``."""
        pending = method.losses({key: value[:n] for key, value in batch.items()}, self.stage.name)
        while True:
            with autocast(self.device, self.settings.precision):
                loss = next(pending, None)
            if loss is None:
                return
            loss.value.backward(retain_graph=loss.shared)

    def refusal(self, fitting: int, free: float = math.nan, needs: Sequence[float] = ()) -> UserError:
        """What to tell the user, where batches of up to ``fitting`` pictures fit."""
        what = f"a batch of {self.stage.batch} does not fit into the memory of {describe(self.device)}"
        if needs:
            needed = extrapolated(needs, self.stage.batch)
            what += f" (about {needed / 2**30:.1f} GiB are needed, {max(0.0, free) / 2**30:.1f} are free)"
        what += f"; the largest that does is {fitting}" if fitting else "; not even one picture does"
        options = remedies(self.stage, self.settings, fitting, _half(self.device))
        if not self.settings.train.checkpointing and _can_save(self.method):
            options.append("train.checkpointing=true")
        return UserError(f"{what}: set {_either(options)}; {self.ranks.saved}")


def measure(play: Callable[[int], None], method: nn.Module, most: int) -> list[float]:
    """Bytes that ``play(n)`` takes on the CPU at its peak, for n = 1, ..., ``most``, until memory does not suffice."""
    cpu, needs = torch.device("cpu"), []
    release(method, cpu)
    memory.reset_peak(cpu)
    before = memory.peak_memory(cpu)
    with contextlib.suppress(_LackError), _watched():
        for n in range(1, most + 1):
            play(n)
            needs.append(float(memory.peak_memory(cpu) - before))
            release(method, cpu)
            memory.reset_peak(cpu)
    return needs


def extrapolated(needs: Sequence[float], n: int) -> float:
    """Bytes for ``n`` pictures, of which one takes ``needs[0]`` and, if that is known, two take ``needs[1]``."""
    further = needs[1] - needs[0] if len(needs) > 1 else needs[0]
    return needs[0] + (n - 1) * max(1.0, further)


def largest(batch: int, fits: Callable[[int], bool]) -> int:
    """The largest n below ``batch``, which does not fit, for which ``fits(n)``: by halving, then bisection; 0: none."""
    low, high = 0, batch
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def remedies(stage: Stage, settings: Settings, fitting: int, half: str = "bf16") -> list[str]:
    """Settings with which it might fit; the first keeps, as nearly as possible, the number of pictures a step.

    ``half`` is the precision of 16 bit that the device has.
    """
    if not fitting:
        found = [f"a data.crop_size below {settings.data.crop_size}"]
    elif stage.name != "train":
        found = [f"{stage.name}.batch={fitting}"]
    else:
        batch, accumulate = divided(stage.per_step, fitting)
        pictures = batch * accumulate
        same = "as many pictures a step" if pictures == stage.per_step else f"{pictures} pictures a step"
        found = [f"train.batch={batch} train.accumulate={accumulate} ({same})"]
    if settings.precision == "float32":
        found.append(f"precision={half}")
    return found


def _half(device: torch.device) -> str:
    """The precision of 16 bit that ``device`` takes: older GPUs refuse bf16, CPUs fp16."""
    return "fp16" if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False) else "bf16"


def divided(pictures: int, most: int) -> tuple[int, int]:
    """A batch of at most ``most``, and how many of them make ``pictures``, or a few more if batches were tiny else."""
    for batch in range(most, most // 2, -1):
        if pictures % batch == 0:
            return batch, pictures // batch
    accumulate = -(-pictures // most)
    return -(-pictures // accumulate), accumulate


def release(method: nn.Module, device: torch.device) -> None:
    """Give back what computing with ``method`` has left: gradients, and memory that is kept for later."""
    method.zero_grad(set_to_none=True)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        release_memory()


class _LackError(Exception):
    """Memory is used up."""


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    """Turns a lack of memory inside into `_LackError`, without what it was raised from: that holds tensors."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not exhausted(error):
            raise
        raise _LackError from None


class _AtMost(TorchDispatchMode):
    """Inside, `_LackError` is raised before an operation that finds ``more`` bytes used than there were at first.

    Linux would kill the process; a limit set by setrlimit makes oneDNN crash where it does not expect one.
    """

    def __init__(self, more: float):
        super().__init__()
        self.limit = _resident() + more

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if _resident() > self.limit:
            raise _LackError
        return func(*args, **(kwargs or {}))


def _resident() -> int:
    """Bytes of memory that this process has in use; on Linux."""
    return int(memory.PROCESS.joinpath("statm").read_text().split()[1]) * mmap.PAGESIZE


def _measurable() -> bool:
    """Can this system forget an earlier peak?"""
    return sys.platform == "linux" and os.access(memory.PROCESS / "clear_refs", os.W_OK)


def _fitting(needs: Sequence[float], free: float) -> int:
    """How many pictures fit into ``free`` bytes, by `measure`, which stops where memory does not suffice."""
    if not needs or needs[0] > free:
        return 0
    return 1 + int((free - needs[0]) / (extrapolated(needs, 2) - needs[0]))


def _moments(updater: Updater) -> int:
    """Bytes that optimisers which have not stepped yet will hold: two moments of each parameter, as of Adam."""
    fresh = [optimiser for optimiser in updater.optimisers.values() if not optimiser.state]
    return sum(2 * p.numel() * p.element_size() for optimiser in fresh for p in parameters_of(optimiser))


def _can_save(method: nn.Module) -> bool:
    """Can ``method`` do with less memory? It does from now on; that is for the end of a run."""
    try:
        method.save_memory()
    except UserError:
        return False
    return True


def _either(options: Sequence[str]) -> str:
    *others, last = options
    return f"{', '.join(others)} or {last}" if others else last
