"""The mean of several files of weights."""

import pytest
import torch
from helpers import D4, tiny, tiny_settings

import models
from models import average
from utils import checkpoint, config
from utils.errors import UserError


def write(path, seed, *overrides, chosen=None, model=None):
    torch.manual_seed(seed)
    method = tiny(*overrides)
    identity = {"model": "nedr", "settings": config.to_dict(tiny_settings(*overrides)), "chosen_on": chosen}
    checkpoint.save_weights(path, method.inference_state(), identity)
    return path


def test_the_mean_of_files(tmp_path, capsys):
    chosen = [{"sets": [name], "pictures": 2, "truths": truths} for name, truths in (("a", ["1"]), ("b", ["1", "2"]))]
    files = [write(tmp_path / f"{k}.safetensors", k, *D4, chosen=chosen[k]) for k in (0, 1)]
    average.main([*map(str, files), str(files[1]), "--output", str(tmp_path / "out" / "mean.safetensors")])
    assert "the mean of 3 files" in capsys.readouterr().out
    one, other, mean = (models.load(f).inference_state() for f in (*files, tmp_path / "out" / "mean.safetensors"))
    assert mean.keys() == one.keys()
    for name, value in mean.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (one[name] + 2 * other[name]) / 3, rtol=1e-5, atol=1e-6)
    metadata = checkpoint.read_metadata(tmp_path / "out" / "mean.safetensors")
    assert metadata["chosen_on"] == {"sets": ["a", "b"], "pictures": 2, "truths": ["1", "2"]}


def test_files_of_other_networks_are_refused(tmp_path):
    one = write(tmp_path / "a.safetensors", 0, *D4)
    other = write(tmp_path / "b.safetensors", 0, *D4, "nedr.base_channels=12")
    target = ["--output", str(tmp_path / "c.safetensors")]
    with pytest.raises(UserError, match=r"b\.safetensors, beside .*a\.safetensors, does not fit this model"):
        average.main([str(one), str(other), *target])
    with pytest.raises(UserError, match=r"last\.pt: name \.safetensors files"):
        average.main([str(one), str(tmp_path / "last.pt"), *target])
    assert not (tmp_path / "c.safetensors").exists()
