"""Dehazing and measuring of many images, for validation during training and for test.py.

Reading, the network, and measuring and saving run in parallel: threads read the next images and finish the previous
ones while the network processes the current one. The time is counted by stage.
"""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Subset
from tqdm import tqdm

from utils.errors import ImageError, UserError
from utils.evaluation import metrics
from utils.memory import release_memory, shortage_as

Dehaze = Callable[[Tensor], Tensor]  # (1,3,H,W) in [0,1] -> the same shape
Measure = Callable[[dict, Tensor], dict[str, float]]  # an item and its dehazed image (3,H,W) -> figures by name
Save = Callable[[dict, Tensor], None]
STAGES = ("reading", "dehazing", "measuring", "saving")
LARGE = 8_000_000  # pixels: larger images are processed one at a time, to save memory


class Remedies(NamedTuple):
    """What error messages recommend where memory does not suffice, and where results are not finite."""

    memory: str = "take smaller images"
    numbers: str = "use other weights"


# For validation during training, where test-time settings do not apply.
VALIDATION = Remedies(
    "set test.tile=512, or take smaller validation images", "training has diverged: lower the learning rate"
)


@dataclass(frozen=True)
class Score:
    """Figures of one image by name (ours.psnr, ours.ssim, ...); ``seconds`` were spent dehazing it."""

    name: str
    width: int
    height: int
    seconds: float
    figures: dict[str, float]


@dataclass
class Outcome:
    """The results of a pass over many images: their scores in order, and the errors of those skipped.

    ``seconds`` by stage are summed over threads; ``wall`` is the elapsed time, ``waiting`` the part of it in which the
    network waited for images to be read or finished.
    """

    scores: list[Score] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys((*STAGES, "wall", "waiting"), 0.0))


def score(
    dehaze: Dehaze, items: Sequence[dict], *, device: torch.device | str = "cpu", bar: str | None = None
) -> list[Score]:
    """Figures of every one of ``items`` under the default protocol, and ``hazy.psnr``, that of the hazy image.

    ``items`` as of `run`; raises `UserError` for the first that cannot be used.
    """

    def measure(item: dict, dehazed: Tensor) -> dict[str, float]:
        hazy, clear = item["hazy"], item["clear"]
        return metrics.figures(dehazed, clear, ["ours"]) | {"hazy.psnr": metrics.psnr(hazy, clear)}

    def stop(error: UserError) -> None:
        raise error

    return run(dehaze, items, measure, device=device, on_error=stop, bar=bar, remedies=VALIDATION).scores


def run(
    dehaze: Dehaze,
    items: Sequence[dict],
    measure: Measure | None = None,
    save: Save | None = None,
    *,
    device: torch.device | str = "cpu",
    workers: int = 0,
    indices: Sequence[int] | None = None,
    on_score: Callable[[Score], None] | None = None,
    on_error: Callable[[UserError], None] | None = None,
    bar: str | None = None,
    remedies: Remedies = Remedies(),  # noqa: B008 (immutable)
) -> Outcome:
    """Dehaze ``items`` (those at ``indices``; by default all) on ``device``, measure each and save it.

    ``items[k]``, k < len(items), is {hazy (3,H,W) in [0,1], name, ...}, as of `pictures.Paired` or `Folder`. The error
    of one that cannot be read, dehazed or measured is passed to ``on_error``, and the image is left out; so is one for
    which ``save`` raises `ImageError`. Other errors of ``save`` end the run, since they would recur for the next image.
    ``on_score`` is called with every score, in order, when the image is finished. ``workers`` threads read ahead and as
    many finish; 0: everything in turn. ``bar`` names a progress bar, ``remedies`` has the recommendations of errors.
    """
    outcome = Outcome()
    device = torch.device(device)
    start = time.perf_counter()
    order = range(len(items)) if indices is None else indices
    pending: deque[Future] = deque()
    size = None

    def collect(limit: int) -> None:
        while len(pending) > limit:
            _collect(pending.popleft().result(), outcome, on_score, on_error)
            progress.update()

    progress = tqdm(total=len(order), desc=bar, unit="image", leave=False, disable=None if bar else True)
    with _pool(workers) as readers, _pool(workers) as finishers, progress:
        with closing(_read_ahead(readers, lambda k: _read(items, k), order, workers)) as arriving:
            for arrived in arriving:
                if arrived.item is not None:
                    previous = size
                    size = arrived.item["hazy"].shape
                    if device.type == "cpu" and previous not in (None, size):
                        release_memory()
                done = _dehaze(dehaze, arrived, device, remedies)
                if device.type == "cpu" and _large(done):
                    release_memory()  # for measuring and saving
                pending.append(finishers.submit(_finish, done, measure, save, remedies))
                collect(0 if _large(done) else workers)
        collect(0)
    seconds = outcome.seconds
    seconds["wall"] = time.perf_counter() - start
    seconds["waiting"] = max(0.0, seconds["wall"] - seconds["dehazing"])
    return outcome


def mean(scores: Sequence[Score]) -> dict[str, float]:
    """Means over images by figure, infinite and undefined ones left out (`left_out` counts them)."""
    return {key: _mean([score.figures[key] for score in scores]) for key in _keys(scores)}


def left_out(scores: Sequence[Score]) -> dict[str, int]:
    """How many values `mean` leaves out, by figure; only figures with any."""
    counts = {key: sum(not math.isfinite(score.figures[key]) for score in scores) for key in _keys(scores)}
    return {key: count for key, count in counts.items() if count}


def median_seconds(scores: Sequence[Score]) -> float:
    """Seconds an image: the median, since the first image on a GPU takes much longer than the others."""
    return statistics.median(score.seconds for score in scores) if scores else math.nan


@dataclass
class _Work:
    """The state of an image in the stages; ``error`` is set if one of them failed."""

    item: dict | None = None
    dehazed: Tensor | None = None
    score: Score | None = None
    error: UserError | None = None
    seconds: dict[str, float] = field(default_factory=dict)


@contextmanager
def _timed(work: _Work, stage: str, caught: type[UserError] = UserError) -> Iterator[None]:
    """Count the seconds of a stage; an error of the type ``caught`` is stored in ``work``, which is then left out."""
    start = time.perf_counter()
    try:
        yield
    except caught as error:
        work.error = error
    finally:
        work.seconds[stage] = time.perf_counter() - start


def _read(items: Sequence[dict], index: int) -> _Work:
    work = _Work()
    with _timed(work, "reading"):
        what = "there is not enough memory to read it; shrink it"
        with shortage_as(lambda: UserError(f"{_name(items, index)}: {what}")):
            work.item = items[index]
    return work


def _name(items: Any, index: int) -> str:
    """The name of an item that could not be read; of several processes each has a subset."""
    if isinstance(items, Subset):
        return _name(items.dataset, items.indices[index])
    return items.names[index]


def _dehaze(dehaze: Dehaze, work: _Work, device: torch.device, remedies: Remedies) -> _Work:
    if work.error is None:
        with _timed(work, "dehazing"):
            work.dehazed = _dehazed(dehaze, work.item, device, remedies)
    return work


def _dehazed(dehaze: Dehaze, item: dict, device: torch.device, remedies: Remedies) -> Tensor:
    with enough_memory(item, device, remedies):
        dehazed = dehaze(item["hazy"][None].to(device))[0].float()
        finite = bool(dehazed.isfinite().all())  # waits for a GPU
    if not finite:
        raise UserError(f"{item['name']}: the model's output has values that are not numbers; {remedies.numbers}")
    return dehazed


def enough_memory(item: dict, device: torch.device, remedies: Remedies) -> AbstractContextManager[None]:
    """Turns a lack of memory inside into a `UserError` that names the image, its size and the remedy."""
    height, width = item["hazy"].shape[1:]
    problem = f"{item['name']}: {width}x{height} pixels are too many for the memory of {device}"
    return shortage_as(lambda: ImageError(f"{problem}; {remedies.memory}"))


def _finish(work: _Work, measure: Measure | None, save: Save | None, remedies: Remedies) -> _Work:
    """Measure and save, on a finishing thread."""
    if work.error is not None:
        return work
    item = work.item
    dehazed = work.dehazed
    figures = {}
    cpu = torch.device("cpu")
    if measure is not None:
        with _timed(work, "measuring"), enough_memory(item, cpu, remedies):
            figures = measure(item, dehazed)
    if save is not None and work.error is None:
        with _timed(work, "saving", caught=ImageError), enough_memory(item, cpu, remedies):
            save(item, dehazed)
    if work.error is None:
        height, width = dehazed.shape[1:]
        work.score = Score(item["name"], width, height, work.seconds["dehazing"], figures)
    work.item = work.dehazed = None  # free their memory
    return work


def _collect(work: _Work, outcome: Outcome, on_score: Callable | None, on_error: Callable | None) -> None:
    for stage, seconds in work.seconds.items():
        outcome.seconds[stage] += seconds
    if work.error is not None:
        outcome.skipped.append(str(work.error))
        if on_error is not None:
            on_error(work.error)
        return
    outcome.scores.append(work.score)
    if on_score is not None:
        on_score(work.score)


def _read_ahead(pool: Executor, read: Callable[[int], _Work], order: Iterable[int], count: int) -> Iterator[_Work]:
    """The results of ``read`` for each of ``order``; up to ``count`` are read ahead, none while an image is large."""
    submitted = deque()
    remaining = deque(order)
    while submitted or remaining:
        if not submitted:
            submitted.append(pool.submit(read, remaining.popleft()))
        work = submitted.popleft().result()
        while remaining and len(submitted) < count and not _large(work):
            submitted.append(pool.submit(read, remaining.popleft()))
        yield work


def _large(work: _Work) -> bool:
    return work.item is not None and work.item["hazy"][0].numel() > LARGE


class _InlineExecutor(Executor):
    """An executor without threads: submitted calls run at once."""

    def submit(self, f: Callable, /, *args: Any) -> Future:
        future = Future()
        try:
            future.set_result(f(*args))
        except BaseException as error:
            future.set_exception(error)
        return future


@contextmanager
def _pool(workers: int) -> Iterator[Executor]:
    """Workers that use one PyTorch thread each. On errors, calls that have not begun are cancelled."""
    threads = torch.get_num_threads()  # read before the workers start, since they may change it
    pool = ThreadPoolExecutor(workers, initializer=_one_thread) if workers else _InlineExecutor()
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _one_thread() -> None:
    torch.set_num_threads(1)


def _keys(scores: Sequence[Score]) -> list[str]:
    return list(scores[0].figures) if scores else []


def _mean(values: Sequence[float]) -> float:
    """The mean of the finite values; without any, their common value (inf for identical images), or else nan."""
    finite = [value for value in values if math.isfinite(value)]
    if finite:
        return statistics.fmean(finite)
    return values[0] if values and len(set(values)) == 1 else math.nan
