import copy
import math

import pytest
import torch
from test_updater import CPU, batches, losses, net, stage_and_settings
from torch import nn

from utils.training.divergence import Divergence
from utils.training.updater import Updater, _fused_step


def poisoned(module: nn.Module, part: str):
    """Losses that are no numbers, or whose gradients alone are none."""

    def of(batch):
        for loss in losses(module)(batch):
            value = loss.value * math.nan if part == "loss" else loss.value
            if part != "loss":
                factor = math.inf if part == "gradient" else 1e25
                value.register_hook(lambda gradient, factor=factor: gradient * factor)
            yield loss._replace(value=value, terms={"mse": value.detach()})

    return of


def fused_updater(module: nn.Module, **train) -> Updater:
    return Updater({"net": torch.optim.Adam(module.parameters(), 0.05, fused=True)}, *stage_and_settings(**train), CPU)


@pytest.mark.parametrize("clip", [0, 1])
@pytest.mark.parametrize("part", ["loss", "gradient", "its square"])
def test_a_nonfinite_step_changes_no_weight_and_no_moment(part, clip):
    """As if it had not been, but for the schedule."""
    one, other, data = net(), net(), batches(3)
    mover, straight = fused_updater(one, clip=clip), fused_updater(other, clip=clip)
    for k, batch in enumerate(data):
        if k == 1:
            mover.step(poisoned(one, part), [batch])
            assert mover.left_out == 1
        else:
            mover.step(losses(one), [batch])
            straight.step(losses(other), [batch])
            assert mover.left_out == 0
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    states = [next(iter(each.optimisers["net"].state.values())) for each in (mover, straight)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("clip", [0, 1])
def test_the_fp16_scaler_skips_a_nonfinite_loss(clip):
    module, data = net(), batches(1)
    mover, before = fused_updater(module, clip=clip), copy.deepcopy(module.state_dict())
    mover.scaler = torch.amp.GradScaler("cpu", enabled=True)

    def with_good_gradients(batch):
        for loss in losses(module)(batch):
            yield loss._replace(value=loss.value + math.inf)

    mover.step(with_good_gradients, data)
    assert mover.left_out == 1
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize("wrong", [0.0, 1.0])
def test_a_fused_optimiser_skips_a_nonfinite_step(wrong):
    """As on a GPU, where it is asked to."""
    module, data = net(), batches(1)
    before = copy.deepcopy(module.state_dict())
    optimiser = torch.optim.Adam(module.parameters(), 0.05, fused=True)
    next(losses(module)(data[0])).value.backward()
    _fused_step(torch.tensor(wrong), optimiser)
    assert all(torch.equal(value, before[key]) == bool(wrong) for key, value in module.state_dict().items())
    assert all(state["step"] == 1 - wrong for state in optimiser.state.values())


def test_one_nonfinite_batch_of_several_skips_the_step():
    module, data = net(), batches(2)
    mover, before = fused_updater(module), copy.deepcopy(module.state_dict())
    data[0]["y"][0, 0] = math.inf
    mover.step(losses(module), data)
    assert mover.left_out == 1
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_skipped_steps_are_counted_and_statistics_restored():
    norm = nn.BatchNorm1d(2)
    watch, no, yes = Divergence([norm], 5), torch.tensor(0.0), torch.tensor(1.0)
    norm(torch.randn(4, 2))
    watch.record(6, no, {}, [])
    assert watch.detected() == []
    kept = norm.running_mean.clone()
    for number in (7, 8):
        norm(torch.full((4, 2), math.nan))
        watch.record(number, yes, {"a": torch.ones(()), "b": torch.tensor(math.nan)}, [])
        [step] = watch.detected()
        assert (step.number, step.cause()) == (number, "the loss 'b' has become nan")
        assert torch.equal(norm.running_mean, kept)
    assert (watch.consecutive, watch.last_good) == (2, 6)
    watch.record(9, no, {}, [])
    watch.detected()
    assert (watch.consecutive, watch.last_good) == (0, 9)


def test_nonfinite_gradients_are_named_where_losses_are_finite():
    watch = Divergence([], 0)
    watch.record(1, torch.tensor(1.0), {"a": torch.ones(())}, [])
    assert "gradients" in watch.detected()[0].cause()
