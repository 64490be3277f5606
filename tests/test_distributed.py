"""Two processes that torchrun starts, on the CPU: equal to one, resumed, stopped, and one of them lost."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import rank_checks
import torch

import models
import train
from data import datasets
from utils import checkpoint, config
from utils.device import pick
from utils.distributed import Ranks
from utils.errors import UserError
from utils.evaluation import scoring
from utils.training.schedules import schedule

TESTS = Path(__file__).resolve().parent
TINY = TESTS.parent / "checkpoints" / "tiny" / "config.yml"


def torchrun(*arguments, limit: float = 240) -> tuple[int, str]:
    """The exit status of tests/rank_checks.py in two processes, and all that they print; a hang fails."""
    started = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*started, TESTS / "rank_checks.py", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit
    )
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """The folder in which two processes wrote their results, and all that they printed."""
    folder = tmp_path_factory.mktemp("ranks")
    for name in ("whole", "resumed", "failing"):
        (folder / name).mkdir()
        shutil.copy(TINY, folder / name)
    status, printed = torchrun(folder)
    assert (folder / "runs.1.pt").exists(), printed
    assert status == 1, printed  # torchrun's own: the last run fails
    return folder, printed


def results(checked, name: str) -> list:
    return [torch.load(checked[0] / f"{name}.{rank}.pt", weights_only=False) for rank in range(2)]


def largest_difference(one, other) -> float:
    """Between two lists of tensors, over the largest value in each."""
    scale = max(a.abs().max().item() for a in one)
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True)) / scale


@pytest.fixture(scope="module")
def alone():
    """Adversarial training's step in one process, with both batches as one."""
    return rank_checks.adversarial_step(Ranks(), False)


def test_two_processes_take_the_step_of_one_with_both_their_batches(checked, alone):
    first, second = results(checked, "adversarial")
    assert alone["gradients"].keys() == {"generators", "depth", "discriminators"}
    for optimiser, gradients in alone["gradients"].items():
        assert all(map(torch.equal, first["gradients"][optimiser], second["gradients"][optimiser]))
        assert largest_difference(gradients, first["gradients"][optimiser]) < 1e-7
    assert first["terms"] == pytest.approx(alone["terms"], rel=1e-9)
    for key, value in alone["state"].items():
        assert torch.equal(first["state"][key], second["state"][key])  # those of spectral normalisation among them
        if "running" in key:
            torch.testing.assert_close(first["state"][key], value, rtol=1e-9, atol=1e-12)


def test_without_sync_batchnorm_statistics_are_each_batchs_own(checked, alone):
    """And so are the gradients of another function; but weights and running statistics agree after the step."""
    first, second = results(checked, "alone")
    for optimiser, gradients in alone["gradients"].items():
        assert all(map(torch.equal, first["gradients"][optimiser], second["gradients"][optimiser]))
        assert largest_difference(gradients, first["gradients"][optimiser]) > 1e-3
    for key, value in alone["state"].items():
        assert torch.equal(first["state"][key], second["state"][key])
        if (
            key == "removal.pyramid.encoder.bn1.running_var"
        ):  # means of the shares' own: what lies between them is missing
            assert not torch.allclose(first["state"][key].double(), value, rtol=1e-4)


def test_steps_of_several_batches_are_clipped_by_the_mean_and_spare_what_is_unused(checked):
    one = rank_checks.steps(Ranks())
    for each in results(checked, "steps"):
        for a, b in zip(each["weights"], one["weights"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        assert each["unused"] == one["unused"] == [None] * 4


def test_sync_batchnorm_is_batch_norm_over_all_shares(checked):
    one, both = rank_checks.norms(Ranks()), results(checked, "norms")
    for key in ("y", "dx", "eval"):
        torch.testing.assert_close(torch.cat([each[key] for each in both]), one[key])
    for k, gradient in enumerate(one["gradients"]):
        torch.testing.assert_close(sum(each["gradients"][k] for each in both), gradient)
    for each in both:
        assert each["same keys"]
        assert each["statistics"].keys() == one["statistics"].keys()
        for key, value in one["statistics"].items():
            torch.testing.assert_close(each["statistics"][key], value)


def test_figures_states_and_errors_reach_all_processes(checked):
    first, second = results(checked, "small")
    for each in (first, second):
        assert each["spread"] == [0, 1, 4, 9, 16]
        assert each["agree"] == [1]
        assert "the loss 'b' has become nan" in each["finite"]
        assert each["same"].startswith("last.pt is not the same for all processes")
        assert each["mean"] == 0.5
        assert torch.equal(each["drawn"], each["drawn again"])
    assert not torch.equal(first["drawn"], second["drawn"])
    [other] = first["state"]["others"]
    assert other["buffers"] == {"memory": torch.tensor([1.0])}  # what is equal is not kept
    assert (first["memory"], second["memory"]) == (9, 1)


def test_a_run_of_two_is_written_once_and_resumed_bit_for_bit(checked):
    folder, printed = checked
    first, second = results(checked, "runs")
    assert first["statuses"] == second["statuses"] == [0, 143, 0]  # the signal came to the second alone
    assert first["loaders"] == second["loaders"]
    names = {"config.yml", "settings.yml", "last.pt", "weights.safetensors", "log.txt", "log.jsonl", "tensorboard"}
    names.add("warm_start.safetensors")
    assert {path.name for path in (folder / "whole").iterdir()} == names
    assert len(list((folder / "whole" / "tensorboard").iterdir())) == 1
    assert printed.count("nedr on cpu and 1 more, from step 0") == 3  # and once where one fails
    lines = [json.loads(line) for line in (folder / "whole" / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss/generators" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    for line in steps:
        assert line["speed/images_per_second"] == pytest.approx(2 * line["speed/steps_per_second"])
        assert 0 <= line["speed/waiting"] <= 1
    one, other = (checkpoint.read(folder / name / "last.pt") for name in ("whole", "resumed"))
    for a, b in ((one["networks"], other["networks"]), (one["ema"]["weights"], other["ema"]["weights"])):
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert (one["step"], one["seen"]) == (other["step"], other["seen"]) == (2, 4)
    assert torch.equal(one["others"][0]["random"]["torch"], other["others"][0]["random"]["torch"])
    assert not torch.equal(one["random"]["torch"], one["others"][0]["random"]["torch"])


def test_sharded_validation_has_the_mean_of_all(checked):
    folder = checked[0] / "whole"
    settings = config.load("nedr", models.settings_types(), [TINY], ["log.validation_limit=3"])
    method = models.load(folder / "weights.safetensors")
    mean = scoring.mean(scoring.score(method.dehaze, datasets.validation(settings)))
    assert mean["ours.psnr"] == pytest.approx(checkpoint.read(folder / "last.pt")["best"], abs=1e-4)


def test_an_error_of_one_process_is_reported_once_and_ends_all(checked):
    printed = checked[1]
    assert printed.count("error: the sky fell; put it back") == 1
    assert printed.count("error: another process of this run has ended") == 1
    assert "nothing was saved yet" in printed
    assert "Traceback" not in printed.partition("torch.distributed.elastic")[0].split("the sky fell")[0]


@pytest.mark.slow
def test_a_run_goes_on_with_other_numbers_of_processes_and_survives_one_that_is_killed(checked, monkeypatch):
    """One process for a step, then two again, of which one is killed in their second step."""
    folder, loader, calls = checked[0] / "resumed", train.loading.loader, []
    monkeypatch.setattr(train.loading, "loader", lambda *a, **k: calls.append(a[1:4]) or loader(*a, **k))
    often = ["log.validate_every=0", "train.recalibrate=0", "log.save_every=1", "data.validation_hazy="]
    often.append("data.validation_clear=")
    assert train.main(["--checkpoints", str(folder), "--resume", "train.steps=3", *often]) == 0
    state = checkpoint.read(folder / "last.pt")
    assert (state["step"], state["seen"], "others" in state) == (3, 5, False)
    assert calls == [(4, 5, 1)]

    status, printed = torchrun("train", 2, folder, "--resume", "train.steps=9", *often, limit=120)
    assert status == 1
    assert "and 1 more (until now 1 in all; new processes have new random seeds), from step 4" in printed
    assert printed.count("error: another process of this run has ended") == 1
    assert "last.pt is from step 5: continue with --resume" in printed
    state = checkpoint.read(folder / "last.pt")
    assert (state["step"], state["seen"], len(state["others"])) == (4, 7, 1)


def test_milestones_stay_where_they_are_in_the_data():
    """Epochs of 12 images: 6 steps of 2, then, from step 3 on, of 4: the first ends after 3 + 6 / 4 of these."""
    rates = {}
    for ahead in (0.0, 6 / 4 - 3):
        optimiser, epoch = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0), 12 / (4 if ahead else 2)
        plan = schedule(optimiser, "multistep", 20, epoch, [1, 2], 0.5, ahead=ahead)
        rates[ahead] = [plan.lr_lambdas[0](step) for step in range(10)]
    assert rates[0.0] == [1] * 6 + [0.5] * 4
    assert rates[-1.5] == [1] * 4 + [0.5] * 4 + [0.25] * 2


def test_devices_of_several_processes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("auto", "cuda"):
        assert pick(name, 1, 2) == torch.device("cuda:1")
        with pytest.raises(UserError, match="3 processes, 2 GPUs: start 2"):
            pick(name, 0, 3)
    with pytest.raises(UserError, match="device=cuda:1: 2 processes cannot share a GPU; with device=cuda each has"):
        pick("cuda:1", 0, 2)
    assert pick("cpu", 1, 2) == torch.device("cpu")
    assert pick("auto") == torch.device("cuda")
