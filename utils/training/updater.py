"""Training steps from losses: backward, unscale, clip, step, in the order in which a method yields its losses.

An optimiser does not step where its loss or a gradient is not finite.
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

OVERFLOWS = 1e19  # gradients whose square overflows float32: Adam's second moment would be infinite from then on
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # Adam's state of each parameter


class Updater:
    """Takes the steps of one stage.

    Each loss of a method names the one of ``optimisers`` that it trains.
    With several batches a step (gradient accumulation) their gradients are averaged; every optimiser steps during the
    last batch, so that its later losses already use the updated weights, as without accumulation.
    ``epoch_length`` is the number of images in an epoch, the unit of the schedule's milestones; ``saved`` is the
    `state_dict` of an interrupted stage to continue. With several ``ranks`` every process takes the same step, by the
    mean of all gradients. ``ahead`` is the position in the data, in steps of the current size, less the number of steps
    taken: not 0 if earlier steps had another size.
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
        train = settings.train
        ranks = ranks or Ranks()
        options = {"milestones": train.milestones, "gamma": train.gamma, "ahead": ahead, "floor": stage.floor}
        options |= {"warm_up": stage.warm_up, "cool_down": stage.cool_down}
        epoch = epoch_length / (stage.per_step * ranks.world)
        self.optimisers = optimisers
        self.schedules = {
            name: schedule(optimiser, stage.schedule, stage.steps, epoch, **options)
            for name, optimiser in optimisers.items()
        }
        self.device = device
        self.precision = settings.precision
        self.clip = stage.clip
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
        self.ranks = ranks
        self.left_out = torch.zeros((), device=device)
        if saved is not None:
            self.load_state_dict(saved)

    def step(self, losses: Callable[[dict], Iterator], batches: Iterable[dict]) -> dict[str, Tensor]:
        """One step on ``batches``; returns the means of its losses (each optimiser's, and their terms), detached.

        ``left_out`` is then 1 if an optimiser did not step, because its loss or a gradient was not finite, and else 0;
        it stays on the device, so that a GPU is not waited for. Overflows of fp16, which its scaler handles, do not
        count.
        """
        batches = list(batches)
        terms = {}
        nonfinite = {}  # by optimiser: 1 where its loss was not finite
        self.left_out = torch.zeros((), device=self.device)
        for optimiser in self.optimisers.values():
            optimiser.zero_grad(set_to_none=True)
        for k, batch in enumerate(batches, 1):
            is_last = k == len(batches)
            pending = losses(batch)
            due = []
            batch_terms = {}
            while (loss := self._next(pending)) is not None:
                trained = parameters_of(self.optimisers[loss.optimiser])  # no other gradient is computed
                self.scaler.scale(loss.value / len(batches)).backward(inputs=trained, retain_graph=loss.shared)
                flag = (~loss.value.detach().isfinite()).float()
                nonfinite[loss.optimiser] = torch.maximum(flag, nonfinite.get(loss.optimiser, flag))
                named = {loss.optimiser: loss.value, **loss.terms}
                batch_terms |= {name: term.detach() for name, term in named.items()}
                due.append(loss.optimiser)
                while is_last and due and not loss.shared:
                    name = due.pop(0)
                    self._step(self.optimisers[name], nonfinite[name])
            terms = {name: terms.get(name, 0) + term / len(batches) for name, term in batch_terms.items()}
        if is_last:
            self.scaler.update()
        for each in self.schedules.values():
            each.step()
        return terms

    def _next(self, pending: Iterator):
        # Autocast covers the forward pass of each loss, not its backward pass.
        with autocast(self.device, self.precision):
            return next(pending, None)

    def _step(self, optimiser: Optimizer, nonfinite: Tensor) -> None:
        """A step of ``optimiser``, unless its loss is ``nonfinite`` (1), or a gradient is not finite or overflows."""
        self.ranks.average_gradients(parameters_of(optimiser))
        gradients = [p.grad for p in parameters_of(optimiser) if p.grad is not None]
        fp16 = self.scaler.is_enabled()
        if gradients and not fp16:
            largest = torch.nn.utils.get_total_norm(gradients, math.inf)
            nonfinite = torch.maximum(nonfinite, (~(largest < OVERFLOWS)).to(nonfinite))
        nonfinite = self.ranks.largest(nonfinite)
        self.left_out = torch.maximum(self.left_out, nonfinite)
        for gradient in gradients[:1] if fp16 else ():  # makes the scaler leave out the step
            gradient.masked_fill_(nonfinite.bool(), math.nan)
        if self.clip:
            self.scaler.unscale_(optimiser)
            torch.nn.utils.clip_grad_norm_(parameters_of(optimiser), self.clip)
        if fp16:
            self.scaler.step(optimiser)
        elif nonfinite.is_cuda and optimiser.defaults.get("fused"):
            _fused_step(nonfinite, optimiser)
        elif not nonfinite:
            optimiser.step()
        else:
            optimiser._opt_called = True  # avoids a warning of its schedule

    def rates(self) -> dict[str, float]:
        """The current learning rate of each optimiser."""
        return {name: optimiser.param_groups[0]["lr"] for name, optimiser in self.optimisers.items()}

    def state_dict(self) -> dict:
        return {
            "optimisers": {name: optimiser.state_dict() for name, optimiser in self.optimisers.items()},
            "schedules": {name: schedule.state_dict() for name, schedule in self.schedules.items()},
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from ``state``: its moments and counts, with learning rates, betas, decay and schedule as set now.

        Raises `UserError` for an invalid state, or one of other networks.
        """
        try:
            optimisers, schedules, scaler = state["optimisers"], state["schedules"], state["scaler"]
            for name, optimiser in self.optimisers.items():
                if name in optimisers:  # absent if its loss had no weight until now: its moments start at 0
                    _load_moments(optimiser, optimisers[name])
            counts = next(iter(schedules.values()))  # all have the same step counts
            for each in self.schedules.values():
                _load_steps(each, counts["last_epoch"], counts["_step_count"])
            if scaler and self.scaler.is_enabled():  # the saved state is empty, unless precision was fp16
                self.scaler.load_state_dict({key: number(scaler[key]) for key in self.scaler.state_dict()})
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, StopIteration):
            raise UserError("the checkpoint's updater is damaged or of other networks; use another file") from None


def _fused_step(nonfinite: Tensor, optimiser: Optimizer) -> None:
    """A step of a fused ``optimiser`` if ``nonfinite`` is 0, which it checks on the device, without a wait."""
    optimiser.grad_scale = None
    optimiser.found_inf = nonfinite
    optimiser.step()
    del optimiser.grad_scale, optimiser.found_inf


def _load_moments(optimiser: Optimizer, state: dict) -> None:
    """Load the moments of ``optimiser`` from ``state``; its settings are kept. Raises ValueError."""
    current = [{key: value for key, value in group.items() if key != "params"} for group in optimiser.param_groups]
    numbers = [n for group in state["param_groups"] for n in group["params"]]
    for n, parameter in zip(numbers, parameters_of(optimiser), strict=True):
        moments = state["state"].get(n, dict.fromkeys(MOMENTS, parameter))  # absent before its first step
        shapes = {name: tuple(value.shape) for name, value in moments.items()}
        expected = {name: () if name == "step" else tuple(parameter.shape) for name in MOMENTS}
        if isinstance(optimiser, Adam) and n in state["state"] and shapes != expected:
            raise ValueError(f"the moments of parameter {n} do not fit it")
        if not all(value.is_floating_point() and value.isfinite().all() for value in moments.values()):
            raise ValueError(f"the moments of parameter {n} are not finite")
    optimiser.load_state_dict(state)
    for group, settings in zip(optimiser.param_groups, current, strict=True):
        group.update(settings)


def _load_steps(schedule: LRScheduler, last: int, count: int) -> None:
    """Set ``schedule``, and its optimiser's rates, to their state after ``last`` steps."""
    schedule.last_epoch = int(number(last))
    schedule._step_count = int(number(count))
    rates = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    schedule._last_lr = [base * factor(schedule.last_epoch) for base, factor in rates]
    for group, rate in zip(schedule.optimizer.param_groups, schedule._last_lr, strict=True):
        group["lr"] = rate


def number(value: Any) -> float:
    """``value``, if it is a number of at least 0. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**62:
        raise ValueError(f"{value!r:.40} is not a number of at least 0")
    return value


def parameters_of(optimiser: Optimizer) -> list[nn.Parameter]:
    """The parameters that an optimiser trains."""
    return [p for group in optimiser.param_groups for p in group["params"]]


def finite(terms: Mapping[str, Tensor | float], stage: str = "train", model: str = "nedr") -> dict[str, float]:
    """Loss terms as numbers. Raises `UserError` for one that is NaN or infinite, since training has then diverged.

    ``stage`` and ``model``: the remedy names their settings.
    """
    figures = {name: float(term) for name, term in terms.items()}
    for name, value in figures.items():
        if not math.isfinite(value):
            raise UserError(f"the loss '{name}' has become {value}; {remedy(stage, model)}")
    return figures


def remedy(stage: str, model: str) -> str:
    """The advice to the user where training diverges."""
    rate = f"{model if stage == 'train' else stage}.learning_rate"
    return (
        f"last.pt is from before: lower {rate}, or set {stage}.clip=1, precision=float32 or a smaller weight of that "
        f"loss, and continue with --resume"
    )
