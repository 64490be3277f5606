"""Whole images, to score on and to dehaze."""

import pytest
import torch

from data import images, paths
from data.loading import loader
from data.pictures import Folder, Paired
from data.sets import pairing
from utils.errors import UserError


def test_paired(tmp_path):
    truth = torch.rand(3, 50, 60).mul(255).round() / 255
    images.write(tmp_path / "hazy" / "1_1.png", truth[:, 10:-10, 10:-10])
    images.write(tmp_path / "clear" / "1.png", truth)
    pairs = pairing.pairs(tmp_path / "hazy", tmp_path / "clear")[0]
    item = Paired(pairs)[0]
    assert item["name"] == "1_1.png"
    assert torch.equal(item["hazy"], item["clear"])
    images.write(tmp_path / "hazy" / "1_1.png", truth[:, :30])
    with pytest.raises(UserError, match=r"1_1\.png is 60x30 but its ground truth .*1\.png is 60x50"):
        Paired(pairs)[0]
    images.write(tmp_path / "hazy" / "1_1.png", truth)
    batch = next(iter(loader(Paired(pairs), 0, 1, 1)))
    assert batch["name"] == ["1_1.png"]
    assert batch["hazy"].shape == (1, 3, 50, 60)


@pytest.mark.parametrize("border", [0, 2])
def test_only_the_requested_border_is_cropped(tmp_path, border):
    truth = torch.rand(3, 50, 60).mul(255).round() / 255
    for cut in (2, 10):
        images.write(tmp_path / "deep" / f"{cut}.png", truth[:, cut:-cut, cut:-cut])
        images.write(tmp_path / "clear" / f"{cut}.png", truth)
    pairs = pairing.pairs(tmp_path / "deep", tmp_path / "clear")[0]
    dataset = Paired(pairs, tmp_path, border)
    assert dataset.names == ["deep/2.png", "deep/10.png"]
    if border:
        item = dataset[0]
        assert torch.equal(item["hazy"], item["clear"])
    for index in range(bool(border), 2):
        with pytest.raises(UserError, match=r"but its ground truth .*png is 60x50; crop them"):
            dataset[index]


def test_folder_names(pool, tmp_path):
    images.write(tmp_path / "pool" / "deep" / "1.png", torch.rand(3, 4, 4))
    found = paths.find(tmp_path / "pool")
    dataset = Folder(found, tmp_path / "pool")
    assert len(dataset) == 8
    assert dataset.names[-2:] == ["6.png", "deep/1.png"]
    assert dataset[7]["hazy"].shape == (3, 4, 4)
    assert Folder(found).names == dataset.names
    assert Folder(found, tmp_path / "elsewhere").names == dataset.names
    assert Folder(found[:1], found[0]).names == ["0.png"]
