import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from utils.batchnorm import recalibrate
from utils.training.ema import EMA


class Pair(nn.Module):
    """Two children, of which one is averaged."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout())
        self.discriminator = nn.Linear(2, 2)


def shift(pair: Pair, amount: float) -> None:
    with torch.no_grad():
        for tensor in pair.net.state_dict().values():
            tensor.add_(int(amount) if not tensor.is_floating_point() else amount)


@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_constant_weights_stay(decay):
    pair = Pair()
    ema = EMA(pair, ["net"], decay)
    for _ in range(5):
        ema.update()
    for name, value in pair.net.state_dict().items():
        torch.testing.assert_close(ema.state_dict()["weights"][f"net.{name}"], value)


class Counted(TorchDispatchMode):
    """Inside, the names of all operations are noted."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name().split("::")[1].split(".")[0])
        return func(*args, **(kwargs or {}))


def test_an_update_does_not_synchronise_and_groups_its_operations():
    """No value is asked for, and there are as many operations for a hundred layers as for one."""
    pair = Pair()
    pair.net = nn.Sequential(*(nn.BatchNorm2d(3) for _ in range(100)))
    ema = EMA(pair, ["net"], 0.9)
    for _ in range(2):
        with Counted() as seen:
            ema.update()
        assert "_local_scalar_dense" not in seen.names
        assert len(seen.names) <= 2


def test_states_with_a_tensor_of_steps_load():
    pair = Pair()
    ema = EMA(pair, ["net"], 0.9)
    ema.load_state_dict({"weights": ema.state_dict()["weights"], "steps": torch.tensor(7)})
    assert ema.state_dict()["steps"] == 7


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_the_average_follows_the_closed_form_with_warm_up(decay):
    pair = Pair()
    ema, expected = EMA(pair, ["net"], decay), None
    for n in range(12):
        shift(pair, float(n))
        ema.update()
        now = pair.net[0].weight.detach().clone()
        d = min(decay, (1 + n) / (10 + n))
        expected = now if n == 0 else d * expected + (1 - d) * now  # the first step is taken over whole
    weights = ema.state_dict()["weights"]
    torch.testing.assert_close(weights["net.0.weight"], expected)
    assert weights["net.1.num_batches_tracked"] == pair.net[1].num_batches_tracked  # counters are copied
    # Buffers are averaged with the weights, both having been shifted alike.
    lag = pair.net[0].weight[0, 0, 0, 0] - weights["net.0.weight"][0, 0, 0, 0]
    torch.testing.assert_close(pair.net[1].running_mean - weights["net.1.running_mean"], lag.detach().expand(4))
    assert lag > 0


def test_applied_swaps_and_restores():
    pair = Pair().train()
    pair.net[2].eval()
    ema = EMA(pair, ["net"], 0.9)
    ema.update()
    shift(pair, 1.0)
    live, discriminator, modes = pair.net, pair.discriminator, [module.training for module in pair.modules()]
    with ema.applied() as inside:
        assert inside is pair
        assert pair.net is not live
        assert pair.discriminator is discriminator
        assert not any(module.training for module in pair.modules())
        torch.testing.assert_close(pair.net[0].weight + 1, live[0].weight)
    assert pair.net is live
    assert [module.training for module in pair.modules()] == modes
    with pytest.raises(ZeroDivisionError), ema.applied():
        raise ZeroDivisionError
    assert pair.net is live
    assert [module.training for module in pair.modules()] == modes


def test_the_average_is_not_part_of_the_method():
    pair = Pair()
    names = set(pair.state_dict())
    ema = EMA(pair, ["net"], 0.9)
    assert set(pair.state_dict()) == names
    assert {f"{name}" for name in ema.state_dict()["weights"]} == {name for name in names if name.startswith("net.")}


def test_without_averaging():
    pair = Pair().train()
    ema = EMA(pair, ["net"], 0.0)
    ema.update()
    assert ema.state_dict() == {}
    live = pair.net
    with ema.applied():
        assert pair.net is live
        assert not pair.training
    assert pair.training
    ema.load_state_dict({})


def test_a_restored_average_continues():
    one, other = Pair(), Pair()
    other.load_state_dict(one.state_dict())
    first, second = EMA(one, ["net"], 0.9), EMA(other, ["net"], 0.9)
    for pair, ema in ((one, first), (other, second)):
        for _ in range(3):
            shift(pair, 1.0)
            ema.update()
    again = EMA(other, ["net"], 0.9)
    again.load_state_dict(second.state_dict())
    for pair, ema in ((one, first), (other, again)):
        shift(pair, 1.0)
        ema.update()
    for name, value in first.state_dict()["weights"].items():
        assert torch.equal(again.state_dict()["weights"][name], value)


def test_averaging_switched_on_late():
    pair = Pair()
    ema = EMA(pair, ["net"], 0.9)
    shift(pair, 1.0)
    ema.load_state_dict({})
    torch.testing.assert_close(ema.state_dict()["weights"]["net.0.weight"], pair.net[0].weight.detach())


class Normed(nn.Module):
    """Two children with batch norm, of which one infers."""

    inference = ("net",)

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=0.37), nn.ReLU())
        self.other = nn.BatchNorm2d(3)


@pytest.mark.parametrize("training", [True, False])
def test_recalibrate_takes_exact_means(training):
    method = Normed().train(training)
    pictures = [torch.rand(4, 3, 5, 5) * scale for scale in (1, 5, 2)]
    weight = method.net[0].weight.clone()
    recalibrate(method, ({"hazy": hazy, "clear": None} for hazy in pictures), torch.device("cpu"))
    maps, norm = [method.net[0](hazy).detach() for hazy in pictures], method.net[1]
    torch.testing.assert_close(norm.running_mean, torch.stack([m.mean((0, 2, 3)) for m in maps]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([m.var((0, 2, 3)) for m in maps]).mean(0))
    assert norm.momentum == 0.37
    assert all(module.training == training for module in method.modules())
    assert torch.equal(method.net[0].weight, weight)
    assert not method.other.running_mean.any()
