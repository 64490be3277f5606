"""Shared fixtures: tiny settings and methods, and official state dicts made by the rule of tests/golden/fill.py."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import models
from data import images, paths
from models.nedr.kan import knots
from utils import config

torch.set_num_threads(1)  # on a busy machine threads wait for each other, five times as long as the work takes

GOLDEN = Path(__file__).parent / "golden"
TINY = ("nedr.base_channels=8", "nedr.idrm_hidden=32", "nedr.drem_growth=8", "nedr.encoder_weights=none")
TINY += ("nedr.encoder=test_efficientnet", "data.crop_size=128", "warm_start.steps=5")
D4 = ("nedr.kan_cid=false", "nedr.idrm=false", "nedr.drem=false")

_spec = importlib.util.spec_from_file_location("golden_fill", GOLDEN / "fill.py")
_fill = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_fill)
fill = _fill.fill


def tiny_settings(*overrides: str) -> config.Settings:
    """Settings of a NeDR of width 8 at 128x128, with ``key=value`` texts over them."""
    return config.load("nedr", models.settings_types(), overrides=(*TINY, *overrides))


def tiny(*overrides: str, started: bool = True) -> models.Method:
    """A NeDR of width 8 on timm's encoder for tests, with fixed random weights."""
    torch.manual_seed(0)
    method = models.build(tiny_settings(*overrides))
    if started:
        method.start()
    return method


def rule_made(name: str, keys: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """The official state dict of network ``name`` by the rule: see tests/golden/fill.py."""
    norms = {key.removesuffix("running_mean") for key in keys if key.endswith("running_mean")}
    state = {}
    for key, shape in keys.items():
        if key.endswith("num_batches_tracked"):
            state[key] = torch.zeros(shape, dtype=torch.long)
        elif key.endswith(".grid"):
            state[key] = knots().expand(shape).clone()
        else:
            norm = key.endswith(".weight") and key.removesuffix("weight") in norms
            state[key] = torch.from_numpy(_fill.fill(f"{name}.{key}", shape, norm_weight=norm))
        if key.endswith(("weight_u", "weight_v")):
            state[key] = F.normalize(state[key], dim=0)
    return state


def picture(seed: int, *shape: int) -> torch.Tensor:
    """Uniform random numbers as the golden outputs have them."""
    return torch.from_numpy(np.random.default_rng(seed).random(shape, np.float32))


@pytest.fixture(scope="session")
def golden() -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / "nedr.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays}


@pytest.fixture(scope="session")
def golden_train() -> dict[str, float]:
    return json.loads((GOLDEN / "nedr_train.json").read_text())


@pytest.fixture(scope="session")
def official_keys() -> dict[str, dict[str, list[int]]]:
    return json.loads((GOLDEN / "nedr_keys.json").read_text())


@pytest.fixture(scope="session")
def official_state(official_keys) -> dict[str, dict[str, torch.Tensor]]:
    """All official networks. The fixture is shared: copy before changing."""
    state = {name: rule_made(name, official_keys[name]) for name in ("net_h2c", "net_c2h", "net_depth", "drem")}
    for name in ("discriminator_h2c", "discriminator_c2h"):
        state[name] = rule_made(name, official_keys["discriminator"])
    return state


@pytest.fixture(scope="session")
def official_file(official_state, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("official") / "official.pth"
    torch.save(official_state, path)
    return path


@pytest.fixture
def pool(tmp_path) -> list[Path]:
    """Seven flat images 24x20; number n has brightness 10 n."""
    for n in range(7):
        images.write(tmp_path / "pool" / f"{n}.png", torch.full((3, 20, 24), 10 * n / 255))
    return paths.find(tmp_path / "pool")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


# VGGs with 4 channels a layer, the same layers in the same places, at no cost.

LETTERS = {"vgg16": "D", "vgg19": "E"}  # torchvision's names for the lists of their layers


def narrow_layers(network: str) -> nn.Sequential:
    widths = torchvision.models.vgg.cfgs[LETTERS[network]]
    return torchvision.models.vgg.make_layers([4 if width != "M" else "M" for width in widths])


@pytest.fixture
def narrow_vgg(monkeypatch):
    """torchvision's vgg16 and vgg19 are narrow ones."""
    for name in LETTERS:
        fake = lambda weights=None, name=name: SimpleNamespace(features=narrow_layers(name))  # noqa: E731
        monkeypatch.setattr(torchvision.models, name, fake)


@pytest.fixture
def vgg_file(tmp_path):
    """A function that writes a narrow VGG's weights as torchvision saves them, with a part of its classifier."""

    def write(network: str):
        features = narrow_layers(network)
        for parameter in features.parameters():
            nn.init.normal_(parameter, std=0.4)
        state = {f"features.{key}": value for key, value in features.state_dict().items()}
        torch.save(state | {"classifier.0.bias": torch.zeros(3)}, tmp_path / f"{network}.pth")
        return tmp_path / f"{network}.pth"

    return write


@pytest.fixture
def offline(narrow_vgg, monkeypatch):
    """The hub cannot be reached."""

    def refuse(weights=None):
        raise OSError("no network")

    for name in LETTERS:
        monkeypatch.setattr(torchvision.models, name, refuse)
