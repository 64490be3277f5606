"""NeDR as ONNX files: the numbers of PyTorch at sizes that the export never saw, and a program without PyTorch."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import tiny

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
def exported(tmp_path_factory):
    """The folder in which the command wrote all files of the shipped weights, and what it printed."""
    folder, printed = tmp_path_factory.mktemp("onnx"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        export_onnx.main(["--output", str(folder), "--fp16", "--int8"])
    return folder, printed.getvalue()


def load(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # more of them would spin while they wait
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def network(exported):
    return load(exported[0] / "network.onnx")


@pytest.fixture(scope="module")
def picture(exported):
    return load(exported[0] / "picture.onnx")


@pytest.fixture(scope="module")
def psnrs(picture):
    """The PSNR of each of the sample set's test images, dehazed in float32."""
    return psnrs_of(picture)


def run(session, **given):
    return session.run(None, {name: value.numpy() for name, value in given.items()})


def psnrs_of(session) -> list[float]:
    values = []
    for path in paths.find(HAZY):
        clear = images.read(paths.resolve("sample:test/clear") / f"{path.stem.split('_')[0]}.png")
        dehazed = run(session, hazy=images.read(path)[None])[0][0]
        values.append(metrics.psnr(torch.from_numpy(dehazed), clear))
    return values


def hazy(height: int, width: int) -> torch.Tensor:
    return F.interpolate(images.read(paths.find(HAZY)[1])[None], (height, width), mode="bilinear")


def largest(found, expected) -> float:
    return max(float(np.abs(a - b.numpy()).max()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("size", [(192, 320), (256, 192), (128, 416)])
def test_network(method, network, size):
    small = hazy(*size)
    with torch.no_grad():
        expected = method.removal.estimate_haze(small, "learned")
    assert largest(run(network, small=small), [expected.transmission, expected.airlight]) < 1e-5


@pytest.mark.parametrize("size", [(360, 640), (267, 400), (416, 384), (999, 301), (193, 1000)])
def test_picture_graph_matches_the_method(method, picture, size):
    image = hazy(*size)
    expected = method.estimate(image)
    assert largest(run(picture, hazy=image), [expected["clear"], expected["transmission"]]) < 1e-4


@pytest.mark.parametrize(("kind", "share"), [("fp16", 0.55), ("int8", 0.35)])
def test_smaller_weights_cost_less_than_a_tenth_of_a_decibel(exported, psnrs, kind, share):
    """On the mean of the sample set's test images, of the files that are written."""
    folder = exported[0]
    small = folder / f"picture_{kind}.onnx"
    assert small.stat().st_size < share * (folder / "picture.onnx").stat().st_size
    assert np.mean(psnrs_of(load(small))) > np.mean(psnrs) - 0.1


def test_the_example_runs_without_pytorch(method, exported, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('there is none')")
    source = paths.find(HAZY)[0]
    argv = [sys.executable, EXAMPLE, exported[0] / "picture.onnx", source, tmp_path / "clear.png"]
    done = subprocess.run(argv, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    expected = method.dehaze(images.read(source)[None])[0]
    assert (images.read(tmp_path / "clear.png") - expected).abs().max() <= 0.51 / 255
    assert len(EXAMPLE.read_text().splitlines()) <= 25


def test_unsupported_methods_are_refused(tmp_path):
    with pytest.raises(UserError, match="AKNet cannot be exported"):
        export_onnx.export(models.AKNet.__new__(models.AKNet), tmp_path)
    with pytest.raises(UserError, match="needs a working size"):
        export_onnx.export(tiny(), tmp_path)


def test_without_onnx(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r"pip install -r requirements-extras\.txt"):
        export_onnx.library()


def test_command_writes_and_names_all_files(exported):
    folder, printed = exported
    assert sorted(path.name for path in folder.iterdir()) == [
        "network.onnx",
        "network_fp16.onnx",
        "network_int8.onnx",
        "picture.onnx",
        "picture_fp16.onnx",
        "picture_int8.onnx",
    ]
    assert printed.count(" MB") == 6
