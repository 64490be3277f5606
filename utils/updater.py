"""Turns losses into steps: backward, un-scale, clip, step, in the order in which a method yields its losses."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from utils.device import autocast


class Updater:
    """Takes the steps of one stage.

    ``optimisers`` and ``schedules`` by name; a method's losses name the optimiser that each of them moves.
    With several batches a step (gradient accumulation) their gradients are averaged; every optimiser steps
    during the last batch, so there later losses already see what earlier ones changed, as without accumulation.
    """

    def __init__(
        self,
        optimisers: dict[str, Optimizer],
        schedules: dict[str, LRScheduler],
        device: torch.device,
        precision: str,
        clip: float = 0.0,
    ):
        self.optimisers, self.schedules = optimisers, schedules
        self.device, self.precision, self.clip = device, precision, clip
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def step(self, losses: Callable[[dict], Iterator], batches: Iterable[dict]) -> dict[str, Tensor]:
        """One step on ``batches``; returns the last batch's loss terms by name, detached scalars."""
        batches, terms = list(batches), {}
        for optimiser in self.optimisers.values():
            optimiser.zero_grad(set_to_none=True)
        for k, batch in enumerate(batches, 1):
            stepping, pending = k == len(batches), losses(batch)
            while (loss := self._next(pending)) is not None:
                self.scaler.scale(loss.value / len(batches)).backward()
                terms |= {name: term.detach() for name, term in loss.terms.items()}
                if stepping:
                    self._move(self.optimisers[loss.optimiser])
        if stepping:
            self.scaler.update()
        for schedule in self.schedules.values():
            schedule.step()
        return terms

    def _next(self, pending: Iterator):
        # Reduced precision is for the forward pass: it is entered for each loss and left for its backward pass.
        with autocast(self.device, self.precision):
            return next(pending, None)

    def _move(self, optimiser: Optimizer) -> None:
        if self.clip:
            self.scaler.unscale_(optimiser)
            parameters = [p for group in optimiser.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self.clip)
        self.scaler.step(optimiser)

    def state_dict(self) -> dict:
        return {
            "optimisers": {name: optimiser.state_dict() for name, optimiser in self.optimisers.items()},
            "schedules": {name: schedule.state_dict() for name, schedule in self.schedules.items()},
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        for name, optimiser in self.optimisers.items():
            optimiser.load_state_dict(state["optimisers"][name])
        for name, schedule in self.schedules.items():
            schedule.load_state_dict(state["schedules"][name])
        self.scaler.load_state_dict(state["scaler"])


def schedule(
    optimiser: Optimizer, kind: str, steps: int, milestones: Iterable[float] = (), gamma: float = 1.0
) -> LRScheduler:
    """A learning-rate schedule over ``steps`` steps: constant, multistep (``milestones`` in steps) or cosine to 0."""
    if kind == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, steps))
    places = sorted(max(1, round(m)) for m in milestones) if kind == "multistep" else []
    return torch.optim.lr_scheduler.MultiStepLR(optimiser, places, gamma)
