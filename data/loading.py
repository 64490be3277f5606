"""Batches of a dataset: read by workers, waited for with a clock, sent to the GPU ahead of their use."""

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from utils.errors import UserError
from utils.training.signals import SIGNALS


def loader(
    dataset: Dataset,
    start: int,
    stop: int,
    batch: int,
    workers: int = 0,
    pin: bool = False,
    rank: int = 0,
    world: int = 1,
) -> DataLoader:
    """Batches of the positions start, ..., stop - 1 in order, the last one perhaps smaller.

    Of ``world`` processes that train together, number ``rank`` gets its share: positions are taken ``world * batch``
    at a time, and it reads the ``rank``-th ``batch`` of these. All together they read what one alone would read in
    batches of ``world * batch``. ``stop - start`` must then be a multiple of that; else raises ValueError.

    Tensors are stacked, ``skipped`` lists are joined, all else becomes a list. A `UserError` in a worker arrives as
    it was raised; the death of a worker is one, too, where a batch is asked for and nowhere else. Leaves the global
    random state alone. An iterator has workers of its own, from the first batch on: keep one as long as possible. Close
    it (contextlib.closing) if you leave before the end: workers ignore the signals that end a run.
    """
    return _Loader(
        _Carried(dataset),
        batch_sampler=_Share(start, stop, batch, rank, world),
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin,
        worker_init_fn=_one_thread,
        # Forked workers share `data.cache.Cache` and are there at once; elsewhere than on Linux fork is not safe.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        generator=torch.Generator().manual_seed(0),  # else every iterator takes a number from the global one
    )


class Waiting:
    """Hands ``batches`` on and adds up in ``seconds`` for how long they were waited for. To be closed like them."""

    def __init__(self, batches: Iterable[dict]):
        self.batches, self.seconds = iter(batches), 0.0

    def __iter__(self) -> Iterator[dict]:
        return self

    def __next__(self) -> dict:
        start = time.perf_counter()
        try:
            return next(self.batches)
        finally:
            self.seconds += time.perf_counter() - start

    def close(self) -> None:
        """Close the iterator of the batches, and with it its workers."""
        self.batches.close()


def ahead(batches: Iterator[dict], device: torch.device) -> Iterator[dict]:
    """``batches`` with their tensors on ``device``; they are closed when this ends or is closed.

    On a GPU the next batch, which should be pinned (``loader(..., pin=True)``), is copied while the network works on
    the one before. There is never more than that one waiting on the GPU.
    """
    with closing(batches):
        if device.type == "cuda":
            yield from _on_gpu(batches, device)
        else:
            for batch in batches:
                yield _to(batch, device)


def _on_gpu(batches: Iterator[dict], device: torch.device) -> Iterator[dict]:
    side = torch.cuda.Stream(device)

    def send(batch: dict) -> tuple[dict, torch.cuda.Event]:
        with torch.cuda.stream(side):
            return _to(batch, device), side.record_event()

    for batch, arrived in _one_ahead(batches, send):
        computing = torch.cuda.current_stream(device)
        computing.wait_event(arrived)
        for value in batch.values():
            if isinstance(value, Tensor):
                value.record_stream(computing)  # else its memory would be free for `side` before it has been used
        yield batch


def _one_ahead(batches: Iterator[dict], send: Callable) -> Iterator:
    """``send(batch)`` of every batch, called for the next one before the last is handed out. So do its errors wait."""
    before = None
    try:
        for batch in batches:
            sent = send(batch)
            if before is not None:
                yield before
            before = sent
    except UserError:
        if before is not None:
            yield before
        raise
    if before is not None:
        yield before


def _to(batch: dict, device: torch.device) -> dict:
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


class _Share:
    """The batches of positions that fall to a process: see `loader`."""

    def __init__(self, start: int, stop: int, batch: int, rank: int, world: int):
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world} processes: count from 0")
        if world > 1 and (stop - start) % (batch * world):
            raise ValueError(f"{stop - start} positions are not a multiple of {world} processes' batches of {batch}")
        self.firsts, self.stop, self.batch = range(start + rank * batch, stop, world * batch), stop, batch

    def __len__(self) -> int:
        return len(self.firsts)

    def __iter__(self) -> Iterator[range]:
        return (range(first, min(first + self.batch, self.stop)) for first in self.firsts)


class _Carried(Dataset):
    """Hands a `UserError` over as an item: raised in a worker, it would arrive as a page of traceback."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, k: int) -> dict | UserError:
        try:
            return self.dataset[k]
        except UserError as error:
            return error


class _Loader(DataLoader):
    def __iter__(self) -> Iterator[dict]:
        with _deaths_waited_for():
            batches = super().__iter__()
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (RuntimeError, OSError) as error:
                raise _death(batches) or error from None
            if isinstance(batch, UserError):
                raise batch
            yield batch


@contextlib.contextmanager
def _deaths_waited_for() -> Iterator[None]:
    """PyTorch has the death of a worker raise an error wherever the trainer is, in the middle of a step; not so here.

    Where the batch of a dead worker is asked for, it is noticed anyway, within seconds.
    """
    before = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    try:
        yield
    finally:
        if before is not None and signal.getsignal(signal.SIGCHLD) != before:
            signal.signal(signal.SIGCHLD, before)


def _death(batches: Iterator) -> UserError | None:
    """What to tell of a worker of ``batches`` that is dead; None where all live."""
    dead = [each for each in getattr(batches, "_workers", ()) if each.exitcode is not None]
    if not dead:
        return None
    code, known = dead[0].exitcode, {number.value: number.name for number in signal.Signals}
    killed = f"was killed ({known.get(-code, -code)}), as the system does where memory runs out"
    how = killed if code < 0 else f"ended by itself (status {code})"
    return UserError(
        f"a process that reads images, {dead[0].pid}, {how}: set a lower data.workers, data.cache or batch "
        f"and go on with --resume"
    )


def _collate(items: list) -> dict | UserError:
    for item in items:
        if isinstance(item, UserError):
            return item
    columns = {key: [item[key] for item in items] for key in items[0]}
    # default_collate is torch.stack, in a worker right into the memory in which the batch goes to the trainer: copied
    # there afterwards, batches of 6 images took twice as long to hand over, of 32 four times.
    batch = {key: default_collate(value) if isinstance(value[0], Tensor) else value for key, value in columns.items()}
    if "skipped" in batch:
        batch["skipped"] = [message for messages in batch["skipped"] for message in messages]
    return batch


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)  # workers are the parallelism; more threads would fight over the cores
    for number in SIGNALS:  # they reach the whole group; the trainer decides when to stop
        signal.signal(number, signal.SIG_IGN)
