import copy
import dataclasses
import functools
import multiprocessing
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import datasets, images, paths, synthesis
from data.loading import loader
from data.pictures import Folder
from data.streams import Stream, Synthetic, Unpaired, crop
from utils import config
from utils.errors import UserError

section = functools.cache(config.section)


def whole(image, rng):
    return image[:]


def number(tensor):
    return round(tensor.flatten()[0].item() * 255 / 10)


def stream(pool, seed=1, name="hazy", transform=whole):
    return Stream(pool, transform, seed, name)


def test_each_image_occurs_once_an_epoch_in_new_order(pool):
    numbers = [number(stream(pool)[k]["hazy"]) for k in range(70)]
    epochs = [numbers[start : start + 7] for start in range(0, 70, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 5


def test_a_stream_is_a_function_of_the_position(pool):
    noisy = lambda image, rng: image[:] + rng.random()  # noqa: E731
    one, two = stream(pool, transform=noisy), stream(pool, transform=noisy)
    forward = [one[k]["hazy"] for k in range(30)]
    for k in (29, 3, 14, 3, 0):
        assert torch.equal(two[k]["hazy"], forward[k])
    assert len({tensor.flatten()[0].item() for tensor in forward}) == 30  # each position has its own randomness
    with pytest.raises(IndexError):
        one[-1]


def test_names_and_seeds_shuffle_independently(pool):
    orders = {
        (seed, name): [number(stream(pool, seed, name)[k][name]) for k in range(140)]
        for seed, name in [(1, "hazy"), (1, "clear"), (2, "hazy")]
    }
    for a, b in [((1, "hazy"), (1, "clear")), ((1, "hazy"), (2, "hazy"))]:
        agree = sum(x == y for x, y in zip(orders[a], orders[b], strict=True))
        assert agree < 45  # 20 expected


def test_unreadable_images_are_skipped_and_reported(pool):
    pool[2].write_bytes(b"junk")
    items = [stream(pool)[k] for k in range(7)]
    messages = [message for item in items for message in item["skipped"]]
    assert len(messages) == 1
    assert str(pool[2]) in messages[0]
    assert 2 not in Counter(number(item["hazy"]) for item in items)
    for path in pool:
        path.write_bytes(b"junk")
    with pytest.raises(UserError, match=r"none of the 7 hazy images can be used; the first: .*png"):
        stream(pool)[0]


def training(hazy, clear, depth=None, *, stage="train", kind="unpaired", size=16, rule="random", seed=3, colour=0.0):
    """The data set that a run with these settings trains on."""
    sections = {name: copy.copy(section(name)) for name in ("data", "haze", "degradations", "warm_start")}
    options = SimpleNamespace(model="some", seed=seed, **sections)
    room = {"crop": rule, "crop_size": size, "flip": True}
    options.data = dataclasses.replace(options.data, hazy=hazy, clear=clear, depth=depth, **room)
    options.haze.colour, options.warm_start.depth = colour, depth
    return datasets.training(options, stage, kind)


def test_colours_of_a_pool_with_a_damaged_image(pool):
    """It is left out and named; where no haze is added, none is read at all."""
    folder = str(pool[0].parent)
    pool[2].write_bytes(b"junk")
    sections = {name: copy.copy(section(name)) for name in ("data", "haze", "degradations", "warm_start")}
    sections["haze"].colours_of = folder
    options = SimpleNamespace(model="some", seed=3, **sections)
    options.data = dataclasses.replace(options.data, clear=folder, crop="random", crop_size=16)
    made = datasets.training(options, "train", "synthetic")
    assert [remark for remark in made.remarks if str(pool[2]) in remark and "left out" in remark]
    for path in pool:
        path.write_bytes(b"junk")
    with pytest.raises(UserError, match=r"colours_of: left out: .*png: cannot be read"):
        datasets.training(options, "train", "synthetic")
    datasets.training(options, "train", "degraded")


def batches(dataset, start, stop, workers):
    return list(loader(dataset, start, stop, 3, workers))


def test_workers_change_nothing(pool, tmp_path):
    pool[4].write_bytes(b"junk")
    folder = pool[0].parent
    dataset = training(folder, folder, size=8)
    state = torch.get_rng_state()
    alone, two = batches(dataset, 0, 14, 0), batches(dataset, 0, 14, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(alone) == len(two) == 5
    for a, b in zip(alone, two, strict=True):
        assert torch.equal(a["hazy"], b["hazy"])
        assert torch.equal(a["clear"], b["clear"])
        assert a["skipped"] == b["skipped"]
    assert sum(len(batch["skipped"]) for batch in alone) == 4  # once an epoch and stream
    resumed = batches(dataset, 6, 14, 0)
    assert torch.equal(resumed[0]["hazy"], alone[2]["hazy"])
    assert resumed[-1]["hazy"].shape == (2, 3, 8, 8)


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_workers_arrive_as_one_line(pool, workers):
    pool[1].write_bytes(b"junk")
    with pytest.raises(UserError, match=r"1\.png: cannot be read") as refusal:
        batches(Folder(pool), 0, 7, workers)
    assert "\n" not in str(refusal.value)
    assert not multiprocessing.active_children()  # though the error, which is kept, knows the frame of the iterator


def ramp(height, width):
    """Every pixel tells its row (channel 0) and column (channel 1), in [0,1]; channel 2 is a mix."""
    rows, columns = torch.meshgrid(torch.arange(height) / 100, torch.arange(width) / 100, indexing="ij")
    return torch.stack([rows, columns, (rows + columns) / 2])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(5, 60), st.integers(5, 60), st.booleans())
def test_random_crop_is_a_window_of_the_image(seed, height, width, flip):
    image = ramp(height, width)
    window = crop(image, np.random.default_rng(seed), (5, 5), "random", flip)
    top, lefts = round(window[0, 0, 0].item() * 100), (window[1, 0] * 100).round().int().tolist()
    assert flip or lefts[0] < lefts[-1]
    left = min(lefts[0], lefts[-1])
    want = image[:, top : top + 5, left : left + 5]
    assert torch.equal(window, want.flip(2) if lefts[0] > lefts[-1] else want)


def test_flip_happens_half_the_time():
    flips = [
        crop(ramp(5, 5), np.random.default_rng(seed), (5, 5), "random", True)[1, 0, 0] > 0.01 for seed in range(200)
    ]
    assert 70 < sum(flips) < 130


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(1, 60))
def test_short_side_crop_takes_the_whole_short_side(seed, height, width):
    image = ramp(height, width)
    out = crop(image, np.random.default_rng(seed), (16, 16), "short_side", False)
    assert out.shape == (3, 16, 16)
    assert out.min() >= 0
    assert out.max() <= 1
    side = min(height, width)
    if height == side and side >= 16:  # all rows are in it: their mean survives the resize
        torch.testing.assert_close(out[0].mean(), image[0].mean(), atol=1e-3, rtol=0)


def test_short_side_crop_of_the_right_size_is_exact():
    assert torch.equal(crop(ramp(16, 16), np.random.default_rng(0), (16, 16), "short_side", False), ramp(16, 16))


@pytest.mark.parametrize("rule", ["short_side", "random"])
def test_image_and_depth_are_cropped_alike(rule):
    image = ramp(40, 50)
    out = crop(torch.cat([image, image[2:]]), np.random.default_rng(4), (12, 12), rule, True)
    assert torch.equal(out[2], out[3])


def test_small_images_are_refused_or_skipped(pool):
    folder = pool[0].parent
    with pytest.raises(
        UserError, match=r"24x20 is smaller than the crop of 32; set a smaller data\.crop_size or .*short_side"
    ):
        crop(torch.rand(3, 20, 24), np.random.default_rng(0), (32, 32), "random", False)
    dataset = training(folder, folder, size=32)
    with pytest.raises(UserError, match=r"none of the 7 hazy .*\d\.png: 24x20 is smaller"):
        dataset[0]
    images.write(folder / "big.png", torch.ones(3, 40, 40))
    item = training(folder, folder, size=32)[0]
    assert item["hazy"].min() == 1


@pytest.fixture
def scenes(tmp_path):
    """Five images whose red channel is their depth, so that a wrong match or crop shows."""
    for n in range(5):
        depth = torch.rand(1, 30, 40).mul(200).round() + 1
        depth[0, 0, 0] = 255
        images.write(tmp_path / "clear" / f"{n}.png", (depth / 255).expand(3, -1, -1))
        images.write(tmp_path / "depth" / f"{n}.png", depth / 255)
    return tmp_path


@pytest.mark.parametrize("rule", ["short_side", "random"])
def test_synthetic_items_obey_the_scattering_model(scenes, rule):
    dataset = training(
        None, scenes / "clear", scenes / "depth", stage="warm_start", kind="synthetic", rule=rule, colour=0.1
    )
    assert dataset.epoch_length == 5
    item = dataset[3]
    assert item["skipped"] == []
    t, light = item["transmission"], item["airlight"]
    torch.testing.assert_close(item["hazy"], item["clear"] * t + light * (1 - t), atol=1e-6, rtol=0)
    depth = (item["clear"][:1] * 255 + 0.5) / 255.5
    if rule == "random":
        torch.testing.assert_close(t, torch.exp(-item["density"] * depth), atol=1e-5, rtol=0)
    batch = next(iter(loader(dataset, 0, 4, 4)))
    assert batch["airlight"].shape == (4, 3, 1, 1)
    assert batch["density"].shape == (4, 1)


SHAPES = st.sampled_from([(16, 16), (12, 20), (32, 18)])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(20, 60), st.integers(20, 60), SHAPES)
def test_a_view_covers_a_large_part_of_the_image(seed, height, width, shape):
    """Of the asked aspect and share of the largest such rectangle: seen in an image of its own places."""
    rows = torch.arange(height).view(1, height, 1).expand(1, height, width) / height
    columns = torch.arange(width).view(1, 1, width).expand(1, height, width) / width
    out = crop(torch.cat([rows, columns]), np.random.default_rng(seed), shape, "view", False, (0.6, 0.9))
    assert out.shape == (2, *shape)
    largest = min(height / shape[0], width / shape[1])
    for values, pixels, side in zip(out, (height, width), shape, strict=True):
        span = (values.max() - values.min()).item() * pixels * side / (side - 1)  # from the first pixel's edge
        assert 0.6 * largest * side - 2.5 <= span <= 0.9 * largest * side + 2.5


def test_a_rectangle_of_the_full_short_side():
    out = crop(ramp(20, 40), np.random.default_rng(0), (10, 15), "short_side", False)
    assert out.shape == (3, 10, 15)


def mixed(scenes, pool, share):
    sections = {name: copy.copy(section(name)) for name in ("data", "haze", "degradations", "warm_start")}
    options = SimpleNamespace(model="some", seed=3, **sections)
    options.data = dataclasses.replace(options.data, crop="view", crop_size=(12, 16))
    options.warm_start.clear, options.warm_start.depth = scenes / "clear", scenes / "depth"
    options.warm_start.outdoor, options.warm_start.outdoor_share = pool[0].parent, share
    return datasets.training(options, "warm_start", "synthetic")


def test_outdoor_images_have_the_given_share(scenes, pool):
    dataset = mixed(scenes, pool, 0.3)
    assert dataset.epoch_length == 7
    items = [dataset[k] for k in range(300)]
    assert all(item["hazy"].shape == (3, 12, 16) for item in items)
    outdoor = [torch.equal(item["clear"], dataset.second[k]["clear"]) for k, item in enumerate(items)]
    assert 0.2 < np.mean(outdoor) < 0.4
    again = mixed(scenes, pool, 0.3)
    assert torch.equal(again[41]["hazy"], items[41]["hazy"])  # a function of the position
    assert isinstance(mixed(scenes, pool, 0), Synthetic)


def test_synthetic_without_depth_and_refusals(scenes):
    add_haze = functools.partial(synthesis.random_haze, law=section("haze"))
    clear, depth = paths.find(scenes / "clear"), paths.find(scenes / "depth")
    rest = functools.partial(crop, shape=(16, 16), rule="random", flip=True), add_haze, 3, "synthetic"
    assert Synthetic(clear, None, *rest)[0]["transmission"].shape == (1, 16, 16)
    with pytest.raises(UserError, match=r"4\.png: no depth map"):
        Synthetic(clear, depth[:-1], *rest)
    images.write(depth[1], torch.rand(1, 30, 41))
    dataset = Synthetic(clear, depth, *rest)
    messages = [message for k in range(5) for message in dataset[k]["skipped"]]
    assert len(messages) == 1
    assert "40x30 but its depth map" in messages[0]


def test_clear_only_training(scenes):
    dataset = training(None, scenes / "clear", scenes / "depth")
    assert isinstance(dataset, Unpaired)
    assert dataset.epoch_length == 5
    items = [dataset[k] for k in range(10)]
    assert all(item.keys() == {"hazy", "clear", "skipped"} for item in items)
    assert dataset.hazy.name != dataset.clear.name


def test_replay_adds_the_synthetic_images_of_the_warm_start(scenes, pool):
    """Beside the unpaired ones, which stay what they are: those that the warm start would have had there."""
    sections = {name: copy.copy(section(name)) for name in ("data", "haze", "degradations", "warm_start")}
    options = SimpleNamespace(model="some", seed=3, **sections)
    options.data = dataclasses.replace(options.data, hazy=pool[0].parent, clear=pool[0].parent, crop_size=16)
    warm = options.warm_start
    warm.clear, warm.depth, warm.outdoor, warm.outdoor_share = scenes / "clear", scenes / "depth", pool[0].parent, 0.3
    plain, teaching = (
        datasets.training(options, "train", "unpaired"),
        datasets.training(options, "warm_start", "synthetic"),
    )
    warm.replay = True
    both = datasets.training(options, "train", "unpaired")
    assert both.epoch_length == plain.epoch_length == 7
    for k in (0, 5, 19):
        game, lesson, item = plain[k], teaching[k], both[k]
        assert item.keys() == game.keys() | {f"replay_{name}" for name in lesson.keys() - {"skipped"}}
        assert all(torch.equal(item[name], game[name]) for name in ("hazy", "clear"))
        assert all(torch.equal(item[f"replay_{name}"], lesson[name]) for name in ("hazy", "clear", "transmission"))
    assert training(None, scenes / "clear", kind="unpaired")[0].keys() == {"hazy", "clear", "skipped"}


def test_epoch_length_is_the_larger_pool(pool, scenes):
    assert training(pool[0].parent, scenes / "clear").epoch_length == 7
    assert training(scenes / "clear", pool[0].parent).epoch_length == 7


def test_degraded_items_replace_the_haze_law_by_the_imaging_model(scenes):
    """As haze it degrades the crop of an image and of its depth, with the numbers of the position."""
    one, two = (training(None, scenes / "clear", scenes / "depth", kind="degraded", rule="random") for _ in range(2))
    items = [one[k] for k in range(10)]
    for k in (7, 3):
        assert all(torch.equal(two[k][key], items[k][key]) for key in ("hazy", "clear", "density"))
    assert len({number(item["hazy"]) for item in items}) > 1
    for item in items:
        assert item["hazy"].shape == item["clear"].shape == (3, 16, 16)
        assert (item["clear"] * 255).allclose((item["clear"] * 255).round(), atol=1e-3)  # the target as it was read
    assert training(None, scenes / "clear", kind="degraded")[0]["hazy"].shape == (3, 16, 16)


def test_unknown_kinds_of_streams_are_refused(pool):
    with pytest.raises(ValueError, match="no such kind of training images: pared"):
        training(pool[0].parent, pool[0].parent, kind="pared")


def test_sources_are_refused_before_training(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        training(None, tmp_path / "nowhere")
    with pytest.raises(UserError, match="no images"):
        training(None, tmp_path, stage="warm_start", kind="synthetic")
    with pytest.raises(UserError, match=r"data\.clear is not set"):
        training(None, None)


def test_depth_in_sub_folders_with_names_that_repeat(tmp_path):
    for n, folder in enumerate(("C001", "C002")):
        images.write(tmp_path / "clear" / folder / "00000.png", torch.rand(3, 20, 20 + n))
        images.write(tmp_path / "depth" / folder / "00000.png", torch.rand(1, 20, 20 + n))
    depth = training(None, tmp_path / "clear", tmp_path / "depth").hazy.depth
    assert [path.parent.name for path in depth] == ["C001", "C002"]


def test_skipped_files_are_reported(pool, scenes):
    """Unread kinds of files, once a folder, and results of an earlier run."""
    (pool[0].parent / "7.NEF").touch()
    images.write(scenes / "clear" / "out" / "pictures" / "0.png", torch.rand(3, 30, 40))
    paths.mark_results(scenes / "clear" / "out", ["pictures"])
    dataset = training(pool[0].parent, scenes / "clear")
    assert ["earlier run" in dataset.remarks[0], "1 NEF" in dataset.remarks[1]] == [True, True]
    assert dataset.epoch_length == 7
    results, pool_check = training(None, scenes / "clear", scenes / "depth").remarks
    assert "earlier run" in results
    assert "5 are grey" in pool_check
    assert not training(None, pool[0].parent, kind="degraded").remarks[1:]  # pools of unpaired training alone


def test_mixed_images_are_a_function_of_the_position(pool):
    """haze.mix: two images of the pool in some items, in no others, the same whenever they are asked for."""
    made = Synthetic(pool, None, whole, lambda clear, depth, rng: {"clear": clear}, 1, "train", mix=0.5)
    items = [made[k]["clear"] for k in range(40)]
    counts = [len(item[0].unique()) for item in items]
    assert 8 < sum(count > 1 for count in counts) < 32
    assert all(torch.equal(made[k]["clear"], items[k]) for k in (31, 7, 0, 7))
