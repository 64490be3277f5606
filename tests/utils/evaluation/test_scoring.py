import math
import threading

import pytest
import torch

from utils import device, memory
from utils.errors import UserError
from utils.evaluation import metrics, scoring
from utils.evaluation.scoring import Score


class Pairs:
    """Three pairs of odd sizes; the second cannot be read where it is ``broken``."""

    def __init__(self, broken=False):
        self.broken = broken
        self.read = []

    def __len__(self):
        return 3

    def __getitem__(self, index):
        self.read.append(index)
        if self.broken and index == 1:
            raise UserError("b.png: damaged")
        generator = torch.Generator().manual_seed(index)
        clear = torch.rand(3, 13 + index, 17, generator=generator)
        return {"hazy": clear / 2 + 0.5, "clear": clear, "name": "abc"[index] + ".png"}


def invert(hazy):
    assert hazy.dim() == 4
    return 2 * hazy - 1


def half(hazy):
    return 1.5 * hazy - 0.5


def names(outcome):
    return [score.name for score in outcome.scores]


def test_figures_of_the_method_and_of_its_input():
    scores = scoring.score(half, Pairs())
    assert [score.name for score in scores] == ["a.png", "b.png", "c.png"]
    for score, item in zip(scores, Pairs(), strict=False):
        dehazed = half(item["hazy"])
        assert score.figures["ours.psnr"] == metrics.psnr(dehazed, item["clear"])
        assert score.figures["ours.ssim"] == metrics.ssim(dehazed, item["clear"])
        assert score.figures["hazy.psnr"] == metrics.psnr(item["hazy"], item["clear"]) < score.figures["ours.psnr"]
        assert (score.height, score.width) == item["hazy"].shape[1:]
        assert score.seconds > 0


def test_a_perfect_method():
    assert {score.figures["ours.psnr"] for score in scoring.score(invert, Pairs())} == {math.inf}


def test_output_of_low_precision_is_scored_in_full():
    (score, *_) = scoring.score(lambda hazy: half(hazy).bfloat16(), Pairs())
    assert score.figures["ours.psnr"] > 5


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_threads_change_nothing_but_the_time(workers):
    saved, scores = {}, []
    outcome = scoring.run(
        half,
        Pairs(),
        lambda item, dehazed: {"error": float((dehazed - item["clear"]).abs().mean())},
        lambda item, dehazed: saved.update({item["name"]: dehazed}),
        workers=workers,
        on_score=scores.append,
    )
    assert names(outcome) == ["a.png", "b.png", "c.png"] == [score.name for score in scores]
    for score, item in zip(outcome.scores, Pairs(), strict=False):
        assert torch.equal(saved[score.name], half(item["hazy"]))
        assert score.figures == {"error": float((half(item["hazy"]) - item["clear"]).abs().mean())}
    assert outcome.seconds.keys() == {*scoring.STAGES, "wall", "waiting"}
    assert all(seconds >= 0 for seconds in outcome.seconds.values())
    assert outcome.seconds["wall"] >= outcome.seconds["dehazing"] > 0


def test_reading_the_next_and_finishing_the_last_overlap_with_dehazing():
    """Each stage waits for the other to have begun: in turn, this would never end."""
    reading, finishing = threading.Event(), threading.Event()

    class Items(Pairs):
        def __getitem__(self, index):
            if index == 1:
                reading.set()
            return super().__getitem__(index)

    def dehaze(hazy):
        if hazy.shape[2] == 13:
            assert reading.wait(10)
        if hazy.shape[2] == 14:
            assert finishing.wait(10)
        return hazy

    def measure(item, dehazed):
        if item["name"] == "a.png":
            finishing.set()
        return {}

    assert names(scoring.run(dehaze, Items(), measure, workers=2)) == ["a.png", "b.png", "c.png"]


def test_large_images_are_not_held_beside_each_other(monkeypatch):
    monkeypatch.setattr(scoring, "LARGE", 100)
    alive, most = set(), []

    class Items(Pairs):
        def __getitem__(self, index):
            alive.add(index)
            most.append(len(alive))
            return super().__getitem__(index)

    def save(item, dehazed):
        alive.discard("abc".index(item["name"][0]))

    scoring.run(half, Items(), None, save, workers=2)
    assert max(most) <= 2  # the next may be read while the last is finished, no more


def test_memory_is_given_back_between_images_of_different_sizes(monkeypatch):
    given = []
    monkeypatch.setattr(scoring, "release_memory", lambda: given.append(1))
    scoring.run(half, Pairs())  # of three sizes
    assert len(given) == 2
    scoring.run(half, Pairs(), indices=[1, 1, 1])
    assert len(given) == 2


def test_threads_leave_the_number_of_threads_of_the_network_alone():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        scoring.run(half, Pairs(), lambda item, dehazed: {"mean": float(dehazed.mean())}, workers=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_only_the_requested_images_are_scored():
    pairs = Pairs()
    assert names(scoring.run(half, pairs, indices=[2, 0])) == ["c.png", "a.png"]
    assert pairs.read == [2, 0]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_raises_or_is_passed_to_the_callback(workers):
    with pytest.raises(UserError, match="damaged"):
        scoring.score(half, Pairs(broken=True))
    errors = []
    outcome = scoring.run(half, Pairs(broken=True), workers=workers, on_error=errors.append)
    assert names(outcome) == ["a.png", "c.png"]
    assert [str(error) for error in errors] == outcome.skipped == ["b.png: damaged"]


def test_an_image_that_cannot_be_measured_is_left_out():
    def measure(item, dehazed):
        if item["name"] == "b.png":
            raise UserError("b.png: immeasurable")
        return {}

    outcome = scoring.run(half, Pairs(), measure)
    assert names(outcome) == ["a.png", "c.png"]
    assert outcome.skipped == ["b.png: immeasurable"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_failed_write_ends_the_run(workers):
    scores = []

    def save(item, dehazed):
        if item["name"] == "b.png":
            raise UserError("the disk is full")

    with pytest.raises(UserError, match="disk is full"):
        scoring.run(half, Pairs(), None, save, workers=workers, on_score=scores.append)
    assert [score.name for score in scores] == ["a.png"]


def raised(error):
    raise error


def test_output_that_is_not_an_image_is_refused_by_name():
    with pytest.raises(UserError, match=r"a\.png.*not numbers; training has diverged: lower the learning rate"):
        scoring.score(lambda hazy: hazy * math.nan, Pairs())
    with pytest.raises(UserError, match=r"a\.png.*not numbers; use others"):
        scoring.run(
            lambda hazy: hazy * math.nan, Pairs(), on_error=raised, remedies=scoring.Remedies(numbers="use others")
        )


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
)
def test_running_out_of_memory_names_image_size_and_remedy(error):
    def exhaust(hazy):
        raise error

    with pytest.raises(UserError, match=r"a\.png: 17x13.*; shrink it$"):
        scoring.run(exhaust, Pairs(), on_error=raised, remedies=scoring.Remedies("shrink it"))
    with pytest.raises(UserError, match=r"a\.png: 17x13.*; set test\.tile=512, or take smaller validation"):
        scoring.score(exhaust, Pairs())


def test_a_programming_error_is_not_reported_as_a_bad_image():
    def wrong(hazy):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        scoring.run(wrong, Pairs(), on_error=print)


def score(psnr, ssim=0.5, seconds=1.0):
    return Score("x", 4, 3, seconds, {"ours.psnr": psnr, "ours.ssim": ssim})


def test_means():
    scores = [score(20, 0.5, 9.0), score(30, 0.7, 1.0), score(25, 0.6, 2.0)]
    assert scoring.mean(scores) == {"ours.psnr": 25, "ours.ssim": pytest.approx(0.6)}
    assert scoring.median_seconds(scores) == 2.0


def test_means_omit_and_report_nonfinite_figures():
    scores = [score(20, math.nan), score(math.inf), score(30)]
    assert scoring.mean(scores) == {"ours.psnr": 25, "ours.ssim": 0.5}
    assert scoring.left_out(scores) == {"ours.psnr": 1, "ours.ssim": 1}
    assert scoring.mean([score(math.inf)] * 2)["ours.psnr"] == math.inf
    assert math.isnan(scoring.mean([score(20, math.nan)])["ours.ssim"])
    assert scoring.mean([]) == {}
    assert math.isnan(scoring.median_seconds([]))


def test_devices():
    assert device.pick("cpu") == torch.device("cpu")
    assert device.pick("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "cuda:", "cuda:x", "cpu:0", "cuda:99"):
        with pytest.raises(UserError, match=f"device={name}"):
            device.pick(name)


def test_release_memory_works_on_every_system():
    memory.release_memory()


def test_precision():
    cpu, a = torch.device("cpu"), torch.ones(2, 2)
    with device.autocast(cpu, "float32"):
        assert (a @ a).dtype == torch.float32
    with device.autocast(cpu, "bf16"):
        assert (a @ a).dtype == torch.bfloat16
    with pytest.raises(UserError, match="needs a GPU"):
        device.autocast(cpu, "fp16")
