import numpy as np
import pytest
import torch
from torch import nn

from losses.contrastive import LAYERS, GaussianContrastive
from losses.perceptual import layer_names
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("narrow_vgg")
HIGHEST = sum(LAYERS.values())


class StandIn(nn.Module):
    """Five maps that can be computed by hand: the image, times a number, at ever smaller sizes."""

    def forward(self, image):
        return {name: (i + 0.5) * image[..., :: i + 1, :] for i, name in enumerate(LAYERS)}


@pytest.fixture
def loss(vgg_file):
    return GaussianContrastive(str(vgg_file("vgg19")))


def pictures(count=2, seed=0):
    """(prediction, clear, hazy): the prediction is between the other two."""
    generator = torch.Generator().manual_seed(seed)
    clear = torch.rand(count, 3, 32, 32, generator=generator)
    hazy = 0.4 * clear + 0.5
    return (0.6 * clear + 0.4 * hazy), clear, hazy


def by_hand(pred, clear, hazy, sigma):
    """The formula for one image, in numpy."""
    d = lambda a, b: 1 - np.exp(-(np.abs(a - b).mean() ** 2) / (2 * sigma**2))  # noqa: E731
    total = 0
    for i, weight in enumerate([1 / 32, 1 / 16, 1 / 8, 1 / 4, 1]):
        p, c, h = ((i + 0.5) * x.double().numpy()[:, :: i + 1] for x in (pred, clear, hazy))
        total += weight * d(p, c) / (d(c, h) + d(p, h) + d(p, c) + 1e-6)
    return total


def test_closed_form(loss):
    """A batch's loss is the mean of its pictures', whatever else lies in the batch."""
    loss.vgg, loss.sigma = StandIn(), 0.3
    pred, clear, hazy = pictures(3)
    pred[1] = 0
    expected = np.mean([by_hand(*trio, 0.3) for trio in zip(pred, clear, hazy, strict=True)])
    assert loss(pred, clear, hazy).item() == pytest.approx(expected, rel=1e-4)


def test_the_layers_are_the_five_of_vgg19(loss):
    """One share for each of VGG19's layers, by their places in torchvision, in normalised images."""
    pred, clear, hazy = pictures(1)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    assert [layer_names("vgg19")[name] for name in loss.layers] == [1, 6, 11, 20, 29]
    total = 0
    for end, weight in zip((1, 6, 11, 20, 29), (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1), strict=True):
        maps = [loss.vgg.features[: end + 1]((x - mean) / std) for x in (pred, clear, hazy)]
        wrong, apart, left = (
            1 - (-(maps[i] - maps[j]).abs().mean().square() / (2 * 0.5**2)).exp() for i, j in ((0, 1), (1, 2), (0, 2))
        )
        total += weight * wrong / (apart + left + wrong + 1e-6)
    assert loss(pred, clear, hazy).item() == pytest.approx(total.item(), rel=1e-3)


def test_the_loss_grows_from_clear_to_hazy(loss):
    _, clear, hazy = pictures()
    values = [loss(clear.lerp(hazy, share), clear, hazy).item() for share in torch.linspace(0, 1, 6)]
    assert values[0] == 0
    assert values == sorted(values)
    assert values[-1] == pytest.approx(HIGHEST / 2, rel=0.01)  # d(pred, hazy) is 0, and the other two are equal
    assert loss(torch.rand(2, 3, 32, 32), clear, hazy).item() < HIGHEST


def test_gradients_reach_the_prediction_alone(loss):
    loss.train()
    trio = [x.requires_grad_() for x in (p.detach() for p in pictures())]
    loss(*trio).backward()
    assert trio[0].grad.isfinite().all()
    assert trio[0].grad.any()
    assert trio[1].grad is None
    assert trio[2].grad is None
    assert not any(p.requires_grad for p in loss.parameters())
    assert not any(module.training for module in loss.vgg.modules())


@pytest.mark.parametrize("hazy", ["same", "other"])
def test_a_perfect_prediction_has_finite_gradients(loss, hazy):
    """Also where there was no haze, and all three images are one."""
    _, clear, other = pictures()
    pred = clear.clone().requires_grad_()
    value = loss(pred, clear, clear if hazy == "same" else other)
    value.backward()
    assert value.item() == 0
    assert pred.grad.isfinite().all()


def test_gradient_descent_lowers_the_loss(loss):
    pred, clear, hazy = pictures()
    pred, values = pred.requires_grad_(), []
    optimiser = torch.optim.Adam([pred], lr=0.01)
    for _ in range(15):
        values.append(loss(pred, clear, hazy))
        optimiser.zero_grad()
        values[-1].backward()
        optimiser.step()
    assert values[-1] < 0.95 * values[0]


def test_mixed_precision(loss):
    pred, clear, hazy = pictures()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(pred.requires_grad_(), clear, hazy)
    value.backward()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(loss(pred, clear, hazy).item(), rel=0.05)
    assert pred.grad.isfinite().all()


@pytest.mark.usefixtures("offline")
def test_offline():
    with pytest.raises(UserError, match=r"vgg19.*OSError.*kanet\.contrastive\.weights=FILE.*contrastive_weight=0"):
        GaussianContrastive()


def test_weights_of_another_network(vgg_file):
    with pytest.raises(UserError, match="does not hold torchvision's vgg19"):
        GaussianContrastive(str(vgg_file("vgg16")))
