import pytest
import torch

from losses.priors import dark_channel_loss, total_variation


def test_total_variation_of_a_ramp():
    """A ramp of a step a column: that step a pixel, and nothing from row to row."""
    ramp = (torch.arange(10) * 0.05).expand(2, 3, 8, 10)
    assert total_variation(ramp).item() == pytest.approx(0.05)
    assert total_variation(ramp.transpose(2, 3)).item() == pytest.approx(0.05)
    assert total_variation(torch.full((1, 3, 4, 4), 0.3)).item() == 0
    checker = (torch.arange(6)[:, None] + torch.arange(6)).remainder(2).float().expand(1, 3, 6, 6)
    assert total_variation(checker).item() == 2


def test_dark_channel_loss():
    image = torch.full((1, 3, 30, 30), 0.6)
    assert dark_channel_loss(image).item() == pytest.approx(0.6)
    image[:, 2] = 0.1
    assert dark_channel_loss(image).item() == pytest.approx(0.1)
    image[0, 1, 15, 15] = 0  # one dark pixel darkens its 15x15 neighbourhood
    assert dark_channel_loss(image).item() == pytest.approx(0.1 * (1 - 225 / 900))
