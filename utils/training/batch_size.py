"""A batch that does not fit into memory: caught, halved until it fits, and said in one line."""

import contextlib
import copy
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from utils.batchnorm import SyncBatchNorm
from utils.config import Settings
from utils.device import autocast, describe
from utils.distributed import Ranks
from utils.errors import UserError
from utils.memory import exhausted, release_memory
from utils.training.progress import Stage
from utils.training.updater import Updater


class Guard:
    """Takes the steps of a ``stage`` of ``method``; that its batch does not fit becomes a `UserError`.

    After it the run cannot go on: on a GPU the weights have then left it. On a CPU Linux may end the process first: it
    promises memory that it does not have.
    """

    def __init__(self, method: nn.Module, stage: Stage, settings: Settings, device: torch.device, ranks: Ranks):
        self.method = method
        self.stage = stage
        self.settings = settings
        self.device = device
        self.ranks = ranks

    def step(self, updater: Updater, batches: Sequence[dict]) -> dict[str, Tensor]:
        """`Updater.step` on ``batches``. Raises `UserError` if there is too little memory for it."""
        with contextlib.suppress(_OutOfMemoryError), _memory_errors():
            return updater.step(lambda batch: self.method.losses(batch, self.stage.name), batches)
        raise self.refusal(self.largest_batch(batches[0]))  # out here the error is gone, and what it held of the step

    def largest_batch(self, batch: dict[str, Any]) -> int:
        """How many images of a ``batch`` too large do fit, by trial of forward and backward; 0: not even one."""
        release(self.method, self.device)
        if self.device.type == "cuda":
            self.method.cpu()  # makes room for its copy, which, unlike it, talks to no other process
        method = copy.deepcopy(self.method).to(self.device)
        for each in method.modules():
            if isinstance(each, SyncBatchNorm):
                each.eval()  # needs as much memory and does not wait for the other processes
        return largest(self.stage.batch, lambda n: self.fits(method, batch, n))

    def fits(self, method: nn.Module, batch: dict[str, Any], n: int) -> bool:
        with contextlib.suppress(_OutOfMemoryError), _memory_errors():
            release(method, self.device)
            self.forward_backward(method, batch, n)
            return True
        return False

    def forward_backward(self, method: nn.Module, batch: dict[str, Any], n: int) -> None:
        """Forward and backward of all losses for the first ``n`` images of ``batch``."""
        pending = method.losses({key: value[:n] for key, value in batch.items()}, self.stage.name)
        while True:
            with autocast(self.device, self.settings.precision):
                loss = next(pending, None)
            if loss is None:
                return
            loss.value.backward(retain_graph=loss.shared)

    def refusal(self, fitting: int) -> UserError:
        """What to tell the user, where batches of up to ``fitting`` images fit."""
        what = f"a batch of {self.stage.batch} does not fit into the memory of {describe(self.device)}"
        what += f"; the largest that does is {fitting}" if fitting else "; not even one image does"
        options = remedies(self.stage, self.settings, fitting, _half(self.device))
        if not self.settings.train.checkpointing and _can_save(self.method):
            options.append("train.checkpointing=true")
        return UserError(f"{what}: set {_either(options)}; {self.ranks.saved}")


def largest(batch: int, fits: Callable[[int], bool]) -> int:
    """The largest n below ``batch``, which does not fit, for which ``fits(n)``: by halving, then bisection; 0: none."""
    low, high = 0, batch
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def remedies(stage: Stage, settings: Settings, fitting: int, half: str = "bf16") -> list[str]:
    """Settings with which it might fit; the first keeps, as nearly as possible, the number of images a step.

    ``half`` is the precision of 16 bit that the device has.
    """
    if not fitting:
        found = [f"a data.crop_size below {settings.data.crop_size}"]
    elif stage.name != "train":
        found = [f"{stage.name}.batch={fitting}"]
    else:
        batch, accumulate = divided(stage.per_step, fitting)
        images = batch * accumulate
        same = "as many images a step" if images == stage.per_step else f"{images} images a step"
        found = [f"train.batch={batch} train.accumulate={accumulate} ({same})"]
    if settings.precision == "float32":
        found.append(f"precision={half}")
    return found


def _half(device: torch.device) -> str:
    """The precision of 16 bit that ``device`` takes: older GPUs refuse bf16, CPUs fp16."""
    return "fp16" if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False) else "bf16"


def divided(images: int, most: int) -> tuple[int, int]:
    """A batch of at most ``most``, and how many of them make ``images``, or a few more if batches were tiny else."""
    for batch in range(most, most // 2, -1):
        if images % batch == 0:
            return batch, images // batch
    accumulate = -(-images // most)
    return -(-images // accumulate), accumulate


def release(method: nn.Module, device: torch.device) -> None:
    """Give back what computing with ``method`` has left: gradients, and memory that is kept for later."""
    method.zero_grad(set_to_none=True)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        release_memory()


class _OutOfMemoryError(Exception):
    """There is too little memory."""


@contextlib.contextmanager
def _memory_errors() -> Iterator[None]:
    """Turns a lack of memory inside into `_OutOfMemoryError`, without what it was raised from: that holds tensors."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not exhausted(error):
            raise
        raise _OutOfMemoryError from None


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
