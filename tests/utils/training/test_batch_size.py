import copy
import weakref

import pytest
import torch
from helpers import picture, tiny_settings
from torch import nn

from models.method import Loss, Method
from utils import batchnorm, distributed
from utils.errors import UserError
from utils.memory import exhausted
from utils.training import batch_size, progress
from utils.training.updater import Updater

CPU = torch.device("cpu")
OUT = torch.OutOfMemoryError("CUDA out of memory")
CANNOT = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")


class Hungry(Method):
    """Fails with ``error`` for more than ``room`` images."""

    def __init__(self, room: int = 1000, error: Exception = OUT):
        super().__init__(None)
        self.net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.room, self.error, self.sizes, self.held = room, error, [], []

    def __deepcopy__(self, memo):
        double = Hungry(self.room, self.error)
        double.net = copy.deepcopy(self.net, memo)
        double.sizes = self.sizes
        return double

    def save_memory(self):
        pass

    def losses(self, batch, stage):
        n = len(batch["hazy"])
        assert len(batch["name"]) == n
        self.sizes.append(n)
        y = self.net(batch["hazy"]).square().mean()
        self.held.append(weakref.ref(y))
        if n > self.room:
            raise type(self.error)(*self.error.args)  # a new one: it will hold this frame
        yield Loss("all", y, {})


def batch_of(n, side=16):
    return {"hazy": picture(0, n, 3, side, side), "clear": picture(1, n, 3, side, side), "name": ["a"] * n}


def guarded(method, *overrides, optimisers=None, ranks=None, stage=-1):
    """A guard and an updater of the last stage of tiny settings, or of another one."""
    settings = tiny_settings(*overrides)
    at, ranks = progress.stages(settings)[stage], ranks or distributed.Ranks()
    optimisers = optimisers or {"all": torch.optim.Adam(method.parameters())}
    return batch_size.MemoryGuard(method, at, settings, CPU, ranks), Updater(optimisers, at, settings, CPU)


def refused(guard, updater, batch):
    with pytest.raises(UserError) as caught:
        guard.step(updater, [batch])
    assert "\n" not in str(caught.value)
    return str(caught.value)


# A step that fails.


def test_a_batch_that_does_not_fit_is_refused_with_the_largest_that_does(monkeypatch):
    monkeypatch.setattr(batch_size, "describe", lambda device: "NVIDIA Fake")
    ranks = distributed.Ranks()
    ranks.saved = "last.pt is from step 5: continue with --resume"
    method = Hungry(room=7)
    guard, updater = guarded(method, "train.batch=12", "train.checkpointing=false", ranks=ranks)
    assert refused(guard, updater, batch_of(12)) == (
        "a batch of 12 does not fit into the memory of NVIDIA Fake; the largest that does is 7: set train.batch=6 "
        "train.accumulate=2 (as many images a step), precision=bf16 or train.checkpointing=true; last.pt is from "
        "step 5: continue with --resume"
    )
    assert method.sizes == [12, 6, 9, 7, 8]
    assert all(p.grad is None for p in method.parameters())


def test_memory_of_the_failed_step_is_released_before_the_trial(monkeypatch):
    method = Hungry(room=2)
    guard, updater = guarded(method, "train.batch=4")
    trial = batch_size.largest

    def looked(*arguments):
        assert [held() for held in method.held] == [None]
        return trial(*arguments)

    monkeypatch.setattr(batch_size, "largest", looked)
    refused(guard, updater, batch_of(4))


def test_the_gpu_cache_is_emptied_and_the_method_moved_off_it(monkeypatch):
    """As far as can be seen without one."""
    calls = []
    method = Hungry(room=1)
    guard, updater = guarded(method, "train.batch=2")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("cleared"))
    monkeypatch.setattr(method, "cpu", lambda: calls.append("left"))
    monkeypatch.setattr(Hungry, "to", lambda self, device: self)
    monkeypatch.setattr(batch_size, "autocast", lambda device, precision: torch.autocast("cpu", enabled=False))
    monkeypatch.setattr(batch_size, "describe", lambda device: "a GPU")
    guard.device = torch.device("cuda")
    assert "into the memory of a GPU; the largest that does is 1:" in refused(guard, updater, batch_of(2))
    assert calls[:2] == ["cleared", "left"]


@pytest.mark.parametrize(("has_bf16", "remedy"), [(True, "precision=bf16"), (False, "precision=fp16")])
def test_a_precision_that_the_device_has_is_recommended(monkeypatch, has_bf16, remedy):
    guard, _ = guarded(Hungry(), stage=0)
    monkeypatch.setattr(batch_size, "describe", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_bf16)
    guard.device = torch.device("cuda")
    assert f" or {remedy}" in str(guard.refusal(2)).replace(",", " or")


def test_where_no_batch_fits_other_remedies_are_named():
    warm = ("warm_start.batch=4", "precision=bf16")
    message = str(guarded(Hungry(), *warm, stage=0)[0].refusal(3))
    assert "the largest that does is 3: set warm_start.batch=3 or train.checkpointing=true; nothing" in message
    message = refused(*guarded(Hungry(room=0, error=CANNOT), "train.batch=4"), batch_of(4))
    assert "; not even one image does: set a data.crop_size below 128, precision=bf16 or train.check" in message


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
    of_onednn = RuntimeError("could not create a primitive descriptor")
    lacks = (RuntimeError("shapes"), OUT, CANNOT, MemoryError(), of_onednn)
    assert [exhausted(error) for error in lacks] == [False, *[True] * 4]


def test_the_largest_batch_by_bisection():
    for batch in range(1, 20):
        for room in range(batch):
            assert batch_size.largest(batch, lambda n, room=room: n <= room) == room


def test_images_per_step_are_kept_as_nearly_as_possible():
    assert [batch_size.divided(*case) for case in ((12, 7), (12, 1), (24, 11), (11, 7), (13, 4), (6, 5))] == [
        (6, 2),
        (1, 12),
        (8, 3),
        (6, 2),
        (4, 4),
        (3, 2),
    ]


def test_the_trial_waits_for_no_other_process(monkeypatch):
    """Batch norm over all processes would: in the copy that the trial is made with it takes the running statistics."""
    method, training = Hungry().train(), []
    batchnorm.synchronise(method)
    norm = type(method.net[1])
    monkeypatch.setattr(norm, "forward", lambda self, x: training.append(self.training) or x)
    guard, _ = guarded(method, "train.batch=2")
    assert guard.largest_batch(batch_of(2)) == 1
    assert set(training) == {False}
    assert method.net[1].training
