"""Turns losses into steps: backward, un-scale, clip, step, in the order in which a method yields its losses.

Where a loss or a gradient is no number, its optimiser does not step.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from utils.config import Settings
from utils.device import autocast
from utils.distributed import Ranks
from utils.errors import UserError
from utils.training.progress import Stage
from utils.training.schedules import schedule

OVERFLOWS = 1e19  # a gradient whose square float32 does not hold: from then on Adam's moment of it would be infinite
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what Adam keeps of each parameter


class Updater:
    """Takes the steps of one stage.

    A method's losses name the optimiser, of ``optimisers``, that each of them moves.
    With several batches a step (gradient accumulation) their gradients are averaged; every optimiser steps
    during the last batch, so there later losses already see what earlier ones changed, as without accumulation.
    ``epoch_length`` is the number of images in an epoch, in which the schedule's milestones are given; ``saved`` the
    `state_dict` of an interrupted stage to go on from. With several ``ranks`` every process takes the same step, by
    the mean of all their gradients. ``ahead``: by how many such steps the stage is further in the data than its number
    of steps says, since some of them were larger (or, below 0, smaller).
    """

    def __init__(
        self,
        optimisers: dict[str, Optimizer],
        stage: Stage,
        settings: Settings,
        device: torch.device,
        epoch_length: int = 1,
        saved: dict | None = None,
        ranks: Ranks | None = None,
        ahead: float = 0.0,
    ):
        train, ranks = settings.train, ranks or Ranks()
        shape = {"milestones": train.milestones, "gamma": train.gamma, "ahead": ahead, "floor": stage.floor}
        shape |= {"warm_up": stage.warm_up, "cool_down": stage.cool_down}
        epoch = epoch_length / (stage.per_step * ranks.world)
        self.optimisers = optimisers
        self.schedules = {
            name: schedule(optimiser, stage.schedule, stage.steps, epoch, **shape)
            for name, optimiser in optimisers.items()
        }
        self.device, self.precision, self.clip = device, settings.precision, stage.clip
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
        self.ranks, self.left_out = ranks, torch.zeros((), device=device)
        if saved is not None:
            self.load_state_dict(saved)

    def step(self, losses: Callable[[dict], Iterator], batches: Iterable[dict]) -> dict[str, Tensor]:
        """One step on ``batches``; returns the means of its losses (each optimiser's, and their terms), detached.

        ``left_out`` is then 1 where an optimiser did not step, since its loss or a gradient was no number, and else 0:
        on the device, so that a GPU is not waited for. fp16's overflows, with which its scaler deals, do not count.
        """
        batches, terms, self.left_out, wrong = list(batches), {}, torch.zeros((), device=self.device), {}
        for optimiser in self.optimisers.values():
            optimiser.zero_grad(set_to_none=True)
        for k, batch in enumerate(batches, 1):
            stepping, pending, due, found = k == len(batches), losses(batch), [], {}
            while (loss := self._next(pending)) is not None:
                moved = parameters_of(self.optimisers[loss.optimiser])  # no other gradient is computed
                self.scaler.scale(loss.value / len(batches)).backward(inputs=moved, retain_graph=loss.shared)
                lost = (~loss.value.detach().isfinite()).float()
                wrong[loss.optimiser] = torch.maximum(lost, wrong.get(loss.optimiser, lost))
                found |= {name: term.detach() for name, term in {loss.optimiser: loss.value, **loss.terms}.items()}
                due.append(loss.optimiser)
                while stepping and due and not loss.shared:
                    name = due.pop(0)
                    self._move(self.optimisers[name], wrong[name])
            terms = {name: terms.get(name, 0) + term / len(batches) for name, term in found.items()}
        if stepping:
            self.scaler.update()
        for each in self.schedules.values():
            each.step()
        return terms

    def _next(self, pending: Iterator):
        # Reduced precision is for the forward pass: it is entered for each loss and left for its backward pass.
        with autocast(self.device, self.precision):
            return next(pending, None)

    def _move(self, optimiser: Optimizer, wrong: Tensor) -> None:
        """A step of ``optimiser``, unless its loss is ``wrong`` (1: no number) or a gradient is none, or overflows."""
        self.ranks.average_gradients(parameters_of(optimiser))
        gradients = [p.grad for p in parameters_of(optimiser) if p.grad is not None]
        fp16 = self.scaler.is_enabled()
        if gradients and not fp16:
            largest = torch.nn.utils.get_total_norm(gradients, math.inf)
            wrong = torch.maximum(wrong, (~(largest < OVERFLOWS)).to(wrong))
        wrong = self.ranks.largest(wrong)
        self.left_out = torch.maximum(self.left_out, wrong)
        for gradient in gradients[:1] if fp16 else ():  # the scaler leaves out what it finds no numbers in
            gradient.masked_fill_(wrong.bool(), math.nan)
        if self.clip:
            self.scaler.unscale_(optimiser)
            torch.nn.utils.clip_grad_norm_(parameters_of(optimiser), self.clip)
        if fp16:
            self.scaler.step(optimiser)
        elif wrong.is_cuda and optimiser.defaults.get("fused"):
            _fused_step(wrong, optimiser)
        elif not wrong:
            optimiser.step()
        else:
            optimiser._opt_called = True  # or its schedule would warn

    def rates(self) -> dict[str, float]:
        """The present learning rate of each optimiser."""
        return {name: optimiser.param_groups[0]["lr"] for name, optimiser in self.optimisers.items()}

    def state_dict(self) -> dict:
        return {
            "optimisers": {name: optimiser.state_dict() for name, optimiser in self.optimisers.items()},
            "schedules": {name: schedule.state_dict() for name, schedule in self.schedules.items()},
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from ``state``: moments and counts are its own; rates, betas, decay and schedule are as set now.

        Raises `UserError` for what is no such state, or one of other networks.
        """
        try:
            optimisers, schedules, scaler = state["optimisers"], state["schedules"], state["scaler"]
            for name, optimiser in self.optimisers.items():
                if name in optimisers:  # else its loss had no weight until now, and its moments begin anew
                    _load_moments(optimiser, optimisers[name])
            counts = next(iter(schedules.values()))  # of steps, in which all are alike
            for each in self.schedules.values():
                _load_steps(each, counts["last_epoch"], counts["_step_count"])
            if scaler and self.scaler.is_enabled():  # it is empty, unless precision was fp16
                self.scaler.load_state_dict({key: number(scaler[key]) for key in self.scaler.state_dict()})
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, StopIteration):
            raise UserError("the checkpoint's updater is damaged or of other networks; take another file") from None


def _fused_step(wrong: Tensor, optimiser: Optimizer) -> None:
    """A step of a fused ``optimiser`` where ``wrong`` is 0: it looks for itself, on the device, and nobody waits."""
    optimiser.grad_scale, optimiser.found_inf = None, wrong
    optimiser.step()
    del optimiser.grad_scale, optimiser.found_inf


def _load_moments(optimiser: Optimizer, state: dict) -> None:
    """What ``optimiser`` has learnt of its parameters, from ``state``; its settings stay. Raises ValueError."""
    own = [{key: value for key, value in group.items() if key != "params"} for group in optimiser.param_groups]
    numbers = [n for group in state["param_groups"] for n in group["params"]]
    for n, parameter in zip(numbers, parameters_of(optimiser), strict=True):
        held = state["state"].get(n, dict.fromkeys(MOMENTS, parameter))  # none, before its first step
        shapes = {name: tuple(value.shape) for name, value in held.items()}
        wanted = {name: () if name == "step" else tuple(parameter.shape) for name in MOMENTS}
        if isinstance(optimiser, Adam) and n in state["state"] and shapes != wanted:
            raise ValueError(f"the moments of parameter {n} do not fit it")
        if not all(value.is_floating_point() and value.isfinite().all() for value in held.values()):
            raise ValueError(f"the moments of parameter {n} are no numbers")
    optimiser.load_state_dict(state)
    for group, settings in zip(optimiser.param_groups, own, strict=True):
        group.update(settings)


def _load_steps(schedule: LRScheduler, last: int, count: int) -> None:
    """Put ``schedule``, and the rates that it gives, where it stands after ``last`` steps."""
    schedule.last_epoch, schedule._step_count = int(number(last)), int(number(count))
    rates = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    schedule._last_lr = [base * factor(schedule.last_epoch) for base, factor in rates]
    for group, rate in zip(schedule.optimizer.param_groups, schedule._last_lr, strict=True):
        group["lr"] = rate


def number(value: Any) -> float:
    """``value``, if it is a number from 0 on. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**62:
        raise ValueError(f"{value!r:.40} is no number")
    return value


def parameters_of(optimiser: Optimizer) -> list[nn.Parameter]:
    """What an optimiser moves."""
    return [p for group in optimiser.param_groups for p in group["params"]]


def finite(terms: Mapping[str, Tensor | float], stage: str = "train", model: str = "nedr") -> dict[str, float]:
    """Loss terms as numbers. Raises `UserError` for one that is none: what comes after it cannot be worth keeping.

    ``stage`` and ``model`` are those whose settings the remedy names.
    """
    figures = {name: float(term) for name, term in terms.items()}
    for name, value in figures.items():
        if not math.isfinite(value):
            raise UserError(f"the loss '{name}' has become {value}; {remedy(stage, model)}")
    return figures


def remedy(stage: str, model: str) -> str:
    """What to do where training diverges."""
    rate = f"{model if stage == 'train' else stage}.learning_rate"
    return (
        f"last.pt is from before: lower {rate}, or set {stage}.clip=1, precision=float32 or a smaller weight of that "
        f"loss, and continue with --resume"
    )
