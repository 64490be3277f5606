"""test.py under torchrun: two processes share the images, and report what one does."""

import csv
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data import images, paths

ROOT = Path(__file__).resolve().parent.parent
QUICK = ["--model", "dcp", "dcp.guided_filter=false", "test.panels=false"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def run_two(folder: Path, *argv: str) -> tuple[int, str, str]:
    """test.py in two processes by torchrun: exit status, output and errors."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, ROOT / "test.py", *QUICK, *argv]
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def run_one(tmp_path, monkeypatch, capsys):
    """A function that runs test.py in this process, in the folder of the test: exit status, output and errors."""

    def run(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["test.py", *QUICK, *argv])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "test.py"), run_name="__main__")
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def pairs(tmp_path):
    for n in range(5):
        clear = torch.rand(3, 24, 36, generator=torch.Generator().manual_seed(n))
        images.write(tmp_path / f"clear/{n}.png", clear)
        images.write(tmp_path / f"hazy/{n}.png", 0.6 * clear + 0.35)
    return ["--hazy", "hazy", "--clear", "clear"]


def figures(folder: Path) -> list:
    with open(folder / "per_image.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def test_two_processes_report_the_same_as_one(tmp_path, pairs, run_one):
    status, alone, _ = run_one(*pairs, "--output", "one")
    assert status == 0
    status, out, err = run_two(tmp_path, *pairs, "--output", "two")
    assert status == 0, err
    assert out.count("5 images done") == alone.count("5 images done") == 1
    assert out.count("protocol ours") == 1
    assert figures(tmp_path / "two") == figures(tmp_path / "one")
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert [each["mean"] for each in one["rows"]] == [each["mean"] for each in two["rows"]]
    for path in paths.find(tmp_path / "one/pictures"):
        assert path.read_bytes() == (tmp_path / "two/pictures" / path.name).read_bytes()
    assert not list((tmp_path / "two").glob("progress*"))


@pytest.mark.slow
def test_work_of_several_processes_is_not_repeated(tmp_path, pairs, run_one):
    """A run that cannot write its report leaves the notes of both; one process goes on with them."""
    (tmp_path / "out/results.json").mkdir(parents=True)
    status, _, err = run_two(tmp_path, *pairs, "--output", "out")
    assert status != 0
    assert err.count("cannot write out/results.json") == 1
    assert len(list((tmp_path / "out").glob("progress*"))) == 2
    (tmp_path / "out/results.json").rmdir()
    status, out, err = run_one(*pairs, "--output", "out")
    assert (status, "5 images done" in out) == (0, True)
    assert "continuing an interrupted run: 10 images are done" in err  # hazy and dehazed
    assert [row["resumed"] for row in json.loads((tmp_path / "out/results.json").read_text())["rows"]] == [5, 5]
    assert not list((tmp_path / "out").glob("progress*"))


@pytest.mark.slow
def test_an_unreadable_image_is_reported_once_from_any_process(tmp_path, pairs):
    (tmp_path / "hazy/1.png").write_bytes(b"no image")  # the second process's
    status, out, err = run_two(tmp_path, *pairs, "--output", "out")
    assert status != 0
    assert "4 images done" in out
    assert err.count("skipped: hazy/1.png") == 1
    assert len(figures(tmp_path / "out")) == 8
