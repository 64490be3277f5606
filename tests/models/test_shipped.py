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
LAST_STAGE = {"nedr": "finetune"}  # the preset by which what ships was trained last, where it is not its own
OF_THE_LAST_STAGE = ("encoder_weights", "psnr_weight", "trained")
PRESETS = sorted(path.parent.name for path in (ROOT / "checkpoints").glob("*/config.yml"))


def test_nedr_ships():
    assert "nedr" in SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_are_small_and_of_their_presets(name):
    path = models.shipped(name)
    assert path.stat().st_size < 20e6
    _, metadata = checkpoint.read_safetensors(path)
    first, last = (preset(name, folder) for folder in (name, LAST_STAGE.get(name, name)))
    saved = config.load(name, models.settings_types(), saved=metadata["settings"])
    assert metadata["model"] == name
    assert (saved.method, saved.haze) == (last.method, last.haze)
    for setting in OF_THE_LAST_STAGE:
        setattr(first.method, setting, getattr(last.method, setting))
    assert saved.method == first.method  # the same network, working size and airlight
    text = str(metadata)
    assert "'/" not in text  # no path of the machine on which they were trained


def preset(name: str, folder: str) -> config.Settings:
    return config.load(name, models.settings_types(), [ROOT / "checkpoints" / folder / "config.yml"])


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
