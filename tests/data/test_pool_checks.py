import numpy as np
import pytest
import torch

from data import images, paths, pool_checks, sample
from utils import checkpoint


@pytest.fixture
def pools(tmp_path):
    """A function that writes hazy and clear images, those of ``function(n)``; (3,20,30) in [0,1]."""

    def colourful(n):
        return torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(n))

    def write(hazy=lambda n: 0.5 * colourful(n) + 0.4, clear=lambda n: colourful(100 + n), sizes=(20, 5)):
        found = []
        for name, make, size in zip(("hazy", "clear"), (hazy, clear), sizes, strict=True):
            for n in range(size):
                images.write(tmp_path / name / f"{n}.png", make(n))
            found.append(paths.find(tmp_path / name))
        return found

    return write


def test_good_pools_and_the_sample_set_have_no_warning(pools):
    assert pool_checks.warnings(*pools()) == []
    hazy, clear = (paths.find(sample.part(f"train/{name}")) for name in ("hazy", "clear"))
    assert pool_checks.warnings(hazy, clear) == []
    assert pool_checks.warnings(None, clear) == []


def test_a_very_small_pool(pools):
    hazy, clear = pools(sizes=(5, 2))
    [line] = pool_checks.warnings(hazy, clear)
    assert line.startswith("data.clear is very small (2): the network will learn the images by heart")
    assert pool_checks.warnings(clear, hazy)[0].startswith("data.hazy is very small (2)")


def test_a_pool_of_one_image_again_and_again(pools):
    [line] = pool_checks.warnings(*pools(hazy=lambda n: torch.linspace(0.4, 0.9, 1800).view(3, 20, 30)))
    assert line.startswith("data.hazy: 16 of its 20 images were looked at, and all are the same; check how")


def test_exchanged_pools(pools):
    hazy, clear = pools()
    [line] = pool_checks.warnings(clear, hazy)
    assert line.startswith("data.hazy does not look hazier than data.clear (median of the dark channel 0.0")
    [line] = pool_checks.warnings(hazy, hazy)
    assert "exchanged, or the same" in line
    assert pool_checks.warnings(None, hazy) == []


@pytest.mark.parametrize(("grey", "told"), [(2, []), (3, ["3 are grey"])])
def test_a_pool_that_is_mostly_grey(pools, grey, told):
    rng = np.random.default_rng(0)

    def clear(n):
        return torch.from_numpy(rng.random((1 if n < grey else 3, 20, 30), np.float32)).expand(3, -1, -1)

    lines = pool_checks.warnings(*pools(clear=clear))
    assert [line.partition("looked at, and ")[2].partition(":")[0] for line in lines] == told
    assert all(line.startswith("data.clear: 5 of its 5 images were") for line in lines)


def test_no_random_number_is_drawn_and_what_cannot_be_read_is_left_to_training(pools):
    hazy, clear = pools()
    before = checkpoint.random_states()
    clear[0].write_bytes(b"no image")
    assert pool_checks.warnings(hazy, clear) == []
    for path in clear:
        path.write_bytes(b"no image")
    assert pool_checks.warnings(hazy, clear) == []
    after = checkpoint.random_states()
    assert torch.equal(after.pop("torch"), before.pop("torch"))
    assert after == before
