"""Learning-rate schedules over the steps of a stage."""

import math
from collections.abc import Iterable

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


def schedule(
    optimiser: Optimizer,
    kind: str,
    steps: int,
    epoch: float = 1.0,
    milestones: Iterable[float] = (),
    gamma: float = 1.0,
    floor: float = 0.0,
    ahead: float = 0.0,
    warm_up: int = 0,
    cool_down: int = 0,
) -> LRScheduler:
    """A learning-rate schedule over ``steps`` steps, with ``epoch`` steps per epoch.

    ``constant``; ``multistep``: multiplied by ``gamma`` at each of ``milestones`` (in epochs); ``cosine``: down to
    ``floor`` times the rate, step by step; ``epoch_cosine``: AKNet's, which is constant within an epoch and begins to
    fall in the third (the released warm-up of the first epoch has no ramp).
    Each is multiplied by a linear rise over the first ``warm_up`` steps and a linear fall, to ``floor``, over the last
    ``cool_down`` steps; with a constant rate in between, a run of unknown length can be ended well at any point.
    The rate depends on the step only, so that a resumed run may have more steps than it began with. ``ahead`` is added
    to a step's number before epochs are counted.
    """
    drops = [max(1, round(m * epoch - ahead)) for m in milestones]
    last = max(1, math.ceil((steps + ahead) / epoch) - 1)  # the last epoch's number, from 0; the fall takes as many

    def cosine(fraction: float) -> float:
        return floor + (1 - floor) * (1 + math.cos(math.pi * min(1.0, fraction))) / 2

    factors = {
        "constant": lambda step: 1.0,
        "multistep": lambda step: gamma ** sum(step >= drop for drop in drops),
        "cosine": lambda step: cosine(step / max(1, steps)),
        "epoch_cosine": lambda step: cosine(max(0, int((step + ahead) / epoch) - 1) / last),
    }

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / warm_up) if warm_up else 1.0
        fall = min(1.0, max(0, steps - step) / cool_down) if cool_down else 1.0
        return rise * (floor + (1 - floor) * fall) * factors[kind](step)

    return torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
