"""What every method does: images of any size, the registry, loading from files."""

import json

import pytest
import safetensors.torch
import torch
from helpers import D4, tiny, tiny_settings
from hypothesis import given, settings
from hypothesis import strategies as st

import models
from models.dcp import DCP
from models.method import Method, reflect
from utils import checkpoint, config
from utils.errors import UserError


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(0, 40))
def test_reflection_repeats_for_small_images(n, more):
    bounce = list(range(n)) + list(range(n - 2, 0, -1))
    expected = torch.tensor([bounce[k % len(bounce)] for k in range(n + more)])
    for dim in (0, 1):
        x = torch.arange(n).unsqueeze(1 - dim)
        assert torch.equal(reflect(x, dim, n + more).flatten(), expected)


class Echo(Method):
    """Gives back what it is given, and remembers its size."""

    multiple, minimum = 8, 24

    def restore(self, hazy):
        self.seen = tuple(hazy.shape[2:])
        return hazy


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60))
def test_dehaze_pads_and_crops(height, width):
    method, x = Echo(None), torch.rand(2, 3, height, width)
    assert torch.equal(method.dehaze(x), x)
    assert method.seen == tuple(max(24, -(-side // 8) * 8) for side in (height, width))


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 1, 8, 8), (1, 3, 0, 8), (0, 3, 8, 8)])
def test_dehaze_refuses_what_is_no_image(shape):
    with pytest.raises(UserError, match="N,3,H,W"):
        Echo(None).dehaze(torch.zeros(shape))


@pytest.mark.parametrize("size", [(1, 1), (3, 131), (150, 97)])
def test_nedr_takes_any_size(size):
    method = tiny().eval()
    clear = method.dehaze(torch.rand(1, 3, *size))
    assert clear.shape == (1, 3, *size)
    assert clear.isfinite().all()
    assert clear.min() >= 0
    assert clear.max() <= 1
    assert not clear.requires_grad


def test_registry():
    assert models.names() == ["nedr", "d4", "aknet", "kanet", "dcp"]


def test_dcp_finds_no_transmission_above_1():
    """Where the guided filter overshoots, between the dark and the bright."""
    halves = torch.rand(3, 96, 96) * 0.05
    halves[:, :, 48:] += 0.9
    t = models.load("dcp").transmission(halves)
    assert t.max() == 1


def test_dcp_cannot_be_trained():
    values = config.load("dcp", models.settings_types())
    assert isinstance(models.build(values), DCP)
    with pytest.raises(UserError, match="nothing to train"):
        models.check_training(values)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny D4 with a learned airlight as train.py saves it: last.pt, whose average is another, and its export."""
    folder, overrides = tmp_path_factory.mktemp("run"), (*D4, "data.crop_size=64")
    values = tiny_settings(*overrides)
    method = tiny(*overrides).eval()
    averaged = {
        f"removal.{key}": value * 0.9 if value.is_floating_point() else value
        for key, value in method.removal.state_dict().items()
    }
    state = {"model": "nedr", "settings": config.to_dict(values), "networks": method.state_dict()}
    checkpoint.save(folder / "last.pt", state | {"ema": {"weights": averaged, "steps": torch.tensor(5)}})
    checkpoint.save(folder / "plain.pt", state | {"ema": {}})
    metadata = {"model": "nedr", "settings": config.to_dict(values), "step": 7}
    checkpoint.save_weights(folder / "weights.safetensors", averaged, metadata)
    return folder, method, averaged


def same(method: Method, weights: dict[str, torch.Tensor]) -> bool:
    own = {key: value for key, value in method.state_dict().items() if key.startswith("removal.")}
    return own.keys() == weights.keys() and all(torch.equal(own[key], weights[key]) for key in own)


def test_load_prefers_the_average(trained):
    folder, method, averaged = trained
    loaded = models.load(folder / "last.pt")
    assert not loaded.training
    assert same(loaded, averaged)
    plain = {key: value for key, value in method.state_dict().items() if key.startswith("removal.")}
    assert same(models.load(str(folder / "last.pt"), ema=False), plain)
    loaded = models.load(folder / "plain.pt")
    assert same(loaded, plain)
    x = torch.rand(1, 3, 70, 40)
    assert torch.equal(loaded.dehaze(x), method.dehaze(x))


def test_load_exported_weights(trained):
    folder, _, averaged = trained
    loaded = models.load(folder / "weights.safetensors")
    assert [name for name, _ in loaded.named_children()] == ["removal"]
    assert same(loaded, averaged)
    assert loaded.settings.base_channels == 8


def test_settings_that_may_change_after_training(trained):
    file = trained[0] / "weights.safetensors"
    method = models.load(file, airlight="dark_channel", guided_filter=True)
    assert (method.settings.airlight, method.settings.guided_filter) == ("dark_channel", True)
    assert method.dehaze(torch.rand(1, 3, 90, 90)).shape == (1, 3, 90, 90)
    with pytest.raises(UserError, match=r"did you mean 'airlight'"):
        models.load(file, airlihgt="max")
    with pytest.raises(UserError, match="cannot change after training"):
        models.load(file, base_channels=16)
    with pytest.raises(UserError, match="max, dark_channel, learned"):
        models.load(file, airlight="brightest")
    with pytest.raises(UserError, match="true or false"):
        models.load(file, guided_filter="yes")


def test_learned_airlight_needs_its_head():
    method = tiny(*D4, "data.crop_size=64", "nedr.airlight=max", started=False)
    with pytest.raises(UserError, match="no airlight head"):
        models.change(method, {"airlight": "learned"})
    assert method.settings.airlight == "max"


def test_load_refuses(trained, tmp_path):
    folder, _, averaged = trained
    with pytest.raises(UserError, match="is a folder"):
        models.load(folder)
    with pytest.raises(UserError, match="no checkpoint"):
        models.load(folder / "absent.pt")
    with pytest.raises(UserError, match="no checkpoint"):
        models.load(folder / "absent.safetensors")
    for name in ("last.pt", "weights.safetensors"):
        whole = (folder / name).read_bytes()
        for size in (0, 100, len(whole) // 2, len(whole) - 50):
            (tmp_path / name).write_bytes(whole[:size])
            with pytest.raises(UserError, match=name):
                models.load(tmp_path / name)
    foreign = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1)}, foreign)
    with pytest.raises(UserError, match="neither"):
        models.load(foreign)
    changed = {"base_channels": 16, "kan_cid": False, "encoder": "test_efficientnet"}
    wrong = {"model": "nedr", "settings": {"nedr": changed}}
    checkpoint.save_weights(tmp_path / "wrong.safetensors", averaged, wrong)
    with pytest.raises(UserError, match="does not fit"):
        models.load(tmp_path / "wrong.safetensors")
    checkpoint.save_weights(tmp_path / "other.safetensors", averaged, {"model": "fognet", "settings": {}})
    with pytest.raises(UserError, match="unknown model 'fognet'"):
        models.load(tmp_path / "other.safetensors")


def test_official_weights_as_safetensors(official_state, tmp_path):
    """A bare official removal network is recognised in this format too."""
    file = tmp_path / "net_h2c.safetensors"
    safetensors.torch.save_file({k: v.contiguous() for k, v in official_state["net_h2c"].items()}, file)
    with pytest.warns(UserWarning, match="DREM"):
        method = models.load(file)
    state = official_state["net_h2c"]
    assert torch.equal(method.removal.idrm.layers[0].weight, state["nrn.imnet.layers.0.weight"])


def test_exported_metadata_tells_where_the_weights_are_from(trained):
    _, metadata = checkpoint.read_safetensors(trained[0] / "weights.safetensors")
    assert metadata["step"] == 7
    assert json.loads(json.dumps(metadata)) == metadata
