"""train.py from beginning to end: as processes, resumed, interrupted, and given what it must refuse."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import models
import test as scoring_command
import train
from data import images, paths
from data.sets.table import BENCHMARKS, GROUPS
from utils import checkpoint, config
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "checkpoints" / "tiny" / "config.yml"


@pytest.fixture
def experiment(tmp_path):
    """A folder for a run of the tiny preset."""
    folder = tmp_path / "experiment"
    folder.mkdir()
    shutil.copy(TINY, folder)
    return folder


@pytest.fixture(autouse=True)
def _signals_as_before():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run(folder, *arguments, model="nedr"):
    return train.main(["--model", model, "--checkpoints", str(folder), *arguments])


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def process(script, *arguments, **options):
    return subprocess.Popen(
        [sys.executable, ROOT / script, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


@pytest.mark.slow
def test_train_score_and_dehaze_as_processes(experiment, tmp_path):
    training = process("train.py", "--model", "nedr", "--checkpoints", experiment)
    output, _ = training.communicate()
    assert training.returncode == 0, output
    assert "finished after step 3" in output
    names = {"config.yml", "settings.yml", "last.pt", "weights.safetensors", "log.txt", "log.jsonl", "tensorboard"}
    names.add("warm_start.safetensors")
    assert {path.name for path in experiment.iterdir()} == names
    logged = lines(experiment)
    assert [line["stage"] for line in logged if "loss/gan" in line] == ["train", "train"]
    assert all(line["speed/steps_per_second"] > 0 for line in logged if "loss/gan" in line)
    assert [line["step"] for line in logged if "validation/psnr" in line] == [1, 3]

    scored = process(
        "test.py", "--checkpoints", experiment, "--hazy", "sample:test/hazy", "--clear", "sample:test/clear"
    )
    output, _ = scored.communicate()
    assert scored.returncode == 0, output
    rows = json.loads((experiment / "results" / "results.json").read_text())["rows"]
    hazy, nedr = rows
    assert (hazy["images"], nedr["images"]) == (6, 6)
    assert f"{nedr['mean']['ours.psnr']:.2f}" in output
    assert "chosen on the ground truths of 3 of these 6 images (validation on sample:test/clear)" in output
    kept = next(line for line in logged if "validation/psnr" in line and line["stage"] == "train")
    first = next(row for row in nedr["per_image"] if row["name"].startswith("chelsea_1"))
    assert first["ours.psnr"] == pytest.approx(kept["validation/psnr"], abs=1e-3), "test.py scores what validation kept"

    arguments = ["--checkpoints", str(experiment), "--hazy", "sample:test/hazy", "--output", str(tmp_path / "out")]
    assert scoring_command.main(arguments) == 0
    assert len(paths.find(tmp_path / "out" / "pictures")) == 6


def stop_after(monkeypatch, count):
    """Send this process SIGTERM within step ``count`` from now, as a scheduler would."""
    step, taken = train.Updater.step, []

    def counted(*arguments):
        taken.append(1)
        if len(taken) == count:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments)

    monkeypatch.setattr(train.Updater, "step", counted)


def test_a_resumed_run_equals_an_uninterrupted_one(experiment, tmp_path):
    whole = tmp_path / "whole"
    shutil.copytree(experiment, whole)
    steps = ["warm_start.steps=2", "train.steps=2"]
    assert run(whole, *steps) == 0
    for count in (1, 2):  # within the warm start, and within adversarial training
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, count)
            assert run(experiment, *steps, "--resume") == 128 + signal.SIGTERM
    assert checkpoint.read(experiment / "last.pt")["stage"] == "train"
    assert run(experiment, *steps, "--resume") == 0
    one, other = checkpoint.read(whole / "last.pt"), checkpoint.read(experiment / "last.pt")
    assert (one["stage"], one["step"], one["best"]) == (other["stage"], other["step"], other["best"])
    for a, b in ((one["networks"], other["networks"]), (one["ema"]["weights"], other["ema"]["weights"])):
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert torch.equal(one["random"]["torch"], other["random"]["torch"])


def weights_of(folder):
    """Everything of a run that a later step depends on: weights, running statistics, averages, random numbers."""
    state = checkpoint.read(folder / "last.pt")
    return state["networks"] | {f"ema.{k}": v for k, v in state["ema"].get("weights", {}).items()} | state["random"]


@pytest.mark.parametrize("ema", [0, 0.5])
def test_nothing_under_log_changes_a_weight(ema, experiment, tmp_path):
    """Images draw random haze, validation takes statistics anew: the run goes on as if nobody had looked."""
    blind = tmp_path / "blind"
    shutil.copytree(experiment, blind)
    steps = ["warm_start.steps=1", "train.steps=3", f"train.ema={ema}"]
    assert run(experiment, *steps, *(f"log.{name}=1" for name in ("every", "pictures_every", "validate_every"))) == 0
    rarely = ["log.every=100", "log.pictures_every=0", "log.validate_every=0", "log.validation_limit=2"]
    assert run(blind, *steps, *rarely, "log.save_every=2") == 0
    one, other = weights_of(experiment), weights_of(blind)
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key], key


SHORT = ["warm_start.steps=0", "log.pictures_every=0", "data.validation_hazy=", "data.validation_clear="]


def test_a_resumed_run_takes_the_settings_in_force(experiment, tmp_path):
    """Rates, betas and the schedule: with a rate of next to nothing the weights stay where they were."""
    assert run(experiment, *SHORT, "train.steps=1") == 0
    before = checkpoint.read(experiment / "last.pt")
    given = ["nedr.learning_rate=1e-9", "nedr.betas=[0.5,0.9]", "train.schedule=cosine", "train.floor=0.5"]
    assert run(experiment, *SHORT, "train.steps=2", *given, "--resume") == 0
    after = checkpoint.read(experiment / "last.pt")
    for key, value in before["networks"].items():
        if key.endswith("weight"):
            torch.testing.assert_close(after["networks"][key], value, rtol=0, atol=1e-7)
    [group] = after["updater"]["optimisers"]["generators"]["param_groups"]
    assert list(group["betas"]) == [0.5, 0.9]
    assert group["lr"] == pytest.approx(0.5e-9)
    said = (experiment / "log.txt").read_text()
    assert "from now on nedr.learning_rate=1e-09 (until now 0.0001)" in said
    assert "from now on train.schedule=cosine (until now multistep)" in said


def test_a_loss_may_be_enabled_when_resuming(experiment):
    """Its optimiser, of which the checkpoint knows nothing, begins anew at the step where the others are."""
    assert run(experiment, *SHORT, "train.steps=1", "nedr.gan_weight=0") == 0
    assert run(experiment, *SHORT, "train.steps=2", "nedr.gan_weight=0.2", "--resume") == 0
    updater = checkpoint.read(experiment / "last.pt")["updater"]
    assert {plan["last_epoch"] for plan in updater["schedules"].values()} == {2}
    assert "discriminators" in updater["optimisers"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("seed=11", "seed was 10 until now, and cannot become 11, since the order of the images"),
        ("train.init=other.pth", "train.init was  until now.*it is read only where training begins; give train.init= "),
        ("nedr.encoder_weights=hub", "nedr.encoder_weights was none"),
        ("nedr.base_channels=12", "nedr.base_channels was 8.*the networks learned with it"),
        ("warm_start.learning_rate=1e-5", "warm_start.learning_rate was 0.0004.*the warm start is over"),
    ],
)
def test_settings_that_may_not_change_over_a_resume_are_refused_by_name(given, message, experiment):
    settings = config.load("nedr", models.settings_types(), [experiment / "config.yml"])
    checkpoint.save(experiment / "last.pt", {"model": "nedr", "stage": "train", "settings": config.to_dict(settings)})
    with pytest.raises(UserError, match=message):
        run(experiment, "--resume", given)


def test_each_stage_exports_its_own_best(experiment, monkeypatch):
    """The warm start's weights score higher than those of adversarial training, and are not taken for them."""
    figures = iter([30.0, 20.0])
    means = {"ours.ssim": 0.5, "hazy.psnr": 10.0}
    monkeypatch.setattr(train.scoring, "mean", lambda scores: means | {"ours.psnr": next(figures)})
    assert run(experiment, "train.steps=1", "log.pictures_every=0") == 0
    own = checkpoint.read_safetensors(experiment / "weights.safetensors")[1]
    earlier = checkpoint.read_safetensors(experiment / "warm_start.safetensors")[1]
    assert [(each["stage"], each["step"]) for each in (earlier, own)] == [("warm_start", 1), ("train", 2)]
    assert own["chosen_on"]["sets"] == ["sample:test/clear"]
    assert own["chosen_on"]["pictures"] == len(own["chosen_on"]["truths"]) == 1


def test_validation_on_other_images_resets_the_best_score(experiment):
    assert run(experiment, "warm_start.steps=0", "train.steps=1", "log.pictures_every=0") == 0
    state = checkpoint.read(experiment / "last.pt")
    checkpoint.save(experiment / "last.pt", state | {"best": 99.0})
    more = ["warm_start.steps=0", "train.steps=2", "log.pictures_every=0", "log.validation_limit=2"]
    assert run(experiment, *more, "--resume") == 0
    assert checkpoint.read(experiment / "last.pt")["best"] < 99


def test_a_checkpoint_with_earlier_network_names_resumes(experiment):
    assert run(experiment, "warm_start.steps=0", "train.steps=1", "log.pictures_every=0", "log.validate_every=0") == 0
    state = checkpoint.read(experiment / "last.pt")
    old = {key.replace("discriminator_", "judge_"): value for key, value in state["networks"].items()}
    assert old.keys() != state["networks"].keys()
    checkpoint.save(experiment / "last.pt", state | {"networks": old})
    read = checkpoint.read(experiment / "last.pt")["networks"]
    assert read.keys() == state["networks"].keys()
    assert run(experiment, "warm_start.steps=0", "train.steps=2", "log.pictures_every=0", "--resume") == 0


def test_validation_takes_tiles_as_set(experiment, monkeypatch):
    """As its own message recommends where memory does not suffice."""
    seen, dehaze = [], models.Method.dehaze
    monkeypatch.setattr(
        models.Method, "dehaze", lambda self, hazy, tile=None: seen.append(tile) or dehaze(self, hazy, tile)
    )
    assert run(experiment, "warm_start.steps=0", "train.steps=1", "log.pictures_every=0", "test.tile=128") == 0
    assert seen == [128]


OTHERS = {  # methods that train on other kinds of batches, at the tiny preset
    "aknet": ["aknet.width=8", "data.hazy=sample:test/hazy", "data.clear=sample:test/clear"],
    "kanet": ["kanet.width=8", "kanet.contrastive_weight=0", "data.hazy=", "data.depth=sample:train/depth"],
}


@pytest.mark.parametrize("model", OTHERS)
def test_paired_and_degraded_training_end_resume_and_score(model, experiment, tmp_path):
    """AKNet's schedule goes on where it stood (the released one begins anew), and so do KA-Net's sample weights."""
    steps = [*OTHERS[model], "warm_start.steps=0", "train.steps=3", "train.batch=2", "train.ema=0.5"]
    whole = tmp_path / "whole"
    shutil.copytree(experiment, whole)
    assert run(whole, *steps, model=model) == 0
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        assert run(experiment, *steps, model=model) == 128 + signal.SIGTERM
    assert run(experiment, *steps, "--resume", model=model) == 0
    one, other = checkpoint.read(whole / "last.pt"), checkpoint.read(experiment / "last.pt")
    for a, b in ((one["networks"], other["networks"]), (one["ema"]["weights"], other["ema"]["weights"])):
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert one["updater"]["schedules"] == other["updater"]["schedules"]
    pairs = ["--hazy", "sample:test/hazy", "--clear", "sample:test/clear"]
    assert scoring_command.main(["--checkpoints", str(experiment), *pairs, "test.panels=false"]) == 0
    assert json.loads((experiment / "results" / "results.json").read_text())["rows"][1]["method"] == model
    figures = [{k: v for k, v in line.items() if "speed" not in k} for line in lines(whole)]
    assert figures == [{k: v for k, v in line.items() if "speed" not in k} for line in lines(experiment)]


def test_a_signal_stops_after_a_whole_step_and_nothing_is_lost(experiment):
    """The whole group is signalled, as a terminal or a scheduler does it: the readers of images too."""
    arguments = ["--checkpoints", experiment, "train.steps=1000", "warm_start.steps=0", "data.workers=1"]
    never = ["log.save_every=100000", "log.validate_every=0", "log.pictures_every=0"]
    training = process("train.py", *arguments, *never, start_new_session=True)
    deadline = time.monotonic() + 120
    while not ((experiment / "log.jsonl").exists() and lines(experiment)) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(training.pid, signal.SIGTERM)
    output, _ = training.communicate(timeout=60)
    assert training.returncode == 128 + signal.SIGTERM, output
    assert "Traceback" not in output
    state = checkpoint.read(experiment / "last.pt")
    assert state["step"] >= 1
    assert f"stopped after step {state['step']}" in output
    method = models.load(experiment / "last.pt")
    assert method.dehaze(torch.rand(1, 3, 20, 30)).shape == (1, 3, 20, 30)


def test_an_unreadable_image_is_reported_once_and_replaced(experiment, tmp_path, capfd):
    for n in range(2):
        images.write(tmp_path / "clear" / f"{n}.png", torch.rand(3, 70, 80))
    (tmp_path / "clear" / "bad.png").write_bytes(b"not an image")
    assert run(experiment, f"data.clear={tmp_path / 'clear'}", "train.steps=4", "warm_start.steps=0") == 0
    shown = capfd.readouterr().err
    assert shown.count("bad.png: cannot be read") == 1
    assert "skipped" in (experiment / "log.txt").read_text()


def test_when_no_image_is_readable_the_weights_are_saved(experiment, tmp_path, monkeypatch):
    images.write(tmp_path / "clear" / "1.png", torch.rand(3, 70, 80))
    step = train.Updater.step

    def step_and_lose_the_pictures(*arguments):
        (tmp_path / "clear" / "1.png").write_bytes(b"gone")
        return step(*arguments)

    monkeypatch.setattr(train.Updater, "step", step_and_lose_the_pictures)
    few = ["train.steps=4", "warm_start.steps=0", "log.save_every=100", "data.cache=0"]  # which would remember it
    with pytest.raises(UserError, match="none of the 1 clear images can be used"):
        run(experiment, f"data.clear={tmp_path / 'clear'}", *few)
    assert checkpoint.read(experiment / "last.pt")["step"] == 1


def test_clear_only_training_without_validation_exports_the_latest(experiment):
    alone = ["data.hazy=", "data.validation_hazy=", "data.validation_clear=", "data.depth=sample:train/depth"]
    assert run(experiment, *alone, "warm_start.steps=0", "train.steps=1", "train.ema=0", "precision=bf16") == 0
    weights, metadata = checkpoint.read_safetensors(experiment / "weights.safetensors")
    assert metadata["step"] == 1
    last = checkpoint.read(experiment / "last.pt")
    assert last["ema"] == {}
    key = "removal.head.conv1.weight"
    assert torch.equal(weights[key], last["networks"][key])


def test_a_nonfinite_loss_stops_the_run_and_is_not_saved(experiment):
    assert run(experiment, "warm_start.steps=0", "train.steps=1") == 0
    before = (experiment / "last.pt").read_bytes()
    with pytest.raises(UserError, match=r"has become (nan|inf); last\.pt is from before"):
        run(experiment, "--resume", "warm_start.steps=0", "train.steps=3", "nedr.cycle_weight=1e39")
    assert (experiment / "last.pt").read_bytes() == before


def test_nonfinite_steps_change_nothing_and_the_run_resumes_with_a_lower_rate(experiment, monkeypatch):
    """Though nothing is logged, validated or saved meanwhile."""
    step, taken = train.Updater.step, []

    def from_the_second_on(updater, losses, batches):
        taken.append(1)
        factor = 1 if len(taken) == 1 else float("nan")
        return step(updater, lambda b: (each._replace(value=each.value * factor) for each in losses(b)), batches)

    how = [*OTHERS["aknet"], "warm_start.steps=0", "data.validation_hazy=", "data.validation_clear="]
    how += ["log.every=1000", "log.validate_every=0", "log.pictures_every=0", "train.recalibrate=0"]
    with monkeypatch.context() as patch:
        patch.setattr(train.Updater, "step", from_the_second_on)
        with pytest.raises(UserError, match=r"the last 2 steps were left out \(images in .*nonfinite\): .*lower aknet"):
            run(experiment, *how, "train.steps=9", "train.nonfinite=2", model="aknet")
    assert len(taken) == 3
    last = checkpoint.read(experiment / "last.pt")
    assert last["step"] == 3
    assert all(value.isfinite().all() for value in last["networks"].values())
    assert paths.find(experiment / "nonfinite" / "step_2")
    assert not (experiment / "weights.safetensors").exists()
    slower = ["train.steps=4", "log.every=1", "aknet.learning_rate=1e-6", "train.schedule=constant"]
    assert run(experiment, *how, "--resume", *slower, model="aknet") == 0
    assert lines(experiment)[-1]["rate/network"] == 1e-6


def test_nonfinite_weights_are_not_exported(experiment, monkeypatch):
    """However long the log waits: without validation pairs the latest weights replace the ones before."""
    quiet = ["warm_start.steps=0", "data.validation_hazy=", "data.validation_clear=", "log.every=1000"]
    assert run(experiment, *quiet, "train.steps=1") == 0
    before = (experiment / "weights.safetensors").read_bytes(), (experiment / "last.pt").read_bytes()
    step = train.Updater.step

    def diverging(updater, losses, batches):
        terms = step(updater, losses, batches)
        updater.optimisers["generators"].param_groups[0]["params"][0].data.fill_(float("nan"))
        return {name: torch.zeros(()) for name in terms}

    monkeypatch.setattr(train.Updater, "step", diverging)
    with pytest.raises(UserError, match="not written, the earlier file is kept"):
        run(experiment, "--resume", *quiet, "train.steps=2", "train.ema=0")
    assert before == ((experiment / "weights.safetensors").read_bytes(), (experiment / "last.pt").read_bytes())


LATEST = ["warm_start.steps=0", "data.validation_hazy=", "data.validation_clear=", "log.validate_every=0"]


def test_a_run_that_is_ended_early_by_its_steps_exports_what_it_has(experiment, monkeypatch):
    """Stopped, then resumed with fewer steps: there is nothing left to train, and the weights are written."""
    how = [*OTHERS["aknet"], *LATEST, "log.pictures_every=0"]
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert run(experiment, *how, "train.steps=9", model="aknet") == 128 + signal.SIGTERM
    assert not (experiment / "weights.safetensors").exists()
    assert run(experiment, *how, "train.steps=2", "--resume", model="aknet") == 0
    assert checkpoint.read_metadata(experiment / "weights.safetensors")["step"] == 2


def test_where_the_last_step_is_left_out_resuming_exports_the_others(experiment, monkeypatch):
    step, taken = train.Updater.step, []

    def third_is_nan(updater, losses, batches):
        taken.append(1)
        factor = float("nan") if len(taken) == 3 else 1
        return step(updater, lambda b: (each._replace(value=each.value * factor) for each in losses(b)), batches)

    how = [*OTHERS["aknet"], *LATEST, "log.pictures_every=0", "log.every=1000", "train.steps=3"]
    with monkeypatch.context() as patch:
        patch.setattr(train.Updater, "step", third_is_nan)
        with pytest.raises(UserError, match="the last step was left out"):
            run(experiment, *how, model="aknet")
    assert not (experiment / "weights.safetensors").exists()
    assert run(experiment, *how, "--resume", model="aknet") == 0
    assert (experiment / "weights.safetensors").exists()


def test_validation_images_of_another_size_are_refused_before_training(experiment, tmp_path):
    for folder, size in (("hazy", (40, 50)), ("clear", (40, 60))):
        images.write(tmp_path / folder / "1.png", torch.rand(3, *size))
    pair = [f"data.validation_{side}={tmp_path / side}" for side in ("hazy", "clear")]
    with pytest.raises(UserError, match=r"50x40 but its ground truth .* is 60x40; crop them to one size"):
        run(experiment, *OTHERS["aknet"], *pair, "warm_start.steps=0", model="aknet")
    assert not (experiment / "last.pt").exists()


def test_half_of_the_validation_is_none_and_that_is_said(experiment, capfd):
    how = [*OTHERS["aknet"], "warm_start.steps=0", "train.steps=1", "data.validation_hazy="]
    assert run(experiment, *how, model="aknet") == 0
    assert "nothing is validated: data.validation_clear is set, data.validation_hazy is not" in capfd.readouterr().err


def test_a_validation_that_fails_costs_no_step(experiment, tmp_path):
    """A damaged image is found at the first validation; once replaced, the run goes on with that validation."""
    for side in ("hazy", "clear"):
        images.write(tmp_path / side / "1.png", torch.rand(3, 40, 50))
    content = (tmp_path / "hazy" / "1.png").read_bytes()
    (tmp_path / "hazy" / "1.png").write_bytes(content[: len(content) // 2])
    how = [*OTHERS["aknet"], "warm_start.steps=0", "train.steps=3", "log.validate_every=2", "log.save_every=100"]
    how += [f"data.validation_{side}={tmp_path / side}" for side in ("hazy", "clear")]
    with pytest.raises(UserError, match=r"1\.png: cannot be read as an image"):
        run(experiment, *how, model="aknet")
    assert checkpoint.read(experiment / "last.pt")["step"] == 2
    (tmp_path / "hazy" / "1.png").write_bytes(content)
    assert run(experiment, *how, "--resume", model="aknet") == 0
    assert [line["step"] for line in lines(experiment) if "validation/psnr" in line] == [2, 3]


def test_an_export_that_fails_is_made_up_for(experiment, monkeypatch):
    """A full disk when the best weights are written: the resumed run validates again and writes them."""

    def full(path, *_):
        raise UserError(f"{path}: No space left on device")

    how = [*OTHERS["aknet"], "warm_start.steps=0", "train.steps=2", "log.validate_every=2"]
    with monkeypatch.context() as patch:
        patch.setattr(train.checkpoint, "save_weights", full)
        with pytest.raises(UserError, match=r"weights\.safetensors: No space left"):
            run(experiment, *how, model="aknet")
    assert checkpoint.read(experiment / "last.pt")["step"] == 2
    assert run(experiment, *how, "--resume", model="aknet") == 0
    assert checkpoint.read_metadata(experiment / "weights.safetensors")["step"] == 2


def test_training_can_begin_with_the_weights_of_a_file(experiment, tmp_path):
    steps = ["warm_start.steps=0", "train.steps=1", "data.validation_hazy="]
    assert run(experiment, *steps) == 0
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(TINY, other)
    given = f"train.init={experiment / 'weights.safetensors'}"
    assert run(other, *steps, given, "seed=11", "nedr.learning_rate=1e-12") == 0
    start = checkpoint.read_safetensors(experiment / "weights.safetensors")[0]
    after = checkpoint.read(other / "last.pt")["networks"]
    trained = [key for key in start if key.endswith("weight")]
    assert all(torch.allclose(start[key], after[key], atol=1e-6) for key in trained)
    (other / "last.pt").unlink()
    with pytest.raises(UserError, match=r"removal network of .* does not fit this model: \d+ of another shape"):
        run(other, *steps, given, "nedr.base_channels=12")


def test_shipped_weights_are_not_overwritten(experiment, monkeypatch):
    """In their own folder a run would replace them; beside them, with their settings, it does not."""
    monkeypatch.setattr(models, "SHIPPED", experiment.parent.resolve())
    folder = experiment.parent / "nedr"
    shutil.copytree(experiment, folder)
    (folder / "weights.safetensors").write_bytes(b"weights")
    with pytest.raises(UserError, match=r"ships with this project.*copy .*nedr/config\.yml into a new folder"):
        run(folder)
    with pytest.raises(UserError, match="ships with this project"):
        run(folder, *OTHERS["aknet"], model="aknet")
    assert (folder / "weights.safetensors").read_bytes() == b"weights"


def test_the_folder_may_begin_with_the_home_folder(experiment, monkeypatch):
    monkeypatch.setenv("HOME", str(experiment.parent))
    assert run("~/experiment", *OTHERS["aknet"], *LATEST, "train.steps=1", model="aknet") == 0
    assert (experiment / "weights.safetensors").exists()


REFUSED = {
    "no hazy folder": (["data.hazy=nowhere/hazy"], "nowhere/hazy: no such file or folder"),
    "empty folder": (["data.clear={empty}"], "no images in this folder"),
    "no clear images": (["data.clear=", "warm_start.clear="], "data.clear is not set|warm_start.clear is not set"),
    "absent files in a list": (["data.hazy={list}"], "1 of its 1 files are absent"),
    "crop the networks cannot take": (["data.crop_size=100"], "data.crop_size=100: nedr needs a multiple of 32"),
    "crop too small for KAN-CID": (["nedr.kan_cid=true"], "at least 128"),
    "crop larger than the images": (["data.crop_size=512"], "smaller than the crop of 512"),
    "no GPU": (["device=cuda"], "finds no GPU here; set device=cpu"),
    "precision": (["precision=fp16", "device=cpu"], "fp16 needs a GPU"),
    "nothing to do": (["train.steps=0", "warm_start.steps=0"], "nothing to train"),
    "weights file": (["nedr.encoder_weights=nowhere.pth"], "no checkpoint nowhere.pth"),
    "unknown setting": (["train.step=3"], "did you mean 'steps'"),
    "another method": (["--model", "d4", "nedr.learning_rate=1e-3"], r"d4 is; write d4\.learning_rate"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_invalid_settings_are_refused_with_the_remedy(experiment, tmp_path, case, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.flist").write_text("absent.png\n")
    given, message = REFUSED[case]
    given = [text.format(empty=tmp_path / "empty", list=tmp_path / "list.flist") for text in given]
    with pytest.raises(UserError, match=message) as refusal:
        run(experiment, *given)
    assert "\n" not in str(refusal.value)


def test_runs_and_checkpoints_that_do_not_fit_are_refused(experiment):
    with pytest.raises(UserError, match="dcp has nothing to train"):
        train.main(["--model", "dcp", "--checkpoints", str(experiment)])
    with pytest.raises(UserError, match="did you mean 'nedr'"):
        train.main(["--model", "ned", "--checkpoints", str(experiment)])
    last = experiment / "last.pt"
    last.write_bytes(b"PK damaged")
    with pytest.raises(UserError, match="holds a run already: continue with --resume"):
        run(experiment)
    with pytest.raises(UserError, match="damaged, cut short"):
        run(experiment, "--resume")
    checkpoint.save(last, {"model": "other"})
    with pytest.raises(UserError, match="a checkpoint of other, not of nedr"):
        run(experiment, "--resume")


def test_refusals_leave_with_status_2_and_one_line(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["train.py", "--checkpoints", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert ended.value.code == 2
    shown = capfd.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: no settings file ")
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize("preset", sorted(path.parent.name for path in ROOT.glob("checkpoints/*/config.yml")))
def test_presets_are_valid(preset):
    model = name if (name := preset.removeprefix("train_")) in models.names() else "nedr"
    settings = config.load(model, models.settings_types(), [ROOT / "checkpoints" / preset / "config.yml"])
    models.check_training(settings)
    assert not any(str(path).startswith("/") for path in (settings.data.hazy, settings.data.clear, settings.test.hazy))
    data = settings.data
    for name in data.validation_pairs:  # weights are not chosen on what is scored
        benchmark, _, split = name.partition(":")
        assert BENCHMARKS[benchmark].to_train_on(split or "all"), f"{preset} validates on {name}"
    pools = [str(source).lower() for source in (data.validation_hazy, data.validation_clear)]
    scored = [name.lower().partition("-")[0] for name in GROUPS["all"]]
    assert not any(part.startswith(name) for pool in pools for part in pool.split("/") for name in scored)
    assert not any(pool.startswith("sample:test") for pool in pools if preset != "tiny")
