"""What test_distributed.py has several processes do; each writes its results to FOLDER/<name>.<rank>.pt.

torchrun --nproc_per_node 2 tests/rank_checks.py FOLDER
torchrun --nproc_per_node 2 tests/rank_checks.py train STEP FOLDER ...  (train.py; the second is killed in that step)
"""

import contextlib
import os
import signal
import sys
from pathlib import Path

import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.overrides import TorchFunctionMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from helpers import picture, tiny, tiny_settings

import train
from models.method import Loss, frozen
from utils import batchnorm, distributed, errors
from utils.errors import UserError
from utils.training import progress
from utils.training.updater import Updater, finite

CPU = torch.device("cpu")


def share(ranks: distributed.Ranks, count: int) -> slice:
    """The positions, of ``count``, of this process's batch, as `data.loading.loader` deals them out."""
    size = count // ranks.world
    return slice(ranks.rank * size, (ranks.rank + 1) * size)


def copied(parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    return [p.grad.clone() for p in parameters if p.grad is not None]


class Double(TorchFunctionMode):
    """Inside, what asks for float32 gets float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        func = torch.Tensor.double if func is torch.Tensor.float else func
        args = [torch.float64 if each is torch.float32 else each for each in args]
        kwargs = {k: torch.float64 if each is torch.float32 else each for k, each in (kwargs or {}).items()}
        return func(*args, **kwargs)


def adversarial_step(ranks: distributed.Ranks, sync: bool, exact: bool = True) -> dict:
    """One adversarial step of NeDR on the same two images and random haze, however many processes share them.

    ``exact``: in float64, all of it, since batch norm over few pixels makes much of float32's rounding. It takes long.
    """
    mine, kind = share(ranks, 2), torch.float64 if exact else torch.float32
    settings = tiny_settings("warm_start.steps=0")
    method = tiny("nedr.kan_cid=false").to(kind).train()
    if sync and ranks.world > 1:
        batchnorm.synchronise(method)
    hazy, clear = (picture(seed, 2, 3, 64, 64).to(kind)[mine] for seed in (1, 2))
    beta, airlight = (torch.tensor(ends).to(kind).view(2, 1, 1, 1)[mine] for ends in ((0.7, 1.7), (0.7, 0.9)))
    method._random_haze = lambda clear: (beta, airlight.expand(-1, 3, 1, 1))
    optimisers, gradients = method.optimisers("train", settings), {}
    for name, optimiser in optimisers.items():
        held = optimiser.param_groups[0]["params"]
        optimiser.register_step_pre_hook(lambda *_, name=name, held=held: gradients.update({name: copied(held)}))
    updater = Updater(optimisers, progress.stages(settings)[0], settings, CPU, ranks=ranks)
    with Double() if exact else contextlib.nullcontext():
        terms = updater.step(lambda batch: method.losses(batch, "train"), [{"hazy": hazy, "clear": clear}])
    ranks.average_statistics(method)
    return {"gradients": gradients, "terms": ranks.mean(terms), "state": method.state_dict()}


def steps(ranks: distributed.Ranks) -> dict:
    """Three clipped steps of two batches each, with a network that two losses use, once frozen, and unused weights."""
    torch.manual_seed(0)
    a, b = (nn.ModuleDict({"net": nn.Linear(4, 4), "spare": nn.Linear(2, 2)}).double() for _ in range(2))
    optimisers = {name: torch.optim.Adam(net.parameters(), 0.1) for name, net in (("a", a), ("b", b))}
    overrides = ["warm_start.steps=0", "train.accumulate=2", "train.clip=0.05", "train.steps=3"]
    settings = tiny_settings(*overrides)
    updater = Updater(optimisers, progress.stages(settings)[0], settings, CPU, ranks=ranks)
    x, mine = torch.randn(6, 4, 4).double(), share(ranks, 4)

    def losses(x: torch.Tensor):
        with frozen(b):
            y = b["net"](a["net"](a["net"](x)).tanh())
        yield Loss("a", (y - x).square().mean(), {})
        yield Loss("b", (b["net"](x) + b["net"](y.detach())).square().mean(), {})

    for k in range(3):
        updater.step(losses, [x[2 * k][mine], x[2 * k + 1][mine]])
    unused = [p.grad for net in (a, b) for p in net["spare"].parameters()]
    return {"weights": [p.detach() for net in (a, b) for p in net.parameters()], "unused": unused}


def norms(ranks: distributed.Ranks) -> dict:
    """Batch norm with an activation over shares of 3 and 1 images: what comes out, gradients and statistics."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 1), BatchNormAct2d(5), nn.BatchNorm2d(5, momentum=None)).double().train()
    x, weights = torch.randn(4, 3, 6, 6).double(), torch.randn(4, 5, 6, 6).double()
    keys = list(net.state_dict())
    if ranks.world > 1:
        batchnorm.synchronise(net)
    mine = slice(None) if ranks.world == 1 else [slice(0, 3), slice(3, 4)][ranks.rank]
    x = x[mine].clone().requires_grad_()
    for _ in range(2):
        y = net(x)
    (y * weights[mine]).sum().backward()
    return {
        "same keys": keys == list(net.state_dict()),
        "y": y.detach(),
        "dx": x.grad,
        "gradients": [p.grad for p in net.parameters()],
        "statistics": dict(net.named_buffers()),
        "eval": net.eval()(x).detach(),
    }


def small_checks(ranks: distributed.Ranks) -> dict:
    results = {
        "spread": ranks.map(lambda items: [item**2 for item in items], range(5)),
        "agree": ranks.all_max(ranks.rank),
    }
    try:
        finite(ranks.mean({"a": 1.0, "b": float("nan") if ranks.rank else 1.0}))
    except UserError as error:
        results["finite"] = str(error)
    try:
        ranks.check_same(ranks.rank, Path("last.pt"))
    except UserError as error:
        results["same"] = str(error)
    module = nn.Sequential(nn.BatchNorm2d(1), nn.Linear(1, 1))
    module.register_buffer("memory", torch.tensor([float(ranks.rank)]))
    module[0].running_mean.fill_(ranks.rank)
    ranks.average_statistics(module)
    ranks.start(seed=3)
    state = ranks.states(module)
    results |= {"mean": module[0].running_mean.item(), "state": state, "drawn": torch.rand(3)}
    module.memory.fill_(9)
    ranks.restore(state, module, 3, 5)
    return results | {"memory": module.memory.item(), "drawn again": torch.rand(3)}


def recorded_loaders() -> list[dict]:
    """The list in which the arguments of train.py's loaders arrive from now on."""
    loader, calls = train.loading.loader, []

    def recorded(source, start, stop, batch, **how):
        calls.append({"start": start, "stop": stop, "batch": batch})
        return loader(source, start, stop, batch, **how)

    train.loading.loader = recorded
    return calls


def within_step(number: int, happen) -> None:
    """``happen()`` in this process's step ``number`` from now."""
    step, taken = Updater.step, []

    def counted(*arguments):
        taken.append(1)
        if len(taken) == number:
            Updater.step = step
            happen()
        return step(*arguments)

    Updater.step = counted


def runs(folder: Path, rank: int) -> dict:
    """A whole run, and one that a signal to the second process alone interrupts, and its resumption."""
    calls, steps, blind = recorded_loaders(), ["warm_start.steps=1", "train.steps=2"], ["data.validation_hazy="]
    blind.append("data.validation_clear=")
    command = lambda name, *more: train.main(["--checkpoints", str(folder / name), *steps, *more])  # noqa: E731
    statuses = [command("whole", "log.validation_limit=3")]
    if rank == 1:
        within_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    statuses += [command("resumed", *blind), command("resumed", *blind, "--resume")]
    return {"statuses": statuses, "loaders": calls}


def fail() -> None:
    raise UserError("the sky fell; put it back")


def all_checks(folder: Path) -> int:
    rank = int(os.environ["RANK"])
    with distributed.group() as ranks:
        checks = {
            "adversarial": lambda: adversarial_step(ranks, True),
            "alone": lambda: adversarial_step(ranks, False, exact=False),
        }
        checks |= {"steps": lambda: steps(ranks), "norms": lambda: norms(ranks), "small": lambda: small_checks(ranks)}
        for name, check in checks.items():
            torch.save(check(), folder / f"{name}.{rank}.pt")
    torch.save(runs(folder, rank), folder / f"runs.{rank}.pt")
    if rank == 1:
        within_step(1, fail)
    return train.main(["--checkpoints", str(folder / "failing")])


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] != "train":
        errors.run(lambda: all_checks(Path(sys.argv[1])))
    if os.environ["RANK"] == "1":
        within_step(int(sys.argv[2]), lambda: os.kill(os.getpid(), signal.SIGKILL))
    errors.run(lambda: train.main(["--checkpoints", *sys.argv[3:]]))
