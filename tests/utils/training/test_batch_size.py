import copy
import random
import sys
import weakref

import numpy as np
import pytest
import torch
from conftest import picture, tiny, tiny_settings
from torch import nn

from models.method import Loss, Method
from utils import batchnorm, distributed, memory
from utils.errors import UserError
from utils.memory import exhausted
from utils.training import batch_size, progress
from utils.training.updater import Updater

CPU = torch.device("cpu")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets an earlier peak")
OUT = torch.OutOfMemoryError("CUDA out of memory")
CANNOT = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")


class Hungry(Method):
    """Takes ``bytes_each`` a picture in the forward pass; fails with ``error`` for more than ``room`` pictures."""

    def __init__(self, bytes_each: int = 0, room: int = 1000, error: Exception = OUT):
        super().__init__(None)
        self.net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.bytes_each, self.room, self.error, self.sizes, self.held = bytes_each, room, error, [], []

    def __deepcopy__(self, memo):
        double = Hungry(self.bytes_each, self.room, self.error)
        double.load_state_dict(self.state_dict())
        double.sizes = self.sizes
        return double

    def save_memory(self):
        pass

    def losses(self, batch, stage):
        n = len(batch["hazy"])
        assert len(batch["name"]) == n
        self.sizes.append(n)
        random.random()
        np.random.rand()
        y = self.net(batch["hazy"]).square().mean()
        self.held.append(weakref.ref(y))
        if n > self.room:
            raise type(self.error)(*self.error.args)  # a new one: it will hold this frame
        block = torch.ones(n * self.bytes_each, dtype=torch.uint8)
        yield Loss("all", y + 0 * block[:1].sum(), {})
        del block


def batch_of(n, side=16):
    return {"hazy": picture(0, n, 3, side, side), "clear": picture(1, n, 3, side, side), "name": ["a"] * n}


def guarded(method, *overrides, optimisers=None, ranks=None, stage=-1):
    """A guard and an updater of the last stage of tiny settings, or of another one."""
    settings = tiny_settings("data.cache=0", *overrides)
    at, ranks = progress.stages(settings)[stage], ranks or distributed.Ranks()
    optimisers = optimisers or {"all": torch.optim.Adam(method.parameters())}
    return batch_size.Guard(method, at, settings, CPU, ranks), Updater(optimisers, at, settings, CPU)


def refused(guard, updater, batch):
    with pytest.raises(UserError) as caught:
        guard.step(updater, [batch])
    assert "\n" not in str(caught.value)
    return str(caught.value)


# A step that fails.


def test_a_batch_that_does_not_fit_is_refused_with_the_largest_that_does(monkeypatch):
    monkeypatch.setattr(batch_size, "describe", lambda device: "NVIDIA Fake")
    ranks = distributed.Ranks()
    ranks.saved = "last.pt is from step 5: go on with --resume"
    method = Hungry(room=7)
    guard, updater = guarded(method, "train.batch=12", "train.checkpointing=false", ranks=ranks)
    assert refused(guard, updater, batch_of(12)) == (
        "a batch of 12 does not fit into the memory of NVIDIA Fake; the largest that does is 7: set train.batch=6 "
        "train.accumulate=2 (as many pictures a step), precision=bf16 or train.checkpointing=true; last.pt is from "
        "step 5: go on with --resume"
    )
    assert method.sizes == [12, 6, 9, 7, 8]
    assert all(p.grad is None for p in method.parameters())


def test_what_the_failed_step_held_is_gone_before_the_trial(monkeypatch):
    method = Hungry(room=2)
    guard, updater = guarded(method, "train.batch=4")
    trial = batch_size.largest

    def looked(*arguments):
        assert [held() for held in method.held] == [None]
        return trial(*arguments)

    monkeypatch.setattr(batch_size, "largest", looked)
    refused(guard, updater, batch_of(4))


def test_a_gpu_is_cleared_and_the_method_leaves_it(monkeypatch):
    """As far as can be seen without one."""
    calls = []
    method = Hungry(room=1)
    guard, updater = guarded(method, "train.batch=2")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("cleared"))
    monkeypatch.setattr(method, "cpu", lambda: calls.append("left"))
    monkeypatch.setattr(Hungry, "to", lambda self, device: self)
    monkeypatch.setattr(batch_size, "autocast", lambda device, precision: torch.autocast("cpu", enabled=False))
    monkeypatch.setattr(batch_size, "describe", lambda device: "a GPU")
    guard.device, guard.foreseen = torch.device("cuda"), True
    assert "into the memory of a GPU; the largest that does is 1:" in refused(guard, updater, batch_of(2))
    assert calls[:2] == ["cleared", "left"]


@pytest.mark.parametrize(("has_bf16", "remedy"), [(True, "precision=bf16"), (False, "precision=fp16")])
def test_a_precision_that_the_device_has_is_recommended(monkeypatch, has_bf16, remedy):
    guard, _ = guarded(Hungry(), stage=0)
    monkeypatch.setattr(batch_size, "describe", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_bf16)
    guard.device = torch.device("cuda")
    assert f" or {remedy}" in str(guard.refusal(2)).replace(",", " or")


def test_where_not_even_one_fits_and_in_the_warm_start_other_remedies_are_named():
    warm = ("warm_start.batch=4", "precision=bf16")
    message = str(guarded(Hungry(), *warm, stage=0)[0].refusal(3))
    assert "the largest that does is 3: set warm_start.batch=3 or train.checkpointing=true; nothing" in message
    message = refused(*guarded(Hungry(room=0, error=CANNOT), "train.batch=4"), batch_of(4))
    assert "; not even one picture does: set a data.crop_size below 128, precision=bf16 or train.check" in message


def test_checkpointing_is_no_remedy_where_it_is_on_or_impossible(monkeypatch):
    guard, _ = guarded(Hungry(), "train.checkpointing=true", stage=0)
    assert str(guard.refusal(2)).endswith("set warm_start.batch=2 or precision=bf16; nothing was saved yet")
    monkeypatch.delattr(Hungry, "save_memory")
    guard, _ = guarded(Hungry(), stage=0)
    assert str(guard.refusal(2)).endswith("set warm_start.batch=2 or precision=bf16; nothing was saved yet")


def test_other_errors_stay_what_they_are():
    guard, updater = guarded(Hungry(room=0, error=RuntimeError("shapes do not match")), "train.batch=2")
    with pytest.raises(RuntimeError, match="shapes do not match"):
        guard.step(updater, [batch_of(2)])
    assert [exhausted(error) for error in (RuntimeError("shapes"), OUT, CANNOT, MemoryError())] == [False, *[True] * 3]


def test_the_largest_batch_by_bisection():
    for batch in range(1, 20):
        for room in range(batch):
            assert batch_size.largest(batch, lambda n, room=room: n <= room) == room


def test_pictures_a_step_are_kept_as_nearly_as_possible():
    assert [batch_size.divided(*case) for case in ((12, 7), (12, 1), (24, 11), (11, 7), (13, 4), (6, 5))] == [
        (6, 2),
        (1, 12),
        (8, 3),
        (6, 2),
        (4, 4),
        (3, 2),
    ]


# What is foreseen.

MIB = 2**20


def moments_of(optimisers):
    """Bytes of what Adam remembers."""
    states = [state for optimiser in optimisers.values() for state in optimiser.state.values()]
    held = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


@pytest.fixture
def short(monkeypatch):
    """A function that leaves so many bytes free, and no room so ample that nothing is measured."""

    def leave(free):
        monkeypatch.setattr(memory, "free_memory", lambda device: free)
        monkeypatch.setattr(batch_size, "AMPLE_BYTES", 1e12)

    return leave


@LINUX
def test_a_batch_that_will_not_fit_is_refused_before_anything_is_trained(short):
    method = Hungry(bytes_each=60 * MIB)
    short(345 * MIB)
    method.train()
    guard, updater = guarded(method, "train.batch=8")
    message = refused(guard, updater, batch_of(8))
    assert "are needed, 0.3 are free); the largest that does is 5: set train.batch=4 train.accumulate=2" in message
    assert method.sizes == [1, 2]


@LINUX
@pytest.mark.parametrize(("free", "fitting"), [(50, 0), (100, 1)])
def test_the_measurement_itself_takes_no_more_than_is_free(short, free, fitting):
    method = Hungry(bytes_each=60 * MIB)
    short(free * MIB)
    guard, updater = guarded(method, "train.batch=2")
    message = refused(guard, updater, batch_of(2))
    assert (f"the largest that does is {fitting}" if fitting else "not even one") in message


@LINUX
def test_to_foresee_changes_nothing_of_the_run(short):
    short(2**40)
    outcomes = []
    for foreseen in (True, False):
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        method = Hungry(bytes_each=MIB).train()
        guard, updater = guarded(method, "train.batch=3")
        guard.foreseen = foreseen
        terms = guard.step(updater, [batch_of(3)])
        assert method.sizes == ([3] if foreseen else [1, 2, 3])
        drawn = (torch.rand(1).item(), random.random(), np.random.rand())
        outcomes.append((drawn, terms["all"].item(), copy.copy(method.state_dict())))
    (one, a, state), (other, b, others) = outcomes
    assert (one, a) == (other, b)
    assert all(torch.equal(state[key], others[key]) for key in state)


def test_small_runs_and_systems_that_cannot_tell_pay_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(batch_size, "measure", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(memory, "free_memory", lambda device: 2 * 16 * 16 * batch_size.AMPLE_BYTES)
    guard, updater = guarded(Hungry(), "train.batch=2")
    guard.step(updater, [batch_of(2)])
    monkeypatch.setattr(memory, "free_memory", lambda device: 0)
    monkeypatch.setattr(memory, "PROCESS", tmp_path / "absent")
    guard, updater = guarded(Hungry(), "train.batch=2")
    guard.step(updater, [batch_of(2)])


def test_processes_share_the_memory_and_leave_what_the_cache_will_take(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 8 * 2**30)
    guard, _ = guarded(Hungry())
    guard.ranks.local_world = 2
    guard.settings.data.cache = 1.5
    assert guard.free() == 3.25 * 2**30


def test_the_double_waits_for_no_other_process():
    method = Hungry().train()
    batchnorm.synchronise(method)
    guard, _ = guarded(method)
    with guard.double() as double:
        guard.play(double, batch_of(2), 1)
    assert method.net[1].training


@LINUX
def test_what_nedr_needs_is_foreseen():
    """A step with four pictures takes what one and two have let expect."""
    settings, method = tiny_settings("nedr.kan_cid=false"), tiny("nedr.kan_cid=false").train()
    optimisers, batch = method.optimisers("train", settings), batch_of(4, 64)
    guard, updater = guarded(method, "nedr.kan_cid=false", "train.batch=4", optimisers=optimisers)
    with guard.double() as double:
        needs = batch_size.measure(lambda n: guard.play(double, batch, n), double, 2)
    expected = batch_size.extrapolated(needs, 4)
    [needed] = batch_size.measure(lambda n: updater.step(lambda _: method.losses(batch, "train"), [batch]), method, 1)
    assert needed / 1.5 < expected + moments_of(optimisers) < needed * 1.5


def test_moments_that_are_not_there_yet_are_counted():
    method = tiny("nedr.kan_cid=false").train()
    optimisers = method.optimisers("train", tiny_settings())
    guard, updater = guarded(method, "nedr.kan_cid=false", "train.batch=1", optimisers=optimisers)
    expected = batch_size._moments(updater)
    guard.step(updater, [batch_of(1, 64)])
    assert moments_of(optimisers) == pytest.approx(expected, rel=0.01)
    assert batch_size._moments(updater) == 0
