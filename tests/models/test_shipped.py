"""The weights that ship: they load, they are what their config.yml says, and they dehaze."""

from pathlib import Path

import pytest
import torch

import models
from data import images
from data.sets import pairing
from utils import checkpoint, config
from utils.evaluation import metrics

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = [name for name in models.names() if models.shipped(name)]
PRESETS = sorted(path.parent.name for path in (ROOT / "checkpoints").glob("*/config.yml"))


def test_nedr_ships():
    assert "nedr" in SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_are_small_and_of_their_preset(name):
    path = models.shipped(name)
    assert path.stat().st_size < 20e6
    _, metadata = checkpoint.read_safetensors(path)
    preset = config.load(name, models.settings_types(), [path.parent / "config.yml"])
    saved = config.load(name, models.settings_types(), saved=metadata["settings"])
    assert metadata["model"] == name
    saved.method.encoder_weights = preset.method.encoder_weights  # what shipped last began with what shipped before
    assert saved.method == preset.method  # the same network, working size and airlight
    assert saved.haze == preset.haze
    text = str(metadata)
    assert "'/" not in text  # no path of the machine on which they were trained


@torch.no_grad()
def test_nedr_dehazes_better_than_the_dark_channel_prior():
    """On the held-out images of the sample set, which it has never seen: by two decibels, mean over six."""
    shipped, dcp, gain = models.load(), models.build(config.load("dcp", models.settings_types())), []
    assert all(getattr(shipped.settings, module) for module in ("kan_cid", "idrm", "drem"))
    for hazy_path, clear_path in pairing.pairs("sample:test/hazy", "sample:test/clear")[0]:
        hazy, clear = images.read(hazy_path), images.read(clear_path)
        ours, prior = (metrics.psnr(method.dehaze(hazy[None])[0], clear) for method in (shipped, dcp))
        gain.append(ours - prior)
    assert sum(gain) / len(gain) > 2


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid(name):
    """For a method that it has a block for, or for nedr."""
    file = ROOT / "checkpoints" / name / "config.yml"
    given = config.given(models.settings_types(), [file])
    model = next((each for each in models.names() if each in given), "nedr")
    settings = config.load(model, models.settings_types(), [file])
    if "test" not in given or "train" in given:
        models.check_training(settings)
