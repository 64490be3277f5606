"""NeDR as ONNX files: the numbers of PyTorch at sizes that the export never saw, and a program without PyTorch."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny

import models
from data import images, paths
from utils.errors import UserError
from utils.evaluation import metrics

pytest.importorskip("onnx", reason="onnx, an extra (requirements-extras.txt), is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime, an extra, is not installed")
from models import export_onnx  # noqa: E402

EXAMPLE = Path(__file__).resolve().parents[2] / "benchmarks/examples/onnx_dehaze.py"
HAZY = "sample:test/hazy"


@pytest.fixture(scope="module")
def method():
    return models.load()


@pytest.fixture(scope="module")
def graphs(method, tmp_path_factory):
    return export_onnx.export(method, tmp_path_factory.mktemp("onnx"))


def run(path, **given):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {name: value.numpy() for name, value in given.items()})


def hazy(height: int, width: int) -> torch.Tensor:
    return F.interpolate(images.read(paths.find(HAZY)[1])[None], (height, width), mode="bilinear")


def largest(found, expected) -> float:
    return max(float(np.abs(a - b.numpy()).max()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("size", [(192, 320), (256, 192), (128, 416)])
def test_network(method, graphs, size):
    small = hazy(*size)
    with torch.no_grad():
        expected = method.removal.estimate_haze(small, "learned")
    assert largest(run(graphs[0], small=small), [expected.transmission, expected.airlight]) < 1e-5


@pytest.mark.parametrize("size", [(360, 640), (267, 400), (416, 384), (999, 301), (193, 1000)])
def test_whole_picture(method, graphs, size):
    picture = hazy(*size)
    expected = method.estimate(picture)
    assert largest(run(graphs[1], hazy=picture), [expected["clear"], expected["transmission"]]) < 1e-4


@pytest.mark.parametrize(("kind", "share"), [("fp16", 0.55), ("int8", 0.35)])
def test_smaller_weights_cost_less_than_a_tenth_of_a_decibel(graphs, kind, share):
    """On the mean of the sample set's test images, of the files that are written."""
    small, decibels = export_onnx.compress(graphs[1], kind), []
    assert small.stat().st_size < share * graphs[1].stat().st_size
    for path in paths.find(HAZY):
        clear = images.read(paths.resolve("sample:test/clear") / f"{path.stem.split('_')[0]}.png")
        found = [torch.from_numpy(run(graph, hazy=images.read(path)[None])[0][0]) for graph in (graphs[1], small)]
        decibels.append([metrics.psnr(each, clear) for each in found])
    whole, less = np.mean(decibels, 0)
    print(kind, small.stat().st_size, whole, less)
    assert less > whole - 0.1


def test_the_example_runs_without_pytorch(method, graphs, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('there is none')")
    source = paths.find(HAZY)[0]
    argv = [sys.executable, EXAMPLE, graphs[1], source, tmp_path / "clear.png"]
    done = subprocess.run(argv, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    expected = method.dehaze(images.read(source)[None])[0]
    assert (images.read(tmp_path / "clear.png") - expected).abs().max() <= 0.51 / 255
    assert len(EXAMPLE.read_text().splitlines()) <= 25


def test_what_cannot_be_exported(tmp_path):
    with pytest.raises(UserError, match="AKNet cannot be exported"):
        export_onnx.export(models.AKNet.__new__(models.AKNet), tmp_path)
    with pytest.raises(UserError, match="needs a working size"):
        export_onnx.export(tiny(), tmp_path)


def test_without_onnx(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r"pip install -r requirements-extras\.txt"):
        export_onnx.library()


def test_command(tmp_path, capsys):
    export_onnx.main(["--output", str(tmp_path), "--fp16", "--int8"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "network.onnx",
        "network_fp16.onnx",
        "network_int8.onnx",
        "picture.onnx",
        "picture_fp16.onnx",
        "picture_int8.onnx",
    ]
    assert capsys.readouterr().out.count(" MB") == 6
