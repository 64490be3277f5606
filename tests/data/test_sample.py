import os
import shutil

import pytest
import torch

from data import images, paths, sample
from data.sets import pairing
from utils.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return sample.make(tmp_path_factory.mktemp("sample") / "set")


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_layout_and_pairs(folder):
    for part in sample.PARTS:
        assert paths.find(folder / part)
    assert len(pairing.pairs(folder / "test/hazy", folder / "test/clear")[0]) == 6
    assert len(pairing.pairs(folder / "train/hazy", folder / "train/clear")[0]) == 12
    clear = paths.find(folder / "train/clear")
    for picture, depth in zip(clear, pairing.match_depth(clear, paths.find(folder / "train/depth")), strict=True):
        assert images.read(picture).shape[1:] == images.read_depth(depth).shape[1:]


def test_held_out_scenes_are_not_trained_on(folder):
    scenes = {
        split: {path.stem.removesuffix("_left").removesuffix("_right") for path in paths.find(folder / split / "clear")}
        for split in ("train", "test")
    }
    assert scenes == {"train": {"astronaut", "rocket", "motorcycle"}, "test": {"coffee", "chelsea"}}


def test_haze_grows_with_the_number(folder):
    for clear in paths.find(folder / "test/clear"):
        truth = images.read(clear)
        errors = [(images.read(folder / f"test/hazy/{clear.stem}_{n}.png") - truth).abs().mean() for n in (1, 2, 3)]
        assert 0.03 < errors[0] < errors[1] < errors[2]


def test_complete_sets_are_left_alone_and_damaged_ones_made_anew_with_the_same_bytes(folder, tmp_path):
    again = shutil.copytree(folder, tmp_path / "again")
    for image in again.rglob("*.png"):
        os.utime(image, (0, 0))
    sample.make(again)
    assert all(image.stat().st_mtime == 0 for image in again.rglob("*.png"))
    (again / "test/clear/coffee.png").unlink()
    assert sample.make(again) == again
    assert all(image.stat().st_mtime > 0 for image in again.rglob("*.png"))
    assert contents(again) == contents(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_other_folders_are_never_replaced(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UserError, match="not the sample set"):
        sample.make(tmp_path)
    assert (tmp_path / "mine.txt").exists()


def test_a_set_that_cannot_be_moved_is_reported(folder, tmp_path):
    """It is told, unless another process has made the set meanwhile."""
    with pytest.raises(UserError, match=r"new: cannot be written \(No such file or directory\); give another folder"):
        sample._move(tmp_path / "absent", tmp_path / "new")
    before = contents(folder)
    sample._move(tmp_path / "absent", folder)
    assert contents(folder) == before


def test_source_names(folder, monkeypatch):
    monkeypatch.setattr(sample, "FOLDER", folder)
    assert paths.find("sample:test/clear") == [folder / "test/clear/chelsea.png", folder / "test/clear/coffee.png"]


def test_motorcycle_depth_fits_its_images():
    """Disparity moves the left view onto the right one, and both maps are whole."""
    for right in (False, True):
        depth = sample.motorcycle_depth(right)
        assert depth.shape == (1, 500, 741)
        assert torch.isfinite(depth).all()
        assert 0 < depth.min() < depth.max() <= 1
    left = sample.motorcycle_depth(False)[0]
    assert left[:100].mean() > left[-100:].mean()
