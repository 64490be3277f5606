"""One way to dehaze many images and to measure them, for validation during training and for test.py alike.

Decoding, the network, and measuring with saving run beside each other: threads read the next images and finish the
last ones while the network works on the present one. Where the time went is counted by stage.
"""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Subset
from tqdm import tqdm

from utils.errors import ImageError, UserError
from utils.evaluation import metrics
from utils.memory import exhausted, release_memory

Dehaze = Callable[[Tensor], Tensor]  # (1,3,H,W) in [0,1] -> the same shape
Measure = Callable[[dict, Tensor], dict[str, float]]  # an item and its dehazed image (3,H,W) -> figures by name
Save = Callable[[dict, Tensor], None]
STAGES = ("reading", "dehazing", "measuring", "saving")
LARGE = 8_000_000  # pixels: larger images are not held beside each other, memory matters more than time


class Remedies(NamedTuple):
    """What to do where memory does not suffice for an image, and where what comes out are no numbers."""

    memory: str = "take smaller images"
    numbers: str = "use other weights"


# Of training: its own settings for tests have no part in validation.
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
    """What a pass over many images leaves: their scores in order, and of those skipped what was wrong.

    ``seconds`` by stage are summed over threads; ``wall`` is the time that passed, ``waiting`` the part of it in which
    the network waited for images to come or to be finished.
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

    ``items[k]``, k < len(items), is {hazy (3,H,W) in [0,1], name, ...}, as of `pictures.Paired` or `Folder`. One that
    cannot be read, dehazed or measured is handed to ``on_error`` and left out, and so is one whose own file cannot be
    written (`ImageError`); what else ``save`` raises ends the run, since it would be so for the next image too.
    ``on_score`` hears of every image as soon as all is done with it, in order. ``workers`` threads read ahead and as
    many finish; 0: everything in turn. ``bar`` names a progress bar, ``remedies`` what errors are to recommend.
    """
    outcome, place, started = Outcome(), torch.device(device), time.perf_counter()
    order = range(len(items)) if indices is None else indices
    pending: deque[Future] = deque()
    size = None

    def collect(limit: int) -> None:
        while len(pending) > limit:
            _take(pending.popleft().result(), outcome, on_score, on_error)
            progress.update()

    progress = tqdm(total=len(order), desc=bar, unit="picture", leave=False, disable=None if bar else True)
    with _pool(workers) as readers, _pool(workers) as finishers, progress:
        with closing(_ahead(readers, lambda k: _read(items, k), order, workers)) as arriving:
            for arrived in arriving:
                if arrived.item is not None:
                    size, before = arrived.item["hazy"].shape, size
                    if place.type == "cpu" and before not in (None, size):
                        release_memory()
                done = _dehaze(dehaze, arrived, place, remedies)
                if place.type == "cpu" and _large(done):
                    release_memory()  # to measure and to save it takes memory too
                pending.append(finishers.submit(_finish, done, measure, save, remedies))
                collect(0 if _large(done) else workers)
        collect(0)
    seconds = outcome.seconds
    seconds["wall"] = time.perf_counter() - started
    seconds["waiting"] = max(0.0, seconds["wall"] - seconds["dehazing"])
    return outcome


def mean(scores: Sequence[Score]) -> dict[str, float]:
    """Means over images by figure, infinite and undefined ones left out (`left_out` counts them)."""
    return {key: _mean([score.figures[key] for score in scores]) for key in _keys(scores)}


def left_out(scores: Sequence[Score]) -> dict[str, int]:
    """How many values `mean` leaves out, by figure; only those of which it leaves out any."""
    counts = {key: sum(not math.isfinite(score.figures[key]) for score in scores) for key in _keys(scores)}
    return {key: count for key, count in counts.items() if count}


def median_seconds(scores: Sequence[Score]) -> float:
    """Seconds an image: the median, since the first image on a GPU takes much longer than the others."""
    return statistics.median(score.seconds for score in scores) if scores else math.nan


@dataclass
class _Work:
    """An image on its way through the stages; ``error`` says what was wrong with it."""

    item: dict | None = None
    dehazed: Tensor | None = None
    score: Score | None = None
    error: UserError | None = None
    seconds: dict[str, float] = field(default_factory=dict)


@contextmanager
def _timed(work: _Work, stage: str, carry: type[UserError] = UserError) -> Iterator[None]:
    """Count the seconds of a stage; an error in it of the kind ``carry`` becomes the picture's, and it is left out."""
    start = time.perf_counter()
    try:
        yield
    except carry as error:
        work.error = error
    finally:
        work.seconds[stage] = time.perf_counter() - start


def _read(items: Sequence[dict], index: int) -> _Work:
    work = _Work()
    with _timed(work, "reading"):
        try:
            work.item = items[index]
        except (MemoryError, RuntimeError) as error:
            if not exhausted(error):
                raise
            raise UserError(f"{_name(items, index)}: there is too little memory to read it; shrink it") from None
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
        finite = bool(dehazed.isfinite().all())  # asks for a value, so a GPU has finished when it is there
    if not finite:
        raise UserError(f"{item['name']}: the model gives values that are not numbers; {remedies.numbers}")
    return dehazed


@contextmanager
def enough_memory(item: dict, device: torch.device, remedies: Remedies) -> Iterator[None]:
    """Turns a lack of memory inside into a `UserError` that names the image, its size and the remedy."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not exhausted(error):
            raise
        size = f"{item['hazy'].shape[2]}x{item['hazy'].shape[1]}"
        what = f"{item['name']}: {size} pixels are too many for the memory of {device}"
        raise ImageError(f"{what}; {remedies.memory}") from None


def _finish(work: _Work, measure: Measure | None, save: Save | None, remedies: Remedies) -> _Work:
    """Measure and save, on a finishing thread."""
    if work.error is not None:
        return work
    item, dehazed, figures = work.item, work.dehazed, {}
    cpu = torch.device("cpu")
    if measure is not None:
        with _timed(work, "measuring"), enough_memory(item, cpu, remedies):
            figures = measure(item, dehazed)
    if save is not None and work.error is None:
        with _timed(work, "saving", carry=ImageError), enough_memory(item, cpu, remedies):
            save(item, dehazed)
    if work.error is None:
        height, width = dehazed.shape[1:]
        work.score = Score(item["name"], width, height, work.seconds["dehazing"], figures)
    work.item = work.dehazed = None  # their memory is wanted for the next
    return work


def _take(work: _Work, outcome: Outcome, on_score: Callable | None, on_error: Callable | None) -> None:
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


def _ahead(pool: Executor, read: Callable[[int], _Work], order: Iterable[int], count: int) -> Iterator[_Work]:
    """What ``read`` gives for each of ``order``; up to ``count`` are read ahead, none beside a large image."""
    waiting, rest = deque(), deque(order)
    while waiting or rest:
        if not waiting:
            waiting.append(pool.submit(read, rest.popleft()))
        work = waiting.popleft().result()
        while rest and len(waiting) < count and not _large(work):
            waiting.append(pool.submit(read, rest.popleft()))
        yield work


def _large(work: _Work) -> bool:
    return work.item is not None and work.item["hazy"][0].numel() > LARGE


class _Here(Executor):
    """An executor without threads: what is submitted is done at once."""

    def submit(self, f: Callable, /, *args: Any) -> Future:
        future = Future()
        try:
            future.set_result(f(*args))
        except BaseException as error:
            future.set_exception(error)
        return future


@contextmanager
def _pool(workers: int) -> Iterator[Executor]:
    """Threads that compute with one thread each: they are the parallelism. What has not begun is dropped on errors."""
    own = torch.get_num_threads()  # asked before the first of them: else it may become the network's number too
    pool = ThreadPoolExecutor(workers, initializer=_one_thread) if workers else _Here()
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(own)


def _one_thread() -> None:
    torch.set_num_threads(1)


def _keys(scores: Sequence[Score]) -> list[str]:
    return list(scores[0].figures) if scores else []


def _mean(values: Sequence[float]) -> float:
    """The mean of the finite ones; of none, what they all are (inf, as of perfect images), else nan."""
    finite = [value for value in values if math.isfinite(value)]
    if finite:
        return statistics.fmean(finite)
    return values[0] if values and len(set(values)) == 1 else math.nan
