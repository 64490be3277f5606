import math

import pytest
import torch

from utils.evaluation import panels
from utils.evaluation.scoring import Score


def score(name, psnr=None):
    return Score(name, 4, 3, 0.1, {} if psnr is None else {"ours.psnr": psnr, "ours.ssim": 0.5})


def chosen(scores, **options):
    return {place: each.name for place, each in panels.choose(scores, "ours.psnr", **options).items()}


def test_the_best_the_median_and_the_worst():
    scores = [score("a", 3), score("b", 9), score("c", 1), score("d", 7), score("e", 5)]
    assert chosen(scores) == {"best": "b", "median": "e", "worst": "c"}
    assert chosen(scores, better="lower") == {"best": "c", "median": "e", "worst": "b"}


def test_nonfinite_figures_are_not_ranked():
    assert chosen([score("a", math.inf), score("b", 9), score("c", math.nan), score("d", 7)]) == {
        "best": "b",
        "median": "d",
    }


def test_few_images_are_not_shown_twice():
    assert chosen([score("a", 1)]) == {"best": "a"}
    assert chosen([score("a", 1), score("b", 2)]) == {"best": "b", "median": "a"}
    assert chosen([]) == {}


def test_without_figures_the_first_the_middle_and_the_last():
    assert chosen([score(name) for name in "abcde"]) == {"first": "a", "middle": "c", "last": "e"}


def test_the_error_map_goes_from_black_to_white():
    clear = torch.zeros(3, 1, 4)
    dehazed = torch.tensor([0, 1 / 3, 2 / 3, 1]) * panels.ERROR_SCALE + torch.zeros(3, 1, 4)
    expected = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]]).T[:, None].float()
    assert torch.allclose(panels.error_map(dehazed, clear), expected, atol=1e-6)
    assert torch.equal(panels.error_map(clear + 1, clear), torch.ones(3, 1, 4))


def test_parts_with_and_without_ground_truth():
    hazy, t = torch.rand(3, 20, 30), torch.rand(1, 20, 30)
    with_truth = panels.parts(hazy, {"clear": hazy, "transmission": t}, hazy, score("a", 21.5))
    assert list(with_truth) == [
        "hazy",
        "dehazed: 21.50 dB / 0.5000 (ours)",
        "clear",
        "transmission (white: 1)",
        "error (white: 0.25 or more)",
    ]
    assert list(panels.parts(hazy, {"clear": hazy}, None)) == ["hazy", "dehazed"]


@pytest.mark.parametrize(("height", "width"), [(20, 30), (1, 1), (1000, 700)])
def test_a_panel_shows_every_part_under_its_caption(height, width):
    colours = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "grey": (0.2,)}
    shown = {name: torch.tensor(c).view(-1, 1, 1).expand(-1, height, width) for name, c in colours.items()}
    panel = panels.panel(shown)
    scale = min(1, panels.LONG_SIDE / max(height, width))
    h, w = round(height * scale), round(width * scale)
    assert panel.shape == (3, h + panels.CAPTION, 3 * w + 2 * panels.GAP)
    for k, colour in enumerate(colours.values()):
        left = k * (w + panels.GAP)
        part = panel[:, panels.CAPTION :, left : left + w]
        assert torch.allclose(part, torch.tensor(colour).view(-1, 1, 1).expand(3, h, w), atol=1 / 255)
