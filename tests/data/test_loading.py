"""Batches: whose they are, where they are read, and when they arrive."""

import itertools
import multiprocessing
import os
import signal
from contextlib import closing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from data import loading
from data.loading import Waiting, ahead, loader
from utils.errors import UserError

CPU = torch.device("cpu")


class Positions(Dataset):
    """Item k tells k, and which process read it with how many threads."""

    def __getitem__(self, k):
        return {"k": k, "pid": os.getpid(), "threads": torch.get_num_threads(), "x": torch.full((2,), float(k))}


def positions(*args, **options):
    return [batch["k"] for batch in loader(Positions(), *args, **options)]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 5), st.integers(1, 5), st.integers(1, 4))
def test_several_processes_together_read_what_one_reads(start, steps, batch, world):
    stop = start + steps * batch * world
    one = positions(start, stop, batch * world)
    shares = [positions(start, stop, batch, rank=rank, world=world) for rank in range(world)]
    assert all(len(share) == steps for share in shares)
    assert [[k for part in parts for k in part] for parts in zip(*shares, strict=True)] == one
    assert len(loader(Positions(), start, stop, batch, rank=world - 1, world=world)) == steps


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 100), st.integers(0, 30), st.integers(1, 7))
def test_one_process_reads_all_in_order(start, count, batch):
    found = positions(start, start + count, batch)
    assert list(itertools.chain(*found)) == list(range(start, start + count))
    assert all(len(each) == batch for each in found[:-1])


def test_invalid_shares_are_refused():
    with pytest.raises(ValueError, match="11 positions are not a multiple of 2 processes' batches of 3"):
        loader(Positions(), 1, 12, 3, world=2)
    for rank in (-1, 2):
        with pytest.raises(ValueError, match=f"rank {rank} of 2"):
            loader(Positions(), 0, 12, 3, rank=rank, world=2)


def test_shares_of_workers():
    shares = [positions(4, 28, 3, workers=2, rank=rank, world=2) for rank in range(2)]
    assert shares[0] == [[4, 5, 6], [10, 11, 12], [16, 17, 18], [22, 23, 24]]
    assert shares[1] == [[7, 8, 9], [13, 14, 15], [19, 20, 21], [25, 26, 27]]


def test_workers_last_as_long_as_the_iterator():
    batches = list(loader(Positions(), 0, 60, 2, workers=2))
    pids = {pid for batch in batches for pid in batch["pid"]}
    assert len(pids) == 2
    assert os.getpid() not in pids
    assert {threads for batch in batches for threads in batch["threads"]} == {1}


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_collated_alike_with_and_without_workers(workers):
    first = next(iter(loader(Positions(), 3, 9, 3, workers=workers)))
    assert torch.equal(first["x"], torch.tensor([[3.0, 3.0], [4.0, 4.0], [5.0, 5.0]]))


class Source:
    """Batches 0, 1, ... of a number; tells which were taken, and whether it was closed."""

    def __init__(self, count, error=None):
        self.taken, self.closed = [], False
        self.steps = self._steps(count, error)

    def _steps(self, count, error):
        try:
            for k in range(count):
                self.taken.append(k)
                yield {"x": torch.tensor(k), "skipped": [str(k)]}
            if error:
                raise error
        finally:
            self.closed = True

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.steps)

    def close(self):
        self.steps.close()


def test_waiting_is_counted(monkeypatch):
    clock = iter([0, 2, 10, 11, 20, 24])
    monkeypatch.setattr(loading.time, "perf_counter", lambda: next(clock))
    waiting = Waiting(Source(2))
    assert waiting.seconds == 0
    assert [(batch["x"].item(), waiting.seconds) for batch in waiting] == [(0, 2), (1, 3)]
    assert waiting.seconds == 7  # the end is waited for, too


def test_waiting_closes_its_source():
    source = Source(3)
    with closing(Waiting(source)) as waiting:
        next(waiting)
    assert source.closed
    error = Waiting(Source(0, UserError("none left")))
    with pytest.raises(UserError, match="none left"):
        next(error)


def test_on_a_cpu_batches_pass_through():
    source = Source(3)
    batches = ahead(source, CPU)
    first = next(batches)
    assert first["x"].item() == 0
    assert first["skipped"] == ["0"]
    assert source.taken == [0]
    assert [batch["x"].item() for batch in batches] == [1, 2]
    assert source.closed


def test_leaving_before_the_end_closes_the_source():
    source = Source(3)
    with closing(ahead(source, CPU)) as batches:
        next(batches)
    assert source.closed
    with closing(iter(loader(Positions(), 0, 60, 2, workers=2))) as batches, closing(ahead(batches, CPU)) as moved:
        assert next(moved)["k"] == [0, 1]
    with pytest.raises(StopIteration):
        next(batches)


def test_one_batch_is_sent_ahead_and_errors_wait_for_their_turn():
    sent, source = [], Source(3, UserError("none left"))

    def send(batch):
        sent.append(batch["x"].item())
        return sent[-1]

    batches = loading._one_ahead(source, send)
    for k in range(3):
        assert next(batches) == k
        assert sent == list(range(min(k + 2, 3)))
    with pytest.raises(UserError, match="none left"):
        next(batches)
    assert list(loading._one_ahead(Source(1), send)) == [0]
    assert list(loading._one_ahead(Source(0), send)) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_arrive_whole_on_a_gpu():
    device, seen = torch.device("cuda"), 0.0
    with closing(ahead(iter(loader(Positions(), 0, 400, 4, workers=2, pin=True)), device)) as batches:
        for k, batch in enumerate(batches):
            assert batch["x"].device.type == "cuda"
            seen += batch["x"].sum()
            assert batch["k"] == list(range(4 * k, 4 * k + 4))
    assert seen.item() == 2 * sum(range(400))


class Deadly(Positions):
    """The worker that is to read item ``k`` is killed, as the system does where memory runs out."""

    def __init__(self, k, how):
        self.k, self.how = k, how

    def __getitem__(self, k):
        if k == self.k:
            self.how()
        return super().__getitem__(k)


DEATHS = {
    r"was killed \(SIGKILL\), as .* memory runs out": lambda: os.kill(os.getpid(), signal.SIGKILL),
    r"ended by itself \(status 3\)": lambda: os._exit(3),
}


@pytest.mark.parametrize("how", DEATHS)
def test_a_worker_s_death_raises_where_its_batch_is_requested(how, monkeypatch):
    """Not in the middle of a step, where PyTorch has it raise an error."""
    patience = torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(patience, "__defaults__", (0.1,))  # in place of 5 s
    before = signal.getsignal(signal.SIGCHLD)
    others = multiprocessing.active_children()
    with closing(iter(loader(Deadly(4, DEATHS[how]), 0, 60, 2, workers=1))) as batches:
        assert next(batches)["k"] == [0, 1]
        [worker] = [child for child in multiprocessing.active_children() if child not in others]
        worker.join()  # here SIGCHLD comes
        assert signal.getsignal(signal.SIGCHLD) == before
        with pytest.raises(UserError, match=rf"process that reads images, {worker.pid}, {how}.*lower data\.workers"):
            next(batches)
