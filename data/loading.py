"""Batches of a dataset: read by workers, with the waiting time measured, copied to the GPU ahead of their use."""

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import Any

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
    """Batches of the positions start, ..., stop - 1 in order; the last one may be smaller.

    With ``world`` processes, positions are taken ``world * batch`` at a time, and process ``rank`` reads the
    ``rank``-th ``batch`` of these. Together the processes read what one alone would read in batches of
    ``world * batch``. ``stop - start`` must be a multiple of that; else raises ValueError.

    Tensors are stacked, ``skipped`` lists are joined, everything else becomes a list. A `UserError` in a worker is
    raised here unchanged; the death of a worker raises one too, but only when a batch is requested. Does not touch the
    global random state. Each iterator starts its own workers with the first batch: keep one as long as possible. Close
    it (contextlib.closing) if you stop before the end: workers ignore the signals that end a run.
    """
    return _Loader(
        _ErrorsAsItems(dataset),
        batch_sampler=_RankBatches(start, stop, batch, rank, world),
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin,
        worker_init_fn=_init_worker,
        # Forked workers share `data.cache.Cache` and start at once; fork is safe only on Linux.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        generator=torch.Generator().manual_seed(0),  # else every iterator draws from the global one
    )


class Waiting:
    """Yields ``batches`` and sums the time spent waiting for them in ``seconds``. Close it like ``batches``."""

    def __init__(self, batches: Iterable[dict]):
        self.batches: Any = iter(batches)  # a generator, or a DataLoader's iterator
        self.seconds = 0.0

    def __iter__(self) -> Iterator[dict]:
        return self

    def __next__(self) -> dict:
        start = time.perf_counter()
        try:
            return next(self.batches)
        finally:
            self.seconds += time.perf_counter() - start

    def close(self) -> None:
        """Close the iterator of the batches and its workers."""
        self.batches.close()


def ahead(batches: Iterator[dict], device: torch.device) -> Iterator[dict]:
    """``batches`` with their tensors on ``device``; ``batches`` is closed when this ends or is closed.

    On a GPU the next batch, which should be pinned (``loader(..., pin=True)``), is copied while the network works on
    the current one. At most that one batch is held ahead on the GPU.
    """
    with closing(batches):
        if device.type == "cuda":
            yield from _on_gpu(batches, device)
        else:
            for batch in batches:
                yield _to_device(batch, device)


def _on_gpu(batches: Iterator[dict], device: torch.device) -> Iterator[dict]:
    copies = torch.cuda.Stream(device)

    def send(batch: dict) -> tuple[dict, torch.cuda.Event]:
        with torch.cuda.stream(copies):
            return _to_device(batch, device), copies.record_event()

    for batch, copied in _one_ahead(batches, send):
        computing = torch.cuda.current_stream(device)
        computing.wait_event(copied)
        for value in batch.values():
            if isinstance(value, Tensor):
                value.record_stream(computing)  # else `copies` could reuse its memory too early
        yield batch


def _one_ahead(batches: Iterator[dict], send: Callable) -> Iterator:
    """``send(batch)`` of every batch, called for the next one before the current one is yielded; so are its errors."""
    current = None
    try:
        for batch in batches:
            following = send(batch)
            if current is not None:
                yield current
            current = following
    except UserError:  # raised after the current batch was yielded
        if current is not None:
            yield current
        raise
    if current is not None:
        yield current


def _to_device(batch: dict, device: torch.device) -> dict:
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


class _RankBatches:
    """The batches of positions that one process reads, see `loader`."""

    def __init__(self, start: int, stop: int, batch: int, rank: int, world: int):
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world} processes: ranks start at 0")
        if world > 1 and (stop - start) % (batch * world):
            raise ValueError(f"{stop - start} positions are not a multiple of {world} processes' batches of {batch}")
        self.starts = range(start + rank * batch, stop, world * batch)
        self.stop = stop
        self.batch = batch

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[range]:
        return (range(start, min(start + self.batch, self.stop)) for start in self.starts)


class _ErrorsAsItems(Dataset):
    """Returns a `UserError` as an item: raised in a worker, it would arrive as a long traceback."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, k: int) -> dict | UserError:
        try:
            return self.dataset[k]
        except UserError as error:
            return error


class _Loader(DataLoader):
    def __iter__(self) -> Iterator[dict]:
        with _sigchld_handler_kept():
            batches = super().__iter__()
        try:
            while True:
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                except (RuntimeError, OSError) as error:
                    raise _dead_worker(batches) or error from None
                if isinstance(batch, UserError):
                    raise batch
                yield batch
        finally:
            del batches  # ends the workers; an error that is kept has this frame, and the program would never exit


@contextlib.contextmanager
def _sigchld_handler_kept() -> Iterator[None]:
    """Undo PyTorch's SIGCHLD handler, which raises the error of a dead worker in the middle of a training step.

    Requesting a batch of a dead worker still raises an error within seconds.
    """
    before = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    try:
        yield
    finally:
        if before is not None and signal.getsignal(signal.SIGCHLD) != before:
            signal.signal(signal.SIGCHLD, before)


def _dead_worker(batches: Iterator) -> UserError | None:
    """The error for a dead worker of ``batches``; None if all are alive."""
    dead = [worker for worker in getattr(batches, "_workers", ()) if worker.exitcode is not None]
    if not dead:
        return None
    code = dead[0].exitcode
    signals = {number.value: number.name for number in signal.Signals}
    killed = f"was killed ({signals.get(-code, -code)}), as the system does when memory runs out"
    reason = killed if code < 0 else f"ended by itself (status {code})"
    return UserError(
        f"a process that reads images, {dead[0].pid}, {reason}: set a lower data.workers, data.cache or batch "
        f"and go on with --resume"
    )


def _collate(items: list) -> dict | UserError:
    for item in items:
        if isinstance(item, UserError):
            return item
    columns = {key: [item[key] for item in items] for key in items[0]}
    # In a worker default_collate stacks right into the shared memory that goes to the trainer: with a copy afterwards,
    # batches of 6 images took twice as long to transfer, batches of 32 four times.
    batch = {key: default_collate(value) if isinstance(value[0], Tensor) else value for key, value in columns.items()}
    if "skipped" in batch:
        batch["skipped"] = [message for messages in batch["skipped"] for message in messages]
    return batch


def _init_worker(worker: int) -> None:
    torch.set_num_threads(1)  # the workers already use the cores
    for number in SIGNALS:  # sent to the whole process group; the trainer decides when to stop
        signal.signal(number, signal.SIG_IGN)
