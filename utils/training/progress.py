"""The progress of a run: its stage, its step, and its position in the data."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from utils.config import Settings, Train, WarmStart
from utils.errors import UserError


class Stage(NamedTuple):
    """One stage of training: ``steps`` steps, each of ``accumulate`` batches of ``batch`` images.

    ``schedule``, ``floor``, ``warm_up`` and ``cool_down`` as in `schedules.schedule`; ``clip``: largest gradient norm.
    """

    name: str
    steps: int
    batch: int
    accumulate: int
    schedule: str
    floor: float = 0.0
    warm_up: int = 0
    cool_down: int = 0
    clip: float = 0.0

    @property
    def per_step(self) -> int:
        return self.batch * self.accumulate


def stages(settings: Settings) -> list[Stage]:
    """The stages of a run that have steps, in order: the supervised warm start, then the method's own training."""
    warm = settings.warm_start
    train = settings.train
    both = [
        Stage("warm_start", warm.steps, warm.batch, 1, *_schedule_options(warm)),
        Stage("train", train.steps, train.batch, train.accumulate, *_schedule_options(train)),
    ]
    if not any(stage.steps for stage in both):
        raise UserError("warm_start.steps and train.steps are both 0: there is nothing to train; set one of them")
    return [stage for stage in both if stage.steps]


def _schedule_options(section: Train | WarmStart) -> tuple:
    return section.schedule, section.floor, section.warm_up, section.cool_down, section.clip


@dataclass
class Progress:
    """The position of a run in its ``stages``, trained by ``world`` processes.

    ``step`` counts the steps of the current stage, ``seen`` the images that they took in all processes; neither follows
    from the other, since the number of processes and the batch may change. ``best`` is the best validation score of the
    current stage so far. ``validated`` is False while a validation that was due is not finished.
    """

    stages: list[Stage]
    world: int
    number: int = 0
    step: int = 0
    seen: int = 0
    best: float = -math.inf
    validated: bool = True

    @property
    def stage(self) -> Stage:
        return self.stages[self.number]

    @property
    def per_step(self) -> int:
        """Images that a step takes, in all processes."""
        return self.stage.per_step * self.world

    @property
    def ahead(self) -> float:
        """The position in the data, in steps of the current size, less ``step``."""
        return self.seen / self.per_step - self.step

    @property
    def global_step(self) -> int:
        """Steps since the run began, over all stages."""
        return sum(stage.steps for stage in self.stages[: self.number]) + self.step

    @property
    def stage_ends(self) -> bool:
        return self.step >= self.stage.steps

    @property
    def last_stage(self) -> bool:
        return self.number + 1 == len(self.stages)

    def advance(self) -> None:
        """Count one step."""
        self.seen += self.per_step
        self.step += 1

    def next_stage(self) -> None:
        self.number += 1
        self.step = 0
        self.seen = 0
        self.best = -math.inf

    def due(self, every: int) -> bool:
        """Whether an action that is done ``every`` steps is due after this one; never for 0."""
        return every > 0 and self.step % every == 0

    def state_dict(self) -> dict:
        position = {"stage": self.stage.name, "step": self.step, "seen": self.seen}
        return position | {"best": self.best, "validated": self.validated}

    def load_state_dict(self, state: dict) -> None:
        """Continue from ``state``. Raises `UserError` if its stage has no steps any more."""
        names = [stage.name for stage in self.stages]
        if state["stage"] not in names:
            raise UserError(f"the checkpoint is of the stage {state['stage']}, which now has no steps; give it some")
        self.number, self.step, self.best = names.index(state["stage"]), state["step"], state["best"]
        self.seen = state.get("seen", self.step * self.stage.per_step)  # absent in earlier checkpoints
        self.validated = state.get("validated", True)
