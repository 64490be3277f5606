"""Streams of pairs: from two pools, and from sets by name."""

import copy
import dataclasses
import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import datasets, images
from data.loading import loader
from data.sets import locate
from data.sets.locate import find
from data.streams import Pairs, crop
from utils import config
from utils.errors import UserError

section = functools.cache(config.section)


def options(**data):
    """The settings that `training` and `validation` read, those of data as given."""
    sections = {name: copy.copy(section(name)) for name in ("data", "haze", "degradations", "warm_start", "log")}
    room = {"crop": "random", "crop_size": 12, "flip": True} | data
    return SimpleNamespace(model="some", seed=3, **sections | {"data": dataclasses.replace(sections["data"], **room)})


def training(**data):
    return datasets.training(options(**data), "train", "paired")


def validation(limit=0, **data):
    asked = options(**data)
    asked.log.validation_limit = limit
    return datasets.validation(asked)


def scene(n, height=20, width=24):
    """Tells its own number (channel 0), row and column, in 8-bit steps."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.full_like(rows, n), rows, columns]) / 255


def write(folder, hazy, clear, numbers, per_scene=1, sides=("hazy", "gt")):
    """Scenes with hazy images that are 100 steps brighter, named by formats of n and k."""
    for n in numbers:
        images.write(folder / sides[1] / clear.format(n=n), scene(n))
        for k in range(1, per_scene + 1):
            images.write(folder / sides[0] / hazy.format(n=n, k=k), scene(n) + 100 / 255)
    return {"hazy": str(folder / sides[0]), "clear": str(folder / sides[1])}


@pytest.fixture
def pools(tmp_path):
    """Four scenes, each hazy three times, as RESIDE names them."""
    return write(tmp_path / "own", "{n}_{k}_0.9.png", "{n}.png", range(1, 5), 3)


def same_window(item):
    torch.testing.assert_close(item["hazy"] - item["clear"], torch.full_like(item["clear"], 100 / 255))


@pytest.mark.parametrize("rule", ["short_side", "random"])
def test_hazy_and_clear_are_cropped_and_flipped_alike(pools, rule):
    stream = training(**pools, crop=rule)
    items = [stream[k] for k in range(40)]
    for item in items:
        assert item.keys() == {"hazy", "clear", "skipped"}
        assert item["hazy"].shape == item["clear"].shape == (3, 12, 12)
        same_window(item)
    columns = [item["clear"][2, 0] for item in items]
    assert len({tuple(row.tolist()) for row in columns}) > 5
    assert 5 < sum(bool(row[0] > row[-1]) for row in columns) < 35  # flipped


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(5, 40), st.integers(5, 40), st.booleans())
def test_a_stack_is_cropped_as_its_parts(seed, height, width, flip):
    hazy, clear = scene(1, height, width), scene(2, height, width)
    cut = [
        crop(x, np.random.default_rng(seed), (5, 5), "random", flip) for x in (torch.cat([hazy, clear]), hazy, clear)
    ]
    assert torch.equal(cut[0], torch.cat(cut[1:]))


def test_each_pair_occurs_once_an_epoch(pools):
    one, two = training(**pools), training(**pools)
    assert isinstance(one, Pairs)
    assert one.epoch_length == 12
    items = [one[k] for k in range(36)]
    numbers = [round(item["clear"][0, 0, 0].item() * 255) for item in items]
    for epoch in range(3):
        assert sorted(numbers[12 * epoch : 12 * epoch + 12]) == sorted([1, 2, 3, 4] * 3)
    assert numbers[:12] != numbers[12:24]
    for k in (30, 2, 17, 2):
        assert all(torch.equal(two[k][key], items[k][key]) for key in ("hazy", "clear"))


def test_a_resumed_stream_starts_at_its_position(pools):
    straight = list(loader(training(**pools), 0, 24, 4, workers=2))
    resumed = list(loader(training(**pools), 12, 24, 4))
    assert len(straight) == 6
    for a, b in zip(straight[3:], resumed, strict=True):
        assert torch.equal(a["hazy"], b["hazy"])
        assert torch.equal(a["clear"], b["clear"])


def test_ground_truth_with_the_border_of_reside(tmp_path):
    images.write(tmp_path / "clear" / "1.png", scene(1, 40, 44))
    images.write(
        tmp_path / "hazy" / "1_1.png",
        scene(101, 40, 44)[:, 10:-10, 10:-10] + torch.tensor([0, 100, 100]).view(3, 1, 1) / 255,
    )
    stream = training(hazy=str(tmp_path / "hazy"), clear=str(tmp_path / "clear"))
    for k in range(5):
        same_window(stream[k])


def test_pairs_of_unequal_sizes_are_skipped_and_reported(pools, tmp_path):
    images.write(tmp_path / "own/hazy/2_1_0.9.png", scene(2, 20, 25))
    images.write(tmp_path / "own/hazy/3_3_0.9.png", scene(2, 11, 24))
    images.write(tmp_path / "own/gt/4.png", scene(4, 11, 24))
    for k in (1, 2, 3):
        images.write(tmp_path / f"own/hazy/4_{k}_0.9.png", scene(104, 11, 24))
    (tmp_path / "own/hazy/1_2_0.9.png").write_bytes(b"junk")
    stream = training(**pools)
    items = [stream[k] for k in range(12)]
    messages = sorted(message for item in items for message in item["skipped"])
    for words in (
        "1_2_0.9.png: cannot be read as an image",
        f"2_1_0.9.png is 25x20 but its ground truth {tmp_path / 'own/gt/2.png'} is 24x20; crop them to one size",
        "3_3_0.9.png is 24x11 but its ground truth",
        "4_1_0.9.png: 24x11 is smaller than the crop of 12; set a smaller data.crop_size",
    ):
        assert any(words in message for message in messages)
    assert {round(item["clear"][0, 0, 0].item() * 255) for item in items} == {1, 2, 3}
    for path in (tmp_path / "own/hazy").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"none of the 12 train images can be used; the first: .*file is empty"):
        stream[0]


def test_unpaired_pools_are_refused(pools, tmp_path):
    for data, message in [
        ({}, r"no pairs: set data\.pairs to sets by name, as data\.pairs=\[ITS\], or data\.hazy and data\.clear"),
        ({"hazy": pools["hazy"]}, r"data\.clear is not set: name a folder or a \.flist of clear images"),
        ({"clear": pools["clear"]}, r"data\.hazy is not set: name a folder or a \.flist of hazy images"),
        ({"hazy": pools["hazy"], "clear": pools["hazy"]}, r"hazy image and ground truth are the same file"),
        ({"hazy": pools["clear"], "clear": pools["hazy"]}, r"1\.png: no ground truth in .*hazy \(4 of 4 images"),
        (pools | {"pairs": ["ITS"]}, r"data\.pairs=\['ITS'\] and data\.hazy and data\.clear are two sources of pairs"),
    ]:
        with pytest.raises(UserError, match=message):
            training(**data)
    images.write(tmp_path / "own/gt/1.jpg", scene(1))
    with pytest.raises(UserError, match=r"1_1_0\.9\.png: has two ground truths, .*1\.jpg and .*1\.png; keep one"):
        training(**pools)
    (tmp_path / "own/gt/1.jpg").unlink()
    (tmp_path / "own/gt/3.png").unlink()
    with pytest.raises(UserError, match=r"3_1_0\.9\.png: no ground truth in .*gt \(3 of 12 images have none\); add"):
        training(**pools)


def test_pairs_are_refused_for_methods_without_paired_training(pools):
    for kind in ("unpaired", "synthetic", "degraded"):
        with pytest.raises(
            UserError, match=r"data\.pairs=\['ITS'\]: some does not train on pairs; empty it, set data\.c"
        ):
            datasets.training(options(pairs=["ITS"], clear=pools["clear"]), "train", kind)


def test_sets_by_name_make_one_pool(tmp_path):
    write(tmp_path / "O-HAZE", "{n:02}_outdoor_hazy.jpg", "{n:02}_outdoor_GT.jpg", (1, 40, 41))
    write(tmp_path / "NH-HAZE", "{n:02}_hazy.png", "{n:02}_GT.png", (50, 51), sides=(".", "."))
    stream = training(pairs=["O-HAZE:train", "nh_haze:train", "O-HAZE:train"], root=str(tmp_path))
    assert [hazy.name for hazy, _ in stream.paths] == ["01_outdoor_hazy.jpg", "40_outdoor_hazy.jpg", "50_hazy.png"]
    assert [clear.name for _, clear in stream.paths] == ["01_outdoor_GT.jpg", "40_outdoor_GT.jpg", "50_GT.png"]
    assert stream.remarks == [
        "O-HAZE:train: 2 of 40 hazy images; missing: 02-39",
        "NH-HAZE:train: 1 of 50 hazy images; missing: 01-49",
    ]
    assert training(pairs=["O-HAZE", "O-HAZE:train"], root=str(tmp_path)).epoch_length == 3  # each pair once
    paired = validation(validation_pairs=["O-HAZE:test", "NH-HAZE:test"], root=str(tmp_path))
    assert paired.names == ["O-HAZE/hazy/41_outdoor_hazy.jpg", "NH-HAZE/51_hazy.png"]
    assert [remark.partition(":")[0] for remark in paired.remarks] == ["O-HAZE", "NH-HAZE"]


def test_a_named_set_is_the_pool_of_its_folders(tmp_path):
    pools = write(tmp_path / "ITS", "{n}_{k}_0.90179.png", "{n}.png", (1, 2, 10), 2)
    named, pooled = training(pairs=["ITS"], root=str(tmp_path)), training(**pools)
    assert named.paths == pooled.paths
    assert named.remarks == ["ITS: 6 of 13990 hazy images; missing: 3-9 11-1399; fewer than 10 each: 1-2 10"]
    for k in range(8):
        assert torch.equal(named[k]["hazy"], pooled[k]["hazy"])
        same_window(named[k])


def test_names_that_cannot_be_trained_on(tmp_path):
    write(tmp_path / "PhoneHazy", "{n}.png", "{n}.png", (1, 2))
    images.write(tmp_path / "RTTS/1.png", scene(1))
    for names, message in [
        (["RTTS"], r"RTTS has no ground truth to train or validate on; name another set"),
        (["PhoneHazy"], r"PhoneHazy has no aligned ground truth"),
        (["ITS"], r"ITS: not under .*; looked for ITS/\{hazy,gt\}, ITS/train/.* to get it: https"),
        (["ITZ"], r"'ITZ': no such .*did you mean 'its'\?"),
        (["CSD:val"], r"'CSD:val': no such split"),
    ]:
        with pytest.raises(UserError, match=message):
            training(pairs=names, root=str(tmp_path))
        with pytest.raises(UserError, match=message):
            validation(validation_pairs=names, root=str(tmp_path))


def test_validation_pairs(pools):
    assert validation() is validation(validation_clear=pools["clear"]) is None
    both = {f"validation_{key}": folder for key, folder in pools.items()}
    assert len(validation(**both)) == 12
    assert validation(limit=4, **both).names == [f"{n}_1_0.9.png" for n in (1, 2, 3, 4)]
    assert [len(validation(limit=limit, **both)) for limit in (1, 5, 11, 12, 13)] == [1, 5, 11, 12, 12]
    for data, message in [
        ({"validation_hazy": pools["hazy"]}, r"data\.validation_clear is not set: name a .* of clear images"),
        (both | {"validation_pairs": ["CSD"]}, r"data\.validation_pairs=\['CSD'\] and data\.validation_hazy and"),
    ]:
        with pytest.raises(UserError, match=message):
            validation(**data)


def test_hazy_images_may_lie_in_several_parts(tmp_path):
    """OTS comes as part1 to part4, which some leave as they are."""
    for layout in ("hazy/part1", "hazy/part2"), ("part1", "part2"):
        root = tmp_path / layout[0].replace("/", "")
        for part, numbers in zip(layout, ((1, 2), (3, 10)), strict=True):
            write(root / "OTS", "{n:04}_0.8_0.2.jpg", "{n:04}.jpg", numbers, sides=(part, "clear"))
        stream = training(pairs=["OTS"], root=str(root))
        assert [clear.stem for _, clear in stream.paths] == ["0001", "0002", "0003", "0010"]
        assert [hazy.parent.name for hazy, _ in stream.paths] == ["part1", "part1", "part2", "part2"]
        assert stream.remarks == ["OTS: 4 of 72135 hazy images"]


def test_the_same_image_in_two_parts_is_refused(tmp_path):
    for part in ("part1", "part2"):
        write(tmp_path / "OTS", "0001_0.8_0.2.jpg", "0001.jpg", (1,), sides=(f"hazy/{part}", "clear"))
    with pytest.raises(UserError, match=r"part1/0001_0\.8_0\.2\.jpg and .*part2.* are hazy images of one name; keep"):
        training(pairs=["OTS"], root=str(tmp_path))


def test_masks_and_other_parts_of_a_set_are_ignored(tmp_path):
    for part, numbers in (("Train", (1, 2, 3)), ("Test", (7, 8))):
        write(tmp_path / "CSD" / part, "{n}.png", "{n}.png", numbers, sides=("Snow", "Gt"))
        write(tmp_path / "CSD" / part, "{n}.png", "{n}.png", numbers, sides=("Mask", "Mask"))
    assert [hazy.stem for hazy, _ in training(pairs=["CSD:train"], root=str(tmp_path)).paths] == ["1", "2", "3"]
    for name in ("CSD", "csd:test"):
        paired = validation(validation_pairs=[name], root=str(tmp_path))
        assert paired.names == ["7.png", "8.png"]
    pictures = find(["CSD"], tmp_path)[0].pictures()
    assert pictures.remarks == ["2 of 2000 hazy images"]  # snow need not look as haze does
    assert "training images" in find(["CSD:train"], tmp_path)[0].pictures().remarks[-1]


def test_defocus_pairs_in_order(tmp_path):
    """DPDD's two shots of a scene have numbers of their own; where names are the same they decide."""
    folder = tmp_path / "dd_dp_dataset_png/train_c"
    for n in (9, 10, 101):
        images.write(folder / f"source/1P0A{2 * n}.png", scene(n) + 100 / 255)
        images.write(folder / f"target/1P0A{2 * n + 1}.png", scene(n))
    stream = training(pairs=["DPDD:train"], root=str(tmp_path))
    assert [clear.stem for _, clear in stream.paths] == ["1P0A19", "1P0A21", "1P0A203"]
    for k in range(6):
        same_window(stream[k])
    (folder / "target/1P0A21.png").unlink()
    with pytest.raises(UserError, match=r"source holds 3 images and .*target 2; .* same number: download the set"):
        training(pairs=["DPDD:train"], root=str(tmp_path))
    (folder / "source/1P0A18.png").rename(folder / "source/1P0A19.png")
    with pytest.raises(UserError, match=r"1P0A20\.png: no ground truth 1p0a20\.\* .*target \(and 1 more like this\)"):
        training(pairs=["DPDD:train"], root=str(tmp_path))


def test_training_and_test_splits_are_not_interchangeable(tmp_path):
    for part, numbers in (("train", (1, 2)), ("test", (41, 42))):
        write(tmp_path / "O-HAZE" / part, "{n:02}_outdoor_hazy.jpg", "{n:02}_outdoor_GT.jpg", numbers)
    assert [hazy.stem[:2] for hazy, _ in find(["O-HAZE"], tmp_path)[0].pairs] == ["41", "42"]
    assert [hazy.stem[:2] for hazy, _ in find(["O-HAZE:test"], tmp_path)[0].pairs] == ["41", "42"]
    assert [hazy.stem[:2] for hazy, _ in training(pairs=["O-HAZE:train"], root=str(tmp_path)).paths] == ["01", "02"]
    write(tmp_path / "Haze4K/train", "{n}_0.6_1.8.png", "{n}.png", (1,), sides=("haze", "gt"))
    with pytest.raises(UserError, match="Haze4K: not under"):
        find(["Haze4K"], tmp_path)


def test_the_data_root_may_be_one_training_set(tmp_path):
    """The folders of AKNet's and OKNet's own loaders: train and test below a root of any name."""
    write(tmp_path / "mine/train", "{n}_{k}_0.9.png", "{n}.png", (1, 2), 2)
    write(tmp_path / "mine/test", "{n}_{k}.png", "{n}.png", (1400,), 2)
    assert training(pairs=["ITS"], root=str(tmp_path / "mine")).epoch_length == 4
    assert training(pairs=["ITS"], root=str(tmp_path / "mine/train")).epoch_length == 4
    with pytest.raises(UserError, match="ITS: not under"):
        training(pairs=["ITS"], root=str(tmp_path / "mine/test"))


def test_sizes_are_compared_before_training(tmp_path, monkeypatch):
    """Of a large set in a part of the pairs: a set that is wrong as a whole is refused, one pair is skipped later."""
    write(tmp_path / "ITS", "{n}_{k}_0.9.png", "{n}.png", range(1, 9), 10)
    images.write(tmp_path / "ITS/gt/5.png", scene(5, 20, 25))
    with pytest.raises(UserError, match=r"5_1_0\.9\.png is 24x20 but its ground truth .*5\.png is 25x20 \(and 9 more"):
        training(pairs=["ITS"], root=str(tmp_path))
    monkeypatch.setattr(locate, "CHECKED_PAIRS", 3)
    assert training(pairs=["ITS"], root=str(tmp_path)).epoch_length == 80
