import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from losses import perceptual
from losses.perceptual import PerceptualLoss, layer_names
from utils import imagenet
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("narrow_vgg")


@pytest.fixture
def file(vgg_file):
    return vgg_file("vgg16")


@pytest.mark.parametrize("network", ["vgg16", "vgg19"])
def test_layer_names_are_those_of_torchvision(network):
    layers = getattr(torchvision.models, network)().features
    expected, stage, conv = {}, 1, 0
    for index, layer in enumerate(layers):
        if isinstance(layer, nn.ReLU):
            conv += 1
            expected[f"relu{stage}_{conv}"] = index
        elif isinstance(layer, nn.MaxPool2d):
            stage, conv = stage + 1, 0
    assert layer_names(network) == expected


def test_equal_images_have_zero_loss(file):
    loss, x = PerceptualLoss(weights=str(file)), torch.rand(2, 3, 32, 32)
    assert loss(x, x).item() == 0
    assert loss(x, x.flip(3)).item() > 0


def test_closed_form(file):
    loss = PerceptualLoss("vgg16", ["relu1_1", "relu2_2"], str(file))
    x, y = torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16)
    mean, std = torch.tensor(perceptual.MEAN).view(3, 1, 1), torch.tensor(perceptual.STD).view(3, 1, 1)
    layers = torchvision.models.vgg16().features
    state = torch.load(file)
    layers.load_state_dict({k.removeprefix("features."): v for k, v in state.items() if k.startswith("features.")})
    distances = []
    for end in (2, 9):
        a, b = layers[:end]((x - mean) / std), layers[:end]((y - mean) / std)
        distances.append(F.l1_loss(a, b).item())
    assert loss(x, y).item() == pytest.approx(sum(distances) / 2, rel=1e-5)


def test_gradients_reach_the_image_alone(file):
    """Gradients reach the image, not the network or the target; it stays in eval mode."""
    loss = PerceptualLoss(weights=str(file)).train()
    x, target = torch.rand(1, 3, 16, 16, requires_grad=True), torch.rand(1, 3, 16, 16, requires_grad=True)
    loss(x, target).backward()
    assert x.grad.any()
    assert target.grad is None
    assert not any(p.requires_grad for p in loss.parameters())
    assert not any(module.training for module in loss.features.modules())


def test_construction_draws_no_random_numbers(file):
    """It is made when it is first needed: a resumed run would else go on with other numbers."""
    before = torch.get_rng_state()
    PerceptualLoss("vgg16", ["relu1_1"], str(file))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_unknown_layer():
    with pytest.raises(UserError, match=r"vgg16 has no layer 'relu3_4'; did you mean 'relu3_3'"):
        PerceptualLoss("vgg16", ["relu3_4"])


def test_no_layers():
    with pytest.raises(UserError, match=r"nedr\.perceptual\.layers is empty; name some of relu1_1"):
        PerceptualLoss("vgg16", [])


@pytest.mark.usefixtures("offline")
def test_offline():
    with pytest.raises(UserError, match=r"OSError.*nedr\.perceptual\.weights=FILE.*nedr\.perceptual_weight=0"):
        PerceptualLoss()
    with pytest.raises(UserError, match=r"vgg19.*other\.weights=FILE.*other_weight=0"):
        PerceptualLoss("vgg19", key="other")


def test_weights_that_are_absent_or_of_another_network(file, tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        PerceptualLoss(weights=str(tmp_path / "absent.pth"))
    with pytest.raises(UserError, match="does not hold torchvision's vgg19"):
        PerceptualLoss("vgg19", weights=str(file))


# EfficientNet-lite0, whose ImageNet weights are on the package index.

LITE0 = "tf_efficientnet_lite0"


@pytest.fixture(scope="module")
def lite0(tmp_path_factory):
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("lite0") / "lite0.pth"
    torch.save(timm.create_model(LITE0).state_dict(), file)
    return file


def test_maps_of_efficientnet(lite0):
    """timm's own maps of the normalised image, by stride, in whatever order they are named."""
    loss = PerceptualLoss("efficientnet_lite0", ["stride8", "stride2", "stride4"], str(lite0)).train()
    x, y = torch.rand(2, 3, 64, 96), torch.rand(2, 3, 64, 96)
    plain = timm.create_model(LITE0, features_only=True, out_indices=(0, 1, 2)).eval()
    plain.load_state_dict({k: v for k, v in torch.load(lite0).items() if k in plain.state_dict()})
    maps = loss.features(x)
    assert {name: tuple(value.shape[2:]) for name, value in maps.items()} == {
        "stride2": (32, 48),
        "stride4": (16, 24),
        "stride8": (8, 12),
    }
    wanted = [(a - b).abs().mean() for a, b in zip(plain(2 * x - 1), plain(2 * y - 1), strict=True)]
    torch.testing.assert_close(loss(x, y), torch.stack(wanted).mean())
    assert loss(x, x) == 0
    assert not any(module.training for module in loss.features.modules())
    assert not any(p.requires_grad for p in loss.parameters())


def test_efficientnet_refusals(lite0, monkeypatch):
    with pytest.raises(UserError, match="efficientnet_lite0 has no layer 'relu1_2'"):
        PerceptualLoss("efficientnet_lite0", ["relu1_2"], str(lite0))
    monkeypatch.setitem(imagenet.PACKAGES, LITE0, "no-such-package-of-weights")
    with pytest.raises(UserError, match=r"nedr\.perceptual\.weights=package: .* is not installed"):
        PerceptualLoss("efficientnet_lite0", ["stride2"], "package")
