import json
import logging
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from utils.training.run_log import RunLog, Silence, Speed


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def scalars(folder, name: str) -> list[tuple[int, float]]:
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return [(event.step, pytest.approx(event.value)) for event in board.Scalars(name)]


def test_figures_and_pictures(tmp_path):
    folder = tmp_path / "new" / "run"
    with RunLog(folder) as log:
        log.figures("warm_start", 3, loss={"clear": 0.5}, speed={"steps_per_second": 2.0})
        log.figures("train", 4, loss={"clear": 0.25})
        pictures = {"hazy": torch.rand(6, 3, 8, 8), "depth": torch.rand(1, 1, 8, 8).to(torch.bfloat16) * 3}
        log.pictures(4, pictures)
    assert lines(folder) == [
        {"stage": "warm_start", "step": 3, "loss/clear": 0.5, "speed/steps_per_second": 2.0},
        {"stage": "train", "step": 4, "loss/clear": 0.25},
    ]
    assert scalars(folder, "loss/clear") == [(3, 0.5), (4, 0.25)]
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    assert set(board.Tags()["images"]) == {"pictures/hazy", "pictures/depth"}


def test_words_go_to_the_screen_and_the_file(tmp_path, capsys):
    with RunLog(tmp_path) as log:
        log.say("hello — ü")
        log.warn_once("skipped: a.png")
        log.warn_once("skipped: a.png")
        log.warn_once("skipped: b.png")
    text = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert "INFO hello — ü" in text
    assert text.count("WARNING skipped: a.png") == 1
    assert text.count("WARNING skipped: b.png") == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines() == ["hello — ü", "skipped: a.png", "skipped: b.png"]
    assert captured.out == ""


def test_nothing_is_said_twice_by_a_second_log(tmp_path, capsys):
    for _ in range(2):
        with RunLog(tmp_path) as log:
            log.say("once")
    assert capsys.readouterr().err.count("once") == 2
    assert (tmp_path / "log.txt").read_text().count("once") == 2  # a resumed run writes on
    assert not logging.getLogger(f"nedr-dehaze.{tmp_path}").handlers


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path):
    with RunLog(tmp_path) as log:
        for step in (1, 2, 3):
            log.figures("train", step, loss={"a": float(step)})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"stage": "train", "step": 2, "loss/')  # killed in the middle of a line
    with RunLog(tmp_path, start=2) as log:
        assert [line["step"] for line in lines(tmp_path)] == [1, 2]
        log.figures("train", 3, loss={"a": 30.0})
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    assert scalars(tmp_path, "loss/a")[-1] == (3, 30.0)


def test_a_new_run_starts_an_empty_log(tmp_path):
    with RunLog(tmp_path) as log:
        log.figures("train", 1, loss={"a": 1.0})
    with RunLog(tmp_path):
        assert lines(tmp_path) == []


def test_speed_is_that_since_it_was_last_asked(monkeypatch):
    clock, waiting = [100.0], SimpleNamespace(seconds=5.0)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    speed = Speed(10, 6, waiting)
    clock[0], waiting.seconds = 104.0, 6.0
    assert speed.figures(18) == {"steps_per_second": 2, "images_per_second": 12, "waiting": 0.25}
    clock[0] = 105.0
    assert speed.figures(19) == {"steps_per_second": 1, "images_per_second": 6, "waiting": 0}


def test_the_other_processes_write_nothing(tmp_path, capsys):
    with Silence() as log:
        log.say("a")
        log.warn_once("a")
        log.figures("train", 1, loss={"a": 1.0})
        log.pictures(1, {"a": torch.rand(1, 3, 2, 2)})
    assert capsys.readouterr() == ("", "")
