import math

import pytest

from utils.errors import UserError
from utils.training.progress import Progress, Stage

STAGES = [Stage("warm_start", 3, 2, 1, "constant"), Stage("train", 5, 2, 3, "constant")]


def test_steps_and_images_are_counted_over_stages_and_processes():
    at = Progress(STAGES, world=4)
    for _ in range(3):
        assert not at.stage_ends
        at.advance()
    assert (at.stage_ends, at.last_stage, at.step, at.seen, at.global_step) == (True, False, 3, 3 * 2 * 4, 3)
    at.best = 30.0
    at.next_stage()
    assert at.best == -math.inf  # another stage's best is no measure for this one's
    at.advance()
    assert (at.last_stage, at.step, at.seen, at.global_step, at.ahead) == (True, 1, 2 * 3 * 4, 4, 0)
    assert [at.due(every) for every in (0, 1, 2)] == [False, True, False]


def test_progress_in_images_survives_another_number_of_processes():
    at = Progress(STAGES, world=4)
    at.advance()
    again = Progress(STAGES, world=1)
    again.load_state_dict(at.state_dict())
    assert (again.step, again.seen, again.ahead) == (1, 8, 3)  # three steps of 2 more than its one
    again.advance()
    assert (again.step, again.seen, again.ahead) == (2, 10, 3)


def test_checkpoints_without_an_image_count_load():
    at = Progress(STAGES, world=2)
    at.load_state_dict({"stage": "train", "step": 4, "best": 20.0})
    assert (at.number, at.step, at.seen, at.best) == (1, 4, 4 * 6, 20.0)
    with pytest.raises(UserError, match="is of the stage train, which now has no steps"):
        Progress(STAGES[:1], 1).load_state_dict({"stage": "train", "step": 4, "best": 0.0})
