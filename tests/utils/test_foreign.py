import argparse
import collections
import datetime
import os
import pathlib
import subprocess
import types

import numpy as np
import pytest
import torch
from torch import nn

from utils import checkpoint, foreign
from utils.errors import UserError

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2), "n.num_batches_tracked": torch.tensor(5)}
OTHER = {"b.weight": torch.zeros(2)}


def fits(weights: dict) -> bool:
    return "a.weight" in weights


def same(found: dict | None, expected: dict = WEIGHTS) -> bool:
    return (
        found is not None and found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)
    )


def prefixed(prefix: str) -> dict:
    return {f"{prefix}{key}": value for key, value in WEIGHTS.items()}


NAMES = ("model_state_dict", "net_g", "netG", "generator", "params", "weights", "net", "G", "model", "state")
WRAPPED = {
    **{name: {name: WEIGHTS, "epoch": 3} for name in NAMES},
    **{prefix: prefixed(prefix) for prefix in ("module.", "module.module.", "_orig_mod.", "model.", "net.G.module.")},
    "nested once": {"checkpoint": {"state_dict": WEIGHTS, "epoch": 3}, "best": 1.5},
    "nested, with a prefix": {"a": {"b": {"c": prefixed("_orig_mod.module.")}}},
    "Lightning": {"state_dict": prefixed("model.") | {"loss.vgg.0.weight": torch.ones(3)}, "callbacks": {}},
    "beside a discriminator": {"net_d": OTHER, "net_g": WEIGHTS},
    "in a tuple": {"saved": (WEIGHTS, 3)},
    "scalars beside": WEIGHTS | {"epoch": 3, "best": torch.tensor(1.0), "name": "x", "args": {"lr": 1e-4}},
    "averaged": {"params": OTHER | {"a.weight": torch.zeros(1)}, "params_ema": WEIGHTS},
    "AveragedModel": {"n_averaged": torch.tensor(3), **prefixed("module.")},
    "an optimiser beside": {**WEIGHTS, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{}]}},
    "random states beside": {**WEIGHTS, "rng": {"cpu": torch.ones(4, dtype=torch.uint8)}},
}


@pytest.mark.parametrize("case", WRAPPED)
def test_weights_are_found_at_any_depth(case):
    assert same(foreign.find(WRAPPED[case], fits))


def test_networks_without_plain_weights_are_found_too():
    """Those of spectral norm, whose parameter is weight_orig."""
    state = nn.utils.spectral_norm(nn.Linear(2, 3, bias=False)).state_dict()
    assert foreign.find({"net_d": state}, lambda weights: "weight_orig" in weights).keys() == state.keys()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_become_float32_and_counts_stay_integers(dtype):
    found = foreign.find({k: v.to(dtype) if v.is_floating_point() else v for k, v in WEIGHTS.items()}, fits)
    assert same(found)
    assert {value.dtype for value in found.values()} == {torch.float32, torch.int64}


def test_averaged_weights_may_be_ignored():
    assert same(foreign.find({"params_ema": {"a.weight": torch.zeros(1)}, "params": WEIGHTS}, fits, averaged=False))
    assert same(foreign.find({"params": WEIGHTS}, fits, averaged=True))


def test_several_matching_sets_are_reported():
    with pytest.warns(UserWarning, match="'best', 'last': the first is taken"):
        assert same(foreign.find({"best": WEIGHTS, "last": {"a.weight": torch.zeros(1)}}, fits))


def test_weights_that_match_no_method():
    looped = {"x": OTHER}
    looped["itself"] = looped
    for state in ({}, {"a.weight": 3}, OTHER, looped, [1, 2]):
        assert foreign.find(state, fits) is None


def objects_beside_weights() -> dict:
    """Objects that people save beside weights."""
    layer = nn.Linear(3, 2)
    optimiser = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    return {
        "a Namespace": argparse.Namespace(root=pathlib.Path("data"), when=datetime.date(2024, 1, 1)),
        "a SimpleNamespace": types.SimpleNamespace(a=1),
        "a path": pathlib.Path("data") / "ITS",
        "a date": [datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC), datetime.timedelta(seconds=3)],
        "a scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 5),
        "another": torch.optim.lr_scheduler.OneCycleLR(optimiser, 1.0, 10),
        "an optimiser": optimiser,
        "a scaler": torch.amp.GradScaler("cpu"),
        "NumPy's": [np.random.get_state(), np.ones(3), np.float64(1.5), np.array(["a"])],
        "containers": [collections.defaultdict(list, {"a": [1]}), collections.deque([1, 2]), frozenset([1])],
    }


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("case", objects_beside_weights())
def test_objects_beside_the_weights_are_not_created(tmp_path, case, zipped):
    state = {"state_dict": WEIGHTS, "beside": objects_beside_weights()[case]}
    torch.save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    read = checkpoint.read(tmp_path / "a.pth")
    assert same(foreign.find(read, fits))
    assert not isinstance(read["beside"], argparse.Namespace | pathlib.Path | torch.optim.Optimizer)


def test_windows_paths_are_read_anywhere(tmp_path):
    torch.save({"net": WEIGHTS, "at": pathlib.PureWindowsPath("C:/x")}, tmp_path / "a.pth")
    data = (tmp_path / "a.pth").read_bytes()
    assert b"PureWindowsPath" in data
    (tmp_path / "a.pth").write_bytes(data)
    assert "pathlib.WindowsPath" in foreign.STAND_IN_CLASSES
    assert same(foreign.find(checkpoint.read(tmp_path / "a.pth"), fits))


class Call:
    """Unpickled as a call of ``function``."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [eval, exec, os.system, subprocess.call, getattr, __import__])
def test_calls_beside_the_weights_are_refused_and_not_executed(tmp_path, function):
    trace = tmp_path / "trace"
    commands = {os.system: f"touch {trace}", subprocess.call: ["touch", str(trace)]}
    args = (trace, "name") if function is getattr else (commands.get(function, f"open({str(trace)!r}, 'w')"),)
    torch.save({"state_dict": WEIGHTS, "x": Call(function, *args)}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="code in checkpoints is never run"):
        checkpoint.read(tmp_path / "evil.pth")
    assert not trace.exists()
