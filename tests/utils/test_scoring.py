import math

import pytest
import torch

from utils import device, metrics, scoring
from utils.errors import UserError
from utils.scoring import Score


class Pairs:
    """Three pairs of odd sizes; the second cannot be read where it is ``broken``."""

    def __init__(self, broken=False):
        self.broken = broken

    def __len__(self):
        return 3

    def __getitem__(self, index):
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


def test_figures_of_the_method_and_of_its_input():
    scores = scoring.score(half, Pairs())
    assert [score.name for score in scores] == ["a.png", "b.png", "c.png"]
    for score, item in zip(scores, Pairs(), strict=False):
        dehazed = half(item["hazy"])
        assert score.psnr == metrics.psnr(dehazed, item["clear"])
        assert score.ssim == metrics.ssim(dehazed, item["clear"])
        assert score.hazy_psnr == metrics.psnr(item["hazy"], item["clear"]) < score.psnr
        assert score.hazy_ssim == metrics.ssim(item["hazy"], item["clear"])
        assert score.seconds > 0


def test_a_perfect_method():
    assert {score.psnr for score in scoring.score(invert, Pairs())} == {math.inf}


def test_output_of_low_precision_is_scored_in_full():
    (score, *_) = scoring.score(lambda hazy: half(hazy).bfloat16(), Pairs())
    assert score.psnr > 5


def test_an_unreadable_picture_is_raised_or_handed_over():
    with pytest.raises(UserError, match="damaged"):
        scoring.score(half, Pairs(broken=True))
    errors = []
    results = list(scoring.each(half, Pairs(broken=True), on_error=errors.append))
    assert [item["name"] for item, _, _ in results] == ["a.png", "c.png"]
    assert [str(error) for error in errors] == ["b.png: damaged"]


def test_output_that_is_no_picture_is_refused_by_name():
    with pytest.raises(UserError, match=r"a\.png.*not numbers"):
        scoring.score(lambda hazy: hazy * math.nan, Pairs())


def test_too_little_memory_names_picture_and_size():
    def exhaust(hazy):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match=r"a\.png: 17x13"):
        scoring.score(exhaust, Pairs())


def score(psnr, ssim=0.5, seconds=1.0):
    return Score("x", psnr, ssim, 10.0, 0.4, seconds)


def test_means():
    mean = scoring.mean([score(20, 0.5, 9.0), score(30, 0.7, 1.0), score(25, 0.6, 2.0)])
    assert (mean.psnr, mean.ssim, mean.hazy_psnr, mean.seconds) == (25, pytest.approx(0.6), 10, 2.0)


def test_means_leave_out_what_is_not_finite_and_say_so():
    scores = [score(20, math.nan), score(math.inf), score(30)]
    assert scoring.mean(scores).psnr == 25
    assert scoring.mean(scores).ssim == 0.5
    assert scoring.left_out(s.psnr for s in scores) == 1
    assert scoring.mean([score(math.inf)] * 2).psnr == math.inf
    assert math.isnan(scoring.mean([score(20, math.nan)]).ssim)
    assert math.isnan(scoring.mean([]).psnr)


def test_devices():
    assert device.pick("cpu") == torch.device("cpu")
    assert device.pick("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "cuda:", "cuda:x", "cpu:0", "cuda:99"):
        with pytest.raises(UserError, match=f"device={name}"):
            device.pick(name)


def test_precision():
    cpu, a = torch.device("cpu"), torch.ones(2, 2)
    with device.autocast(cpu, "float32"):
        assert (a @ a).dtype == torch.float32
    with device.autocast(cpu, "bf16"):
        assert (a @ a).dtype == torch.bfloat16
    with pytest.raises(UserError, match="needs a GPU"):
        device.autocast(cpu, "fp16")
