"""The numbers of the released KA-Net, from an official state dict made by a rule (tests/golden), and back to one."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import GOLDEN, fill

import models
from models.kanet import KANet, official
from utils import config, foreign

# kanet_s: larger weights, and queries that are not nearly zero; rounding is larger with them.
SCALES, TOLERANCES = {"kanet": 0.5, "kanet_s": 0.75}, {"kanet": 1e-5, "kanet_s": 1e-4}


@pytest.fixture(scope="module")
def keys() -> dict[str, list[int]]:
    return json.loads((GOLDEN / "kanet_keys.json").read_text())


def official_state(keys: dict[str, list[int]], name: str) -> dict[str, torch.Tensor]:
    batch_norms = {key.removesuffix("running_mean") for key in keys if key.endswith("running_mean")}
    state = {}
    for key, shape in keys.items():
        module, _, leaf = key.rpartition(".")
        norm = leaf == "weight" and (f"{module}." in batch_norms or "norm" in module.rpartition(".")[2])
        if leaf == "num_batches_tracked":
            state[key] = torch.zeros(shape, dtype=torch.long)
            continue
        state[key] = torch.from_numpy(fill(key, shape, norm_weight=norm, scale=SCALES[name]))
        if name == "kanet_s" and leaf == "task_query":
            state[key] *= np.prod(shape[1:]) ** 0.5
    return state


@pytest.fixture(scope="module", params=SCALES)
def released(request, keys):
    """The golden arrays, the official state dict that they are of, and the method made from it."""
    with np.load(GOLDEN / f"{request.param}.npz") as arrays:
        golden = {key: torch.from_numpy(arrays[key]) for key in arrays}
    state = official_state(keys, request.param)
    settings = config.load("kanet", models.settings_types(), overrides=["kanet.width=8"]).method
    file = {"model": {f"module.{key}": value for key, value in state.items()}, "epoch": 3, "losses": [0.1]}
    method = KANet.from_official(foreign.find(file, KANet.recognises), settings).eval()
    random = method.network.removal.remove.random
    torch.testing.assert_close((random.weight, random.bias), (golden["rff_weight"], golden["rff_bias"]))
    random.weight.copy_(golden["rff_weight"])
    random.bias.copy_(golden["rff_bias"])
    return SimpleNamespace(golden=golden, state=state, method=method, tolerance=TOLERANCES[request.param])


@torch.no_grad()
def check(released, x: torch.Tensor, y: str, z: str | None = None, stride: int = 1) -> None:
    """The goldens' inputs are those of the released network, which wants [-1,1] in place of our [0,1]."""
    clear, features = released.method.network((x + 1) / 2)
    close = {"rtol": 0, "atol": released.tolerance}
    torch.testing.assert_close(clear[..., ::stride, ::stride], released.golden[y], **close)
    if z:
        torch.testing.assert_close(features, released.golden[z], **close)


def test_network(released):
    check(released, released.golden["input"], "output_0", "output_z")


def test_feature_maps_of_odd_sizes_are_cropped(released):
    check(released, released.golden["odd_input"], "odd_output_0")


LARGER = pytest.mark.parametrize("released", ["kanet_s"], indirect=True)  # the stronger of the two, to save time


def larger(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(7).random(shape)).float()


@LARGER
def test_a_larger_image(released):
    check(released, larger(1, 3, 256, 256), "big_output_0_stride4", "big_output_z", stride=4)


@LARGER
def test_more_positions_than_queries(released):
    check(released, larger(1, 3, 512, 640), "wide_output_0_stride8", stride=8)


def test_resampled_features_draw_weights_before_biases(released):
    models.change(released.method, {"random_features": "resampled"})
    torch.manual_seed(1234)
    check(released, released.golden["input"], "output_0", "output_z")
    with pytest.raises(AssertionError):
        check(released, released.golden["input"], "output_0")
    models.change(released.method, {"random_features": "fixed"})


def test_an_official_file_is_written_as_it_was_read(released, keys):
    found = released.method.to_official()
    assert found.keys() == {"model"}
    assert {key: list(value.shape) for key, value in found["model"].items()} == {
        f"module.{key}": shape for key, shape in keys.items()
    }
    dead = {key for key in keys if key.startswith(("Tencoder.mini_patch_embed4.", "convtail.conv_output."))}
    assert set(released.method.skipped) == dead
    for key, value in released.state.items():
        written = found["model"][f"module.{key}"]
        assert written.dtype == value.dtype
        assert torch.equal(written, torch.zeros_like(value) if key in dead else value), key


def test_the_official_file_determines_the_settings(released):
    method = released.method
    assert method.settings.width == 64
    assert [name for name, _ in method.named_children()] == ["network"]
    assert len(official.names(method.network.state_dict())) == 481 - 6
