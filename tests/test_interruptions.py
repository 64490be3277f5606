"""What may befall a training: signals, deaths, a second one in its folder; and that what goes on is the same run."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys

import kills
import numpy as np
import pytest
import torch

import models
import train
from data import images
from utils import checkpoint, lock, processes
from utils.errors import UserError

QUIET = ["log.pictures_every=0", "log.validate_every=0", "data.validation_hazy=", "data.validation_clear="]
AKNET = ["aknet.width=8", "data.hazy=sample:test/hazy", "data.clear=sample:test/clear"]
AKNET += ["warm_start.steps=0", "train.recalibrate=0", "train.ema=0.5", "train.schedule=constant"]
METHODS = {
    "aknet": AKNET,
    "nedr": ["warm_start.steps=0", "nedr.working_size=32", "train.batch=2", "train.ema=0.5"],
    "d4": ["warm_start.steps=0", "d4.base_channels=8", "d4.encoder_weights=none", "train.ema=0.5"],
    "kanet": ["kanet.width=8", "kanet.contrastive_weight=0", "data.hazy=", "data.depth=sample:train/depth"],
}
METHODS["kanet"] += ["warm_start.steps=0", "train.batch=2", "train.schedule=constant", "train.ema=0.5"]


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    before = {number: signal.getsignal(number) for number in train.signals.SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, and a training then does, too
    build = models.build
    shrunk = ("nedr", "d4")
    monkeypatch.setattr(models, "build", lambda s: kills.shallow(build(s)) if s.model in shrunk else build(s))
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def folders(tmp_path):
    """Two folders for runs of the tiny preset."""
    return kills.new_folder(tmp_path, "one"), kills.new_folder(tmp_path, "other")


def run(folder, *given, model="aknet"):
    return train.main(["--model", model, "--checkpoints", str(folder), "--resume", *given])


def within_step(monkeypatch, number, what):
    """Do ``what`` before step ``number``, from 1 on, is taken."""
    step, taken = train.Updater.step, []

    def counted(*arguments):
        taken.append(1)
        if len(taken) == number:
            what()
        return step(*arguments)

    monkeypatch.setattr(train.Updater, "step", counted)


def signalled(number):
    return lambda: os.kill(os.getpid(), number)


def test_every_trainable_method_is_tried():
    assert set(METHODS) == {name for name in models.names() if models.METHODS[name].stages}


EXACT = [name if name == "aknet" else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]


@pytest.mark.parametrize("model", EXACT)
def test_a_resumed_run_is_exactly_the_run_that_was_not_interrupted(model, folders):
    """With workers, within an epoch, with more steps than it was begun with, at a working size; every method."""
    whole, parts = folders
    given = [*METHODS[model], *QUIET, "log.save_every=100"]
    assert run(whole, *given, "train.steps=5", model=model) == 0
    assert run(parts, *given, "train.steps=2", "data.workers=1", model=model) == 0
    with pytest.MonkeyPatch.context() as patch:
        within_step(patch, 2, signalled(signal.SIGHUP))
        assert run(parts, *given, "train.steps=9", "data.workers=2", model=model) == 128 + signal.SIGHUP
    assert checkpoint.read(parts / "last.pt")["step"] == 4
    assert run(parts, *given, "train.steps=5", model=model) == 0
    kills.same(whole, parts)


@pytest.fixture
def small(tmp_path):
    """Settings that validate on two small pairs, every step."""
    for pool in ("hazy", "clear"):
        for n in range(2):
            images.write(tmp_path / pool / f"{n}.png", torch.rand(3, 64, 64))
    pools = [f"data.validation_{pool}={tmp_path / pool}" for pool in ("hazy", "clear")]
    return [*pools, "log.validate_every=1", "log.validation_limit=0", "log.pictures_every=0", "log.save_every=100"]


def test_a_validation_is_left_at_a_signal_and_done_after_the_resume(folders, small, monkeypatch):
    """In the first step and in the last, of which the next stage, or the end, comes after the validation."""
    whole, parts = folders
    given = [*AKNET, *small, "train.steps=2", "train.recalibrate=2"]
    assert run(whole, *given) == 0
    dehaze, dehazed = models.Method.dehaze, []

    def interrupted(*arguments):
        dehazed.append(1)
        os.kill(os.getpid(), signal.SIGINT)
        return dehaze(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(models.Method, "dehaze", interrupted)
        assert run(parts, *given) == 128 + signal.SIGINT
    assert len(dehazed) == 1
    state = checkpoint.read(parts / "last.pt")
    assert (state["step"], state["validated"]) == (1, False)
    assert not (parts / "weights.safetensors").exists()
    with monkeypatch.context() as patch:
        within_step(patch, 1, signalled(signal.SIGTERM))  # before its validation: that does not even begin
        assert run(parts, *given) == 128 + signal.SIGTERM
    assert checkpoint.read_metadata(parts / "weights.safetensors")["step"] == 1
    assert run(parts, *given) == 0
    kills.same(whole, parts)


def test_a_killed_reader_of_images_ends_the_run_saved(folders, monkeypatch):
    folder, _ = folders
    patience = torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(patience, "__defaults__", (0.1,))  # in place of 5 s

    others = multiprocessing.active_children()

    def kill():
        [reader] = [child for child in multiprocessing.active_children() if child not in others]
        reader.kill()
        reader.join()

    within_step(monkeypatch, 2, kill)
    with pytest.raises(UserError, match=r"SIGKILL.*data\.workers.*--resume"):
        run(folder, *AKNET, *QUIET, "log.save_every=100", "train.steps=50", "data.workers=1")
    assert 2 <= checkpoint.read(folder / "last.pt")["step"] < 10
    assert not (folder / lock.NAME).exists()


def test_a_second_training_in_a_folder_is_refused(folders):
    folder, _ = folders
    with (
        lock.held(folder),
        pytest.raises(UserError, match=rf"process {os.getpid()} on {processes.host()}: wait for it"),
    ):
        run(folder)
    assert {path.name for path in folder.iterdir()} == {"config.yml"}


def test_the_lock_and_fragments_of_a_dead_run_are_removed_and_reported(folders):
    folder, _ = folders
    dead = subprocess.Popen([sys.executable, "-S", "-c", ""])
    dead.wait()
    held = {"host": processes.host(), "process": dead.pid, "started": "boot:1"}
    (folder / lock.NAME).write_text(json.dumps(held))
    (folder / f".last.pt.{dead.pid}.tmp").write_bytes(b"half of it")
    (folder / "log.jsonl").write_bytes(b'{"stage": "tr')
    assert run(folder, *AKNET, *QUIET, "train.steps=1") == 0
    assert not list(folder.glob(".*"))
    said = (folder / "log.txt").read_text()
    assert f"process {dead.pid}) did not release its lock" in said
    assert "log.jsonl: damaged lines are left out: 1" in said


@pytest.mark.slow
def test_the_weights_of_a_stage_survive_the_death_of_the_next(folders, small, monkeypatch):
    """It had validated by then, and weights.safetensors was its own already."""
    folder, _ = folders
    given = [*small, "warm_start.steps=1", "train.steps=2", "train.recalibrate=0", "nedr.gan_weight=0"]

    def die():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        within_step(patch, 3, die)
        with pytest.raises(KeyboardInterrupt):
            run(folder, *given, model="nedr")
    stage = lambda name: checkpoint.read_metadata(folder / name)["stage"]  # noqa: E731
    assert (stage("warm_start.safetensors"), stage("weights.safetensors")) == ("warm_start", "train")
    assert checkpoint.read(folder / "last.pt")["stage"] == "warm_start"
    assert run(folder, *given, model="nedr") == 0
    assert (stage("warm_start.safetensors"), stage("weights.safetensors")) == ("warm_start", "train")


def test_a_deterministic_run_gives_the_same_bytes_twice(folders, monkeypatch):
    seen, step = [], train.Updater.step

    def watched(*arguments):
        seen.append((torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark))
        return step(*arguments)

    monkeypatch.setattr(train.Updater, "step", watched)
    for folder in folders:
        random.seed(len(seen))  # what was drawn before has no part in it
        np.random.seed(len(seen))
        assert run(folder, *AKNET, *QUIET, "train.steps=2", "deterministic=true") == 0
    assert seen == [(True, False)] * 4
    one, other = ((folder / "weights.safetensors").read_bytes() for folder in folders)
    assert one == other
    kills.same(*folders)


@pytest.mark.slow
def test_fifty_kills_lose_nothing():
    """Also the command of docs/reliability.md, which has one of a large state beside it."""
    command = [sys.executable, "-W", "ignore", kills.__file__, "50"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["kills"] == 50
    assert counts["kills"] - counts["at random"] >= 16  # while a file was being written
    assert counts["with a file half written"] > 0
