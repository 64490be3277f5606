"""The cache spares decoding, and changes nothing else."""

import errno
import functools
import multiprocessing
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data import cache, images, paths, synthesis
from data.cache import Cache
from data.loading import loader
from data.pictures import read_pair, read_with_depth
from data.pixels import Pixels, Stack
from data.sets import pairing
from data.streams import Pairs, Stream, Synthetic, Unpaired, crop
from utils import config, memory
from utils.errors import UserError

COUNT, SIZE = 7, 3 * 20 * 24
ADD_HAZE = functools.partial(synthesis.random_haze, law=config.section("haze"))
CUTS = [functools.partial(crop, shape=(12, 12), rule=rule, flip=True) for rule in ("random", "short_side")]


@pytest.fixture
def pool(tmp_path):
    """Seven images 24x20 with their depth; SIZE bytes each, without the depth."""
    for n in range(COUNT):
        images.write(tmp_path / "hazy" / f"{n}_1.png", torch.rand(3, 20, 24))
        images.write(tmp_path / "clear" / f"{n}.png", torch.rand(3, 20, 24))
        images.write(tmp_path / "depth" / f"{n}.png", torch.rand(1, 20, 24))
    return tmp_path


def cache_for(pictures):
    """A cache for so many images of the pool."""
    return Cache(size_of(pictures))


def streams(pool, cut, kept):
    """One of every kind."""
    clear, hazy, depth = (paths.find(pool / name) for name in ("clear", "hazy", "depth"))
    made = Synthetic(clear, depth, cut, ADD_HAZE, 1, "hazy", kept)
    yield made
    yield Unpaired(Synthetic(clear, None, cut, ADD_HAZE, 1, "hazy", kept), Stream(clear, cut, 1, "clear", kept))
    yield Pairs(pairing.pairs(pool / "hazy", pool / "clear")[0], cut, 1, "train", cache=kept)
    yield Unpaired(Stream(hazy, cut, 1, "hazy", kept), Stream(clear, cut, 1, "clear", kept))


def batches(stream, workers, start=0, stop=3 * COUNT):
    return list(loader(stream, start, stop, 3, workers))


def same(one, two):
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key]


@pytest.fixture
def decoded(monkeypatch):
    """Counts the images that all processes decode."""
    count, decode = multiprocessing.Value("i", 0), images.decode

    def counting(path):
        with count.get_lock():
            count.value += 1
        return decode(path)

    monkeypatch.setattr(images, "decode", counting)
    return count


@pytest.mark.parametrize("cut", CUTS, ids=("random", "short_side"))
@pytest.mark.parametrize("pictures", [0.5, 4.5, 100])
def test_cached_images_equal_uncached_ones(pool, cut, pictures):
    (pool / "clear" / "3.png").write_bytes(b"junk")
    for plain, kept in zip(streams(pool, cut, None), streams(pool, cut, cache_for(pictures)), strict=True):
        alone = batches(plain, 0)
        assert sum(len(batch["skipped"]) for batch in alone) >= 3
        same(batches(kept, 0), alone)
        same(batches(kept, 0), alone)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(pool, workers):
    for plain, kept in zip(streams(pool, CUTS[0], None), streams(pool, CUTS[0], cache_for(4.5)), strict=True):
        same(batches(kept, workers), batches(plain, 0))


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_share_decoded_images(pool, decoded, workers):
    stream = Stream(paths.find(pool / "clear"), CUTS[0], 1, "clear", cache_for(100))
    batches(stream, workers, stop=COUNT)
    assert decoded.value == COUNT
    batches(stream, workers, COUNT, 5 * COUNT)
    batches(stream, 0)
    assert decoded.value == COUNT
    assert stream.cache.used == COUNT * SIZE


def test_streams_of_the_same_images_share_the_cache(pool, decoded):
    kept = cache_for(100)
    made, mixed, pairs, pools = streams(pool, CUTS[0], kept)
    for stream in (made, mixed, mixed):
        batches(stream, 0)
    assert decoded.value == COUNT
    assert kept.used == COUNT * (SIZE + SIZE // 3)  # and the depth maps
    for stream in (pairs, pools):
        batches(stream, 2)
    assert kept.used == COUNT * (2 * SIZE + SIZE // 3)


def test_the_budget_is_respected_and_nothing_is_evicted(pool, decoded):
    stream = Stream(paths.find(pool / "clear"), CUTS[0], 1, "clear", cache_for(3.9))
    for epoch in range(4):
        batches(stream, 0, epoch * COUNT, (epoch + 1) * COUNT)
        assert stream.cache.used == 3 * SIZE
        assert decoded.value == COUNT + epoch * (COUNT - 3)


def test_only_registered_images_that_fit_are_cached(pool, decoded):
    path = paths.find(pool / "clear")[0]
    for kept in (cache_for(100), Cache(), Cache(0)):
        for _ in range(2):
            assert torch.equal(kept.image(path)[:], images.read(path))
        assert kept.used == 0
    kept.add([path])
    kept.image(path)
    assert kept.used == 0
    assert decoded.value == 6 + 6 + 1


def test_items_of_a_stream_are_copies(pool):
    stream = Stream(paths.find(pool / "clear"), lambda image, rng: image[:], 1, "clear", cache_for(100))
    first = stream[0]["clear"].clone()
    for _ in range(3):
        item = stream[0]["clear"]
        assert torch.equal(item, first)
        item.zero_()


def test_a_file_may_be_both_an_image_and_a_depth_map(pool):
    path = paths.find(pool / "depth")[0]
    kept = cache_for(100)
    kept.add([path], [path])
    for _ in range(2):
        assert torch.equal(kept.image(path)[:], images.read(path))
        assert torch.equal(kept.depth(path)[:], images.read_depth(path))
    assert kept.used == SIZE + SIZE // 3


def test_only_8_bit_images_are_cached(tmp_path):
    rng, kept = np.random.default_rng(0), cache_for(100)
    grey, depth = tmp_path / "grey.png", tmp_path / "depth.npy"
    Image.fromarray(rng.integers(0, 65536, (9, 8), dtype=np.uint16)).save(grey)
    np.save(depth, rng.random((9, 8)))
    kept.add([grey], [grey, depth])
    for _ in range(2):
        assert torch.equal(kept.image(grey)[:], images.read(grey))
        assert torch.equal(kept.depth(grey)[:], images.read_depth(grey))
        assert torch.equal(kept.depth(depth)[:], images.read_depth(depth))
    assert kept.used == 0


@pytest.mark.parametrize("gib", [0, 0.01])
def test_images_are_compared_and_cut_before_they_are_reduced(tmp_path, gib):
    """A ground truth with SOTS' border, and files that only look alike once they are small."""
    scene = torch.rand(3, 30, 40)
    scene = F.interpolate(scene[None], (60, 80), mode="bilinear")[0].clamp(0, 1)
    framed = F.pad(scene, (10, 10, 10, 10))
    files = {"hazy": scene, "framed": framed, "double": scene.repeat_interleave(2, 1).repeat_interleave(2, 2)}
    for name, image in files.items():
        images.write(tmp_path / f"{name}.png", image)
    images.write(tmp_path / "depth.png", files["double"][:1])
    kept = Cache(gib, short_side=20)
    kept.add([tmp_path / f"{name}.png" for name in files], [tmp_path / "depth.png"])
    for _ in range(2):
        hazy, clear = read_pair(tmp_path / "hazy.png", tmp_path / "framed.png", 10, kept)
        assert hazy.shape == clear.shape == (3, 20, 27)
        assert torch.equal(hazy[:], clear[:])
        with pytest.raises(UserError, match=r"80x60 but its ground truth .* is 160x120"):
            read_pair(tmp_path / "hazy.png", tmp_path / "double.png", 10, kept)
        with pytest.raises(UserError, match=r"80x60 but its depth map .* is 160x120"):
            read_with_depth(tmp_path / "hazy.png", tmp_path / "depth.png", kept)


@pytest.mark.parametrize("gib", [0, 0.01])
def test_depth_is_divided_by_the_maximum_of_the_whole_map(tmp_path, gib):
    """Of 8 bit and of 16, though the maximum lies in the border that is cut."""
    depth = np.full((30, 40), 100, np.uint8)
    depth[0] = 255
    Image.fromarray(depth).save(tmp_path / "8.png")
    Image.fromarray(depth.astype(np.uint16)).save(tmp_path / "16.png")
    kept = Cache(gib, border=2)
    kept.add([], [tmp_path / "8.png", tmp_path / "16.png"])
    for _ in range(2):
        for name in ("8.png", "16.png"):
            assert kept.depth(tmp_path / name)[:].max() == pytest.approx(100.5 / 255.5)


def test_broken_files_are_refused_every_time(pool):
    path = paths.find(pool / "clear")[0]
    path.write_bytes(b"junk")
    kept = cache_for(100)
    kept.add([path], [path])
    for read in (kept.image, kept.depth) * 2:
        with pytest.raises(UserError, match=r"0\.png: cannot be read as an image"):
            read(path)
    assert kept.used == 0


def test_a_spawned_worker_has_no_cache(pool):
    for plain, kept in zip(streams(pool, CUTS[0], None), streams(pool, CUTS[0], cache_for(100)), strict=True):
        batches(kept, 0)
        sent = pickle.loads(pickle.dumps(kept))
        same(batches(sent, 0), batches(plain, 0))
    assert pickle.loads(pickle.dumps(cache_for(100))).used == 0


@settings(max_examples=50, deadline=None)
@given(st.data(), st.integers(1, 20), st.integers(1, 20), st.integers(0, 255))
def test_a_slice_equals_the_slice_of_the_tensor(data, height, width, most):
    values = torch.randint(0, most + 1, (height, width, 3), dtype=torch.uint8).permute(2, 0, 1)
    bounds = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in (height, width)]
    cut = (slice(None), *(slice(*ends) for ends in bounds))
    picture, depth = Pixels(values), images.depth_pixels(values[:1], int(values[:1].max()))
    want = values.float() / 255
    far = ((values[:1].double() + 0.5) / (values[0].max().item() + 0.5)).float()
    assert torch.equal(picture[cut], want[cut])
    assert torch.equal(depth[cut], far[cut])
    both = Stack((picture, depth))
    assert both.shape == (4, height, width)
    assert torch.equal(both[cut], torch.cat([want, far])[cut])
    assert both[cut].is_contiguous()
    assert picture[cut].is_contiguous()


def test_a_cache_larger_than_the_memory_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 3.26 * 2**30)
    with pytest.raises(UserError, match=r"data\.cache=3\.5: only 3\.3 GiB of memory are free, .*; set a smaller data"):
        Cache(3.5)
    assert Cache(3).used == 0

    def refuse(*_):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(cache.mmap, "mmap", refuse)
    with pytest.raises(
        UserError, match=r"data\.cache: .* GiB cannot be allocated \(Cannot allocate memory\); set a smaller"
    ):
        Cache(3)


def test_memory_is_allocated_as_images_arrive():
    """Resident, in this process: 2 GiB that are not there yet."""

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    before = resident()
    kept = Cache(2)
    assert resident() - before < 2**26
    assert kept.used == 0


@pytest.mark.parametrize("value", ["-1", "much", "true", ".inf", ".nan"])
def test_invalid_cache_settings_are_refused(value):
    with pytest.raises(UserError, match=r"data\.cache"):
        config.section("data", [f"cache={value}"])
    assert config.section("data").cache > 0


def test_images_are_cached_after_border_and_resizing(pool):
    """Cut first, then shrunk; read anew or from memory, in 8-bit steps both times. Small ones stay as they are."""
    path = next((pool / "clear").iterdir())
    whole = images.read(path)
    for kept in (Cache(0, 2, 8), Cache(size_of(1), 2, 8)):
        kept.add([path], [pool / "depth" / path.name])
        wanted = F.interpolate(whole[None, :, 2:-2, 2:-2], (8, 10), mode="bilinear", antialias=True)[0]
        for _ in range(2):
            torch.testing.assert_close(kept.image(path)[:], wanted, atol=0.51 / 255, rtol=0)
            assert kept.depth(pool / "depth" / path.name).shape == (1, 8, 10)
    assert torch.equal(Cache(0, 0, 100).image(path)[:], whole)
    assert torch.equal(Cache(0, 2).image(path)[:], whole[:, 2:-2, 2:-2])
    with pytest.raises(UserError, match=r"data\.border=10 pixels leave nothing of it"):
        Cache(0, 10).image(path)


def size_of(pictures):
    return pictures * SIZE / 2**30
