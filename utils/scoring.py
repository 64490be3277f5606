"""One way to score, for validation during training and for test.py alike."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from utils import metrics
from utils.errors import UserError

Dehaze = Callable[[Tensor], Tensor]  # (1,3,H,W) in [0,1] -> the same shape


@dataclass(frozen=True)
class Score:
    """Figures of one picture, or their mean over many: PSNR in dB and SSIM against the ground truth.

    ``hazy_psnr`` and ``hazy_ssim`` are those of the input, which any method must beat; ``seconds`` were spent dehazing.
    """

    name: str
    psnr: float
    ssim: float
    hazy_psnr: float
    hazy_ssim: float
    seconds: float


def score(
    dehaze: Dehaze, items: Sequence[dict], *, device: torch.device | str = "cpu", bar: str | None = None
) -> list[Score]:
    """Dehaze every one of ``items`` on ``device`` and compare it with its ground truth; see `each` and `compare`.

    ``bar`` names a progress bar, which vanishes at the end; None: none.
    """
    results = each(dehaze, items, device=device)
    progress = tqdm(results, bar, total=len(items), unit="picture", leave=False, disable=None if bar else True)
    return [compare(*result) for result in progress]


def each(
    dehaze: Dehaze,
    items: Sequence[dict],
    *,
    device: torch.device | str = "cpu",
    on_error: Callable[[UserError], None] | None = None,
) -> Iterator[tuple[dict, Tensor, float]]:
    """(item, dehazed picture (3,H,W) on the CPU, seconds) for every one of ``items``.

    ``items[k]``, k < len(items), is {hazy (3,H,W) in [0,1], name, ...}, as of `datasets.Paired` or `Folder`.
    One that cannot be used raises a `UserError`, or with ``on_error`` is handed to it and left out.
    """
    for index in range(len(items)):
        try:
            item = items[index]
            dehazed, seconds = _dehaze(dehaze, item, torch.device(device))
        except UserError as error:
            if on_error is None:
                raise
            on_error(error)
        else:
            yield item, dehazed, seconds


def compare(item: dict, dehazed: Tensor, seconds: float) -> Score:
    """The figures of ``dehazed`` and of the hazy input against ``item["clear"]``, all (3,H,W) in [0,1]."""
    hazy, clear = item["hazy"], item["clear"]
    ours = metrics.psnr(dehazed, clear), metrics.ssim(dehazed, clear)
    return Score(item["name"], *ours, metrics.psnr(hazy, clear), metrics.ssim(hazy, clear), seconds)


def mean(scores: Sequence[Score]) -> Score:
    """Means over pictures, infinite and undefined figures left out (`left_out` counts them); of seconds the median.

    The first picture on a GPU takes much longer than the others, hence the median.
    """
    columns = {key: [getattr(s, key) for s in scores] for key in ("psnr", "ssim", "hazy_psnr", "hazy_ssim")}
    seconds = statistics.median(s.seconds for s in scores) if scores else math.nan
    return Score("mean", **{key: _mean(values) for key, values in columns.items()}, seconds=seconds)


def left_out(values: Iterable[float]) -> int:
    """How many of these figures `mean` leaves out."""
    return sum(not math.isfinite(value) for value in values)


def _dehaze(dehaze: Dehaze, item: dict, device: torch.device) -> tuple[Tensor, float]:
    hazy, name = item["hazy"], item["name"]
    start = time.perf_counter()
    try:
        dehazed = dehaze(hazy[None].to(device))[0].float().cpu()  # to the CPU: so the GPU has finished
    except (torch.OutOfMemoryError, MemoryError):
        size = f"{hazy.shape[2]}x{hazy.shape[1]}"
        raise UserError(f"{name}: {size} pixels are too many for the memory of {device}; make it smaller") from None
    seconds = time.perf_counter() - start
    if not dehazed.isfinite().all():
        raise UserError(
            f"{name}: the model gives values that are not numbers; set precision=float32 or use other weights"
        )
    return dehazed, seconds


def _mean(values: Sequence[float]) -> float:
    """The mean of the finite ones; of none, what they all are (inf, as of perfect pictures), else nan."""
    finite = [value for value in values if math.isfinite(value)]
    if finite:
        return statistics.fmean(finite)
    return values[0] if values and len(set(values)) == 1 else math.nan
