import itertools
import json
import logging
import time
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from utils.errors import UserError
from utils.training.run_log import NullLog, RunLog, Speed


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def scalars(folder, name: str) -> list[tuple[int, float]]:
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return [(event.step, pytest.approx(event.value)) for event in board.Scalars(name)]


@pytest.fixture(autouse=True)
def _every_file_in_another_second(monkeypatch):
    """TensorBoard reads files in the order of the seconds in their names; runs are never as close as tests."""
    clock = itertools.count(int(time.time()), 2)
    monkeypatch.setattr(event_file_writer, "time", SimpleNamespace(time=lambda: next(clock)))


def test_figures_and_images_are_logged(tmp_path):
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


def test_messages_go_to_the_screen_and_the_file(tmp_path, capsys):
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


def test_a_second_log_prints_nothing_twice(tmp_path, capsys):
    for _ in range(2):
        with RunLog(tmp_path) as log:
            log.say("once")
    assert capsys.readouterr().err.count("once") == 2
    assert (tmp_path / "log.txt").read_text().count("once") == 2  # a resumed run writes on
    assert not logging.getLogger(f"nedr-dehaze.{tmp_path}").handlers


def test_a_resumed_run_drops_lines_after_its_checkpoint(tmp_path):
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


def test_speed_is_measured_since_the_last_call(monkeypatch):
    clock, waiting = [100.0], SimpleNamespace(seconds=5.0)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    speed = Speed(10, 6, waiting)
    clock[0], waiting.seconds = 104.0, 6.0
    assert speed.figures(18) == {"steps_per_second": 2, "images_per_second": 12, "waiting": 0.25}
    clock[0] = 105.0
    assert speed.figures(19) == {"steps_per_second": 1, "images_per_second": 6, "waiting": 0}
    with speed.paused():  # a validation
        clock[0] = 905.0
    clock[0], waiting.seconds = 907.0, 7.0
    assert speed.figures(23) == {"steps_per_second": 2, "images_per_second": 12, "waiting": 0.5}


def test_the_other_processes_write_nothing(tmp_path, capsys):
    with NullLog() as log:
        log.say("a")
        log.warn_once("a")
        log.figures("train", 1, loss={"a": 1.0})
        log.pictures(1, {"a": torch.rand(1, 3, 2, 2)})
    assert capsys.readouterr() == ("", "")


def test_a_damaged_line_is_reported_and_skipped(tmp_path, capsys):
    with RunLog(tmp_path) as log:
        for step in (1, 2):
            log.figures("train", step, loss={"a": float(step)})
    text = (tmp_path / "log.jsonl").read_bytes()
    (tmp_path / "log.jsonl").write_bytes(
        b'{"st\x00\xff}\n{"stage": "train"}\n' + text + b'{"stage": "train", "step": 2'
    )
    with RunLog(tmp_path, start=2):
        assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    assert "log.jsonl: damaged lines are left out: 1, 5" in capsys.readouterr().err


def test_the_log_is_repaired_atomically(tmp_path, monkeypatch):
    """Killed while it drops lines, a run has the log as it was."""
    with RunLog(tmp_path) as log:
        for step in (1, 2):
            log.figures("train", step, loss={"a": float(step)})
    before = (tmp_path / "log.jsonl").read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        RunLog(tmp_path, start=1)
    assert (tmp_path / "log.jsonl").read_bytes() == before


def test_tensorboard_keeps_all_points_up_to_the_step_resumed_from(tmp_path):
    """Three runs are killed: what they had not flushed is gone; each resumes from where it flushed and saved."""
    for start in (0, 2, 4):
        log = RunLog(tmp_path, start)
        for step in (start + 1, start + 2):
            log.figures("train", step, loss={"a": float(step)})
        log.flush()
        log.figures("train", start + 3, loss={"a": -1.0})  # never saved
        log.tensorboard.file_writer.event_writer._async_writer._writer.flush = lambda: None  # nor flushed: killed
    assert scalars(tmp_path, "loss/a")[:6] == [(step, float(step)) for step in range(1, 7)]


def test_a_new_run_in_an_old_folder_hides_the_old_points(tmp_path):
    for value in (1.0, 2.0):
        with RunLog(tmp_path) as log:
            log.figures("train", 1, loss={"a": value})
    assert scalars(tmp_path, "loss/a") == [(1, 2.0)]


def test_a_log_that_cannot_be_written_does_not_end_the_training(tmp_path, capsys, monkeypatch):
    with RunLog(tmp_path) as log:
        log.figures("train", 1, loss={"a": 1.0})
        monkeypatch.setattr("os.write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        log.tensorboard.add_scalar = lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        for step in (2, 3):
            log.figures("train", step, loss={"a": 1.0})
        monkeypatch.undo()
    shown = capsys.readouterr().err
    for file in ("log.jsonl", "log.txt", "TensorBoard"):
        assert sum("No space left" in line and file in line for line in shown.splitlines()) == 1, shown
    assert [line["step"] for line in lines(tmp_path)] == [1]


def test_an_unwritable_folder_is_reported(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        RunLog(tmp_path / "file")


def test_a_closed_terminal_does_not_end_the_training(tmp_path, monkeypatch):
    with RunLog(tmp_path) as log:
        monkeypatch.setattr("tqdm.tqdm.write", lambda *_, **__: (_ for _ in ()).throw(BrokenPipeError))
        log.say("still here")
    assert "still here" in (tmp_path / "log.txt").read_text()
