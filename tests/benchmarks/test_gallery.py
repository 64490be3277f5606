"""The gallery: rendered scenes are what they say, and the command makes the whole document."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import gallery, scenes

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"height": 60, "width": 90}


@pytest.fixture(scope="module")
def day():
    return scenes.render(scenes.street(), **SMALL)


def test_a_rendered_street_has_true_distances(day):
    clear, metres = day
    assert (clear.shape, metres.shape) == ((3, 60, 90), (1, 60, 90))
    assert 0 <= clear.min() < clear.max() <= 1
    assert metres[0, 0, 45].isinf()  # sky
    row = 55  # of the road: the eye is 1.7 m above it
    slope = (row + 0.75 - scenes.HORIZON * 60) / (scenes.FOCUS * 90)  # of the lowest ray of the pixel, the nearest
    assert metres[0, row, 45] == pytest.approx(scenes.EYE / slope * (1 + slope**2) ** 0.5, rel=0.01)


def test_walls_occlude_what_is_behind():
    wall = scenes.Box((-50, -1, 10), (50, 50, 11), scenes.WHITE)
    clear, metres = scenes.render([*scenes.street(), wall], **SMALL)
    assert metres.max() < 40
    torch.testing.assert_close(clear[:, 0, 45], torch.tensor(scenes.WHITE))


def test_transmission_at_the_visibility_range_is_5_percent():
    hazy = gallery.hazed(torch.zeros(3, 1, 2), torch.tensor([[[50.0, torch.inf]]]), 50, (0.8, 0.9, 1.0))
    torch.testing.assert_close(hazy[:, 0, 0], torch.tensor([0.8, 0.9, 1.0]) * 0.95, atol=1e-3, rtol=0)
    torch.testing.assert_close(hazy[:, 0, 1], torch.tensor([0.8, 0.9, 1.0]), atol=1e-3, rtol=0)


def test_lamps_glow_in_fog_at_night(day):
    night, fog = scenes.by_night(*day, seen=60)
    assert night.max() == 1
    assert night.mean() < day[0].mean() / 2
    assert fog[:, 5, 45].mean() > night[:, 5, 45].mean()  # the sky


def test_the_command_writes_text_and_images(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scenes, "render", partial(scenes.render, **SMALL))
    gallery.main(["--output", str(tmp_path)])
    text = (tmp_path / "gallery.md").read_text()
    pictures = re.findall(r"!\[hazy [\d.]+ dB, nedr [\d.]+ dB, dcp [\d.]+ dB\]\((gallery/\w+\.jpg)\)", text)
    assert len(pictures) == len(set(pictures)) == len(gallery.SAMPLES) + len(gallery.REMARKS)
    for picture in pictures:
        with Image.open(tmp_path / picture) as image:
            image.load()
    assert str(tmp_path / "gallery.md") in capsys.readouterr().out


def test_the_documents_hold_what_the_command_writes():
    """Its cases and remarks; the figures are those of the weights."""
    text = (ROOT / "docs/gallery.md").read_text()
    for remark in (gallery.HEAD, *gallery.SAMPLES.values(), *gallery.REMARKS.values()):
        assert remark in text
    for picture in re.findall(r"\((gallery/\w+\.jpg)\)", text):
        assert (ROOT / "docs" / picture).is_file()
