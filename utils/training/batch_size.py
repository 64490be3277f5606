"""A batch that does not fit into memory: the error names the largest batch that does, and settings that help."""

import contextlib
import copy
import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from utils.batchnorm import SyncBatchNorm
from utils.config import Settings
from utils.device import autocast, describe
from utils.distributed import Ranks
from utils.errors import UserError
from utils.memory import release_memory, shortage_as
from utils.training.progress import Stage
from utils.training.updater import Updater


class MemoryGuard:
    """Takes the steps of a ``stage`` of ``method``; a lack of memory for a batch becomes a `UserError`.

    The run cannot continue after it: the weights have then been moved off the GPU. On a CPU Linux may kill the process
    first, since it overcommits memory.
    """

    def __init__(self, method: nn.Module, stage: Stage, settings: Settings, device: torch.device, ranks: Ranks):
        self.method = method
        self.stage = stage
        self.settings = settings
        self.device = device
        self.ranks = ranks

    def step(self, updater: Updater, batches: Sequence[dict]) -> dict[str, Tensor]:
        """`Updater.step` on ``batches``. Raises `UserError` if there is not enough memory for it."""
        with contextlib.suppress(_OutOfMemoryError), shortage_as(_OutOfMemoryError):
            return updater.step(lambda batch: self.method.losses(batch, self.stage.name), batches)
        # Outside the block, where the first error and the tensors that it referenced are freed.
        raise self.refusal(self.largest_batch(batches[0]))

    def largest_batch(self, batch: dict[str, Any]) -> int:
        """How many images of a too large ``batch`` fit, by trials of forward and backward; 0: not even one."""
        release(self.method, self.device)
        if self.device.type == "cuda":
            self.method.cpu()  # makes room for its copy
        method = copy.deepcopy(self.method).to(self.device)
        for each in method.modules():
            if isinstance(each, SyncBatchNorm):
                each.eval()  # takes the same memory and does not wait for other processes
        return largest(self.stage.batch, lambda n: self.fits(method, batch, n))

    def fits(self, method: nn.Module, batch: dict[str, Any], n: int) -> bool:
        with contextlib.suppress(_OutOfMemoryError), shortage_as(_OutOfMemoryError):
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
        """The error for the user, where batches of up to ``fitting`` images fit."""
        problem = f"a batch of {self.stage.batch} does not fit into the memory of {describe(self.device)}"
        problem += f"; the largest that does is {fitting}" if fitting else "; not even one image does"
        options = remedies(self.stage, self.settings, fitting, _half_precision(self.device))
        if not self.settings.train.checkpointing and _can_save_memory(self.method):
            options.append("train.checkpointing=true")
        return UserError(f"{problem}: set {_alternatives(options)}; {self.ranks.saved}")


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

    ``half`` is the 16-bit precision that the device supports.
    """
    if not fitting:
        options = [f"a data.crop_size below {settings.data.crop_size}"]
    elif stage.name != "train":
        options = [f"{stage.name}.batch={fitting}"]
    else:
        batch, accumulate = divided(stage.per_step, fitting)
        images = batch * accumulate
        same = "as many images a step" if images == stage.per_step else f"{images} images a step"
        options = [f"train.batch={batch} train.accumulate={accumulate} ({same})"]
    if settings.precision == "float32":
        options.append(f"precision={half}")
    return options


def _half_precision(device: torch.device) -> str:
    """The 16-bit precision that ``device`` supports: older GPUs have no bf16, CPUs no fp16."""
    return "fp16" if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False) else "bf16"


def divided(images: int, most: int) -> tuple[int, int]:
    """A batch of at most ``most``, and how many of them make ``images``, or slightly more to avoid tiny batches."""
    for batch in range(most, most // 2, -1):
        if images % batch == 0:
            return batch, images // batch
    accumulate = -(-images // most)
    return -(-images // accumulate), accumulate


def release(method: nn.Module, device: torch.device) -> None:
    """Free the gradients of ``method``, and memory that is cached for reuse."""
    method.zero_grad(set_to_none=True)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        release_memory()


class _OutOfMemoryError(Exception):
    """There is not enough memory."""


def _can_save_memory(method: nn.Module) -> bool:
    """Whether ``method`` supports ``save_memory``, which is then in effect; for use at the end of a run only."""
    try:
        method.save_memory()
    except UserError:
        return False
    return True


def _alternatives(options: Sequence[str]) -> str:
    *others, last = options
    return f"{', '.join(others)} or {last}" if others else last
