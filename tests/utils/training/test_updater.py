import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import models
from models.method import Loss
from utils import config
from utils.errors import UserError
from utils.training import progress
from utils.training.schedules import schedule
from utils.training.updater import Updater, finite

CPU = torch.device("cpu")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def stage_and_settings(**train) -> tuple[progress.Stage, config.Settings]:
    """A stage of 10 steps of 2 images, and settings with these in their train section."""
    values = config.load("nedr", models.settings_types(), overrides=["train.steps=10", "train.batch=2"])
    values.precision = train.pop("precision", "float32")
    for name, value in train.items():
        setattr(values.train, name, value)
    return progress.stages(values)[-1], values


def updater(module: nn.Module, optimiser=torch.optim.Adam, **train) -> Updater:
    return Updater({"net": optimiser(module.parameters(), 0.05)}, *stage_and_settings(**train), CPU)


def losses(module: nn.Module):
    def of(batch):
        value = F.mse_loss(module(batch["x"]), batch["y"])
        yield Loss("net", value, {"mse": value})

    return of


def batches(count: int, size: int = 3) -> list[dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(size, 4, generator=g), "y": torch.randn(size, 2, generator=g)} for _ in range(count)]


def test_a_step_equals_the_optimisers():
    one, other, data = net(), net(), batches(1)
    terms = updater(one).step(losses(one), data)
    plain = torch.optim.Adam(other.parameters(), 0.05)
    value = F.mse_loss(other(data[0]["x"]), data[0]["y"])
    value.backward()
    plain.step()
    assert {name: term.item() for name, term in terms.items()} == {"net": value.item(), "mse": value.item()}
    assert not any(term.requires_grad for term in terms.values())
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_accumulation_equals_one_big_batch():
    small, big, data = net(), net(), batches(6)
    a, b = updater(small), updater(big)
    for first, second in zip(data[::2], data[1::2], strict=True):
        a.step(losses(small), iter([first, second]))
        b.step(losses(big), [{key: torch.cat([first[key], second[key]]) for key in first}])
    for p, q in zip(small.parameters(), big.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_accumulated_losses_are_means_over_the_parts():
    module, data = net(), batches(3)
    each = [next(losses(module)(batch)).value.item() for batch in data]
    terms = updater(module).step(losses(module), data)
    assert terms["mse"].item() == terms["net"].item() == pytest.approx(sum(each) / 3)


def test_gradients_do_not_outlive_a_step():
    module, data = net(), batches(2)
    mover = updater(module, optimiser=torch.optim.SGD)
    mover.step(losses(module), [data[0]])
    mover.step(losses(module), [data[1]])
    expected = torch.autograd.grad(next(losses(net_at(module, mover))(data[1])).value, list(net_at.last.parameters()))
    for p, g in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g)


def net_at(module: nn.Module, mover: Updater) -> nn.Module:
    """The module as it was before its last step of SGD at 0.05."""
    net_at.last = copy.deepcopy(module)
    with torch.no_grad():
        for p, q in zip(net_at.last.parameters(), module.parameters(), strict=True):
            p.add_(q.grad, alpha=0.05)
    return net_at.last


@pytest.mark.parametrize("clip", [0.1, 1e6])
def test_clipping(clip):
    clipped, free, data = net(), net(), batches(1)
    updater(clipped, clip=clip, optimiser=torch.optim.SGD).step(losses(clipped), data)
    updater(free, optimiser=torch.optim.SGD).step(losses(free), data)
    norm = torch.cat([p.grad.flatten() for p in free.parameters()]).norm().item()
    assert norm > 0.1
    for p, q in zip(clipped.parameters(), free.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad * min(1, clip / norm), rtol=1e-4, atol=1e-7)


def test_each_loss_moves_its_own_optimiser_before_the_next_is_asked_for():
    one, other = net(), net()
    made = {"one": torch.optim.SGD(one.parameters(), 0.1), "other": torch.optim.SGD(other.parameters(), 0.1)}
    before, seen = copy.deepcopy(one.state_dict()), []

    def both(batch):
        value = F.mse_loss(one(batch["x"]), batch["y"])
        yield Loss("one", value, {"first": value})
        seen.append(any(not torch.equal(p, before[name]) for name, p in one.state_dict().items()))
        after = copy.deepcopy(one.state_dict())
        value = F.mse_loss(other(one(batch["x"]).detach()[:, [0, 1, 0, 1]]), batch["y"])
        yield Loss("other", value, {"second": value})
        seen.append(all(torch.equal(p, after[name]) for name, p in one.state_dict().items()))

    terms = Updater(made, *stage_and_settings(), CPU).step(both, batches(1))
    assert seen == [True, True]
    assert terms.keys() == {"one", "first", "other", "second"}
    assert any(not torch.equal(p, before[name]) for name, p in other.state_dict().items())


def rates(kind: str, steps: int, **options) -> list[float]:
    optimiser = torch.optim.SGD(net().parameters(), 1.0)
    plan, seen = schedule(optimiser, kind, steps, **options), []
    for _ in range(steps + 1):
        seen.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        plan.step()
    return seen


def test_warm_up_and_cool_down():
    """Rise to the rate and fall from it, linearly, whatever lies between; more steps move the fall alone."""
    assert rates("constant", 8, warm_up=2, cool_down=4) == [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]
    assert rates("constant", 12, warm_up=2, cool_down=4)[:9] == [0.5] + [1] * 8
    assert rates("constant", 4, cool_down=2, floor=0.5) == [1, 1, 1, 0.75, 0.5]
    assert rates("cosine", 4, warm_up=1) == rates("cosine", 4)


def test_schedules():
    assert rates("constant", 5, milestones=[2], gamma=0.5) == [1] * 6
    assert rates("multistep", 6, milestones=[4.4, 2], gamma=0.5) == [1, 1, 0.5, 0.5, 0.25, 0.25, 0.25]
    assert rates("multistep", 3, milestones=[0.2], gamma=0.5) == [1, 0.5, 0.5, 0.5]  # not before the first step
    cosine = rates("cosine", 8)
    assert cosine[0] == 1
    assert cosine[4] == pytest.approx(0.5)
    assert cosine[8] == pytest.approx(0, abs=1e-12)
    assert cosine == sorted(cosine, reverse=True)
    assert rates("cosine", 0) == [1]
    assert rates("cosine", 8, floor=0.1)[8] == pytest.approx(0.1)


def test_epoch_cosine_is_that_of_the_released_aknet():
    """2e-4 in the first two of 500 epochs, 1.00197e-6 in the last, and the closed form between."""
    seen = rates("epoch_cosine", 1500, epoch=3, floor=0.005)
    assert seen[:6] == [1] * 6
    for number in range(3, 501):
        wanted = 1e-6 + (2e-4 - 1e-6) * (1 + math.cos(math.pi * (number - 2) / 499)) / 2
        for step in range(3 * number - 3, 3 * number):
            assert 2e-4 * seen[step] == pytest.approx(wanted, rel=1e-12)
    assert 2e-4 * seen[1499] == pytest.approx(1.00197e-6, rel=1e-5)


def test_milestones_are_epochs():
    """Epochs of 6 images, 2 a batch: 3 steps each."""
    module, data = net(), batches(1)
    how = stage_and_settings(schedule="multistep", milestones=[1.0, 2.0], gamma=0.5)
    mover, seen = Updater({"net": torch.optim.SGD(module.parameters(), 1.0)}, *how, CPU, epoch_length=6), []
    for _ in range(8):
        seen.append(mover.rates()["net"])
        mover.step(losses(module), data)
    assert seen == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25]


def test_a_resumed_run_may_be_given_more_steps():
    module, data = net(), batches(1)
    first = updater(module, schedule="cosine")
    for _ in range(4):
        first.step(losses(module), data)
    stage, values = stage_and_settings(schedule="cosine")
    longer = Updater({"net": torch.optim.Adam(module.parameters(), 0.05)}, stage._replace(steps=20), values, CPU)
    longer.load_state_dict(first.state_dict())
    longer.step(losses(module), data)
    assert longer.rates()["net"] == pytest.approx(0.05 * (1 + math.cos(math.pi * 5 / 20)) / 2)


def test_a_resumed_run_uses_the_current_rates_betas_and_decay():
    module, data = net(), batches(1)
    first = Updater({"net": torch.optim.AdamW(module.parameters(), 0.05)}, *stage_and_settings(schedule="cosine"), CPU)
    first.step(losses(module), data)
    other = torch.optim.AdamW(module.parameters(), 0.02, betas=(0.5, 0.6), weight_decay=0.3)
    again = Updater(
        {"net": other}, *stage_and_settings(schedule="constant"), CPU, saved=copy.deepcopy(first.state_dict())
    )
    [group] = other.param_groups
    assert (group["lr"], group["initial_lr"], group["betas"], group["weight_decay"]) == (0.02, 0.02, (0.5, 0.6), 0.3)
    assert again.schedules["net"].last_epoch == 1
    assert all(state["step"] == 1 for state in other.state.values())
    again.step(losses(module), data)
    assert again.rates() == {"net": 0.02}


def test_precision_may_change_over_a_resume():
    """Without fp16 the scaler has no state, and with it none is refused."""
    module = net()
    state = updater(module).state_dict()
    assert state["scaler"] == {}
    mover = updater(module)
    mover.scaler = torch.amp.GradScaler("cpu", enabled=True)
    mover.load_state_dict(state)


def test_the_remedy_for_a_loss_names_settings_of_its_stage():
    with pytest.raises(UserError, match=r"lower warm_start\.learning_rate, or set warm_start\.clip=1"):
        finite({"a": float("nan")}, "warm_start", "d4")
    with pytest.raises(UserError, match=r"lower d4\.learning_rate, or set train\.clip=1"):
        finite({"a": float("nan")}, "train", "d4")


@pytest.mark.parametrize("kind", ["constant", "multistep", "cosine"])
def test_a_restored_updater_continues_the_same_run(kind):
    straight, data = net(), batches(8)
    how = {"schedule": kind, "milestones": [3.0], "gamma": 0.5}
    mover = updater(straight, **how)
    for batch in data[:4]:
        mover.step(losses(straight), [batch])
    state, weights = copy.deepcopy(mover.state_dict()), copy.deepcopy(straight.state_dict())
    for batch in data[4:]:
        mover.step(losses(straight), [batch])

    resumed = net()
    resumed.load_state_dict(weights)
    again = updater(resumed, **how)
    again.load_state_dict(state)
    for batch in data[4:]:
        again.step(losses(resumed), [batch])
    for p, q in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
    assert mover.rates() == again.rates()


def test_precision_on_the_cpu():
    module, data = net(), batches(1)
    for precision, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        mover, seen = updater(module, precision=precision), []

        def of(batch, seen=seen):
            y = module(batch["x"])
            seen.append(y.dtype)
            value = F.mse_loss(y.float(), batch["y"])
            yield Loss("net", value, {"mse": value})

        mover.step(of, data)
        assert seen == [dtype]
        assert not mover.scaler.is_enabled()
        assert all(p.dtype == torch.float32 for p in module.parameters())  # weights stay in float32
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        updater(module, precision="fp16").step(losses(module), data)


def test_nonfinite_values_are_refused():
    assert finite({"a": torch.tensor(0.5)}) == {"a": 0.5}
    for bad in ("nan", "inf", "-inf"):
        with pytest.raises(UserError, match="the loss 'b' has become"):
            finite({"a": torch.tensor(0.5), "b": torch.tensor(float(bad))})


def test_losses_through_one_computation_move_only_what_they_name():
    """As if each had computed it for itself; and the first optimiser waits, since the second loss needs its weights."""

    def of(nets, apart: bool):
        def losses(batch):
            inner = nets["a"](batch["x"])
            y = nets["b"](inner.detach() if apart else inner)
            yield Loss("b", F.mse_loss(y, batch["y"]), {}, shared=not apart)
            y = old["b"](inner) if apart else y
            yield Loss("a", y.abs().mean(), {})

        return losses

    data, found = batches(1), []
    for apart in (False, True):
        nets = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 2)}
        for net_ in nets.values():
            for p in net_.parameters():
                nn.init.normal_(p, generator=torch.Generator().manual_seed(p.numel()))
        old = copy.deepcopy(nets)  # b before it moves
        optimisers = {name: torch.optim.SGD(net_.parameters(), 0.1) for name, net_ in nets.items()}
        Updater(optimisers, *stage_and_settings(), CPU).step(of(nets, apart), data)
        found.append([p.detach() for net_ in nets.values() for p in net_.parameters()])
        for name, module in nets.items():
            pairs = zip(module.parameters(), old[name].parameters(), strict=True)
            assert not any(torch.equal(p, q) for p, q in pairs)
    for p, q in zip(*found, strict=True):
        torch.testing.assert_close(p, q)
