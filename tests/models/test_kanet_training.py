"""One step of KA-Net's training in every form: what it moves, how samples are weighed, and what is saved."""

from types import SimpleNamespace

import pytest
import torch
import torchvision
from helpers import picture

import models
from utils import config
from utils.errors import UserError
from utils.training import progress
from utils.training.updater import Updater

PLAIN = ("kanet.sample_weights.kind=none", "kanet.contrastive_weight=0")


def settings(*overrides: str) -> config.Settings:
    small = ["kanet.width=8", "kanet.sample_weights.saved=8", "kanet.sample_weights.random_fourier.steps=3"]
    return config.load("kanet", models.settings_types(), overrides=[*small, *overrides])


def batch() -> dict[str, torch.Tensor]:
    clear = picture(1, 4, 3, 64, 64)
    return {"hazy": 0.5 * clear + 0.4, "clear": clear}


@pytest.fixture(autouse=True)
def _narrow_vgg(monkeypatch):
    """VGG-19's layers with 4 channels each, so that tests are quick and need no download."""
    layers = [4, 4, "M", 4, 4, "M", 4, 4, 4, 4, "M", 4, 4, 4, 4, "M", 4, 4, 4, 4, "M"]
    narrow = SimpleNamespace(features=torchvision.models.vgg.make_layers(layers))
    monkeypatch.setattr(torchvision.models, "vgg19", lambda weights=None: narrow)


def updater(method: models.Method, values: config.Settings) -> Updater:
    return Updater(method.optimisers("train", values), progress.stages(values)[0], values, torch.device("cpu"))


def step(updater: Updater, method: models.Method) -> dict[str, float]:
    terms = updater.step(lambda data: method.train().losses(data, "train"), [batch()])
    return {name: term.item() for name, term in terms.items()}


FORMS = [("none", "float32"), ("density_ratio", "float32"), ("random_fourier", "bf16")]


@pytest.mark.parametrize(("kind", "precision"), FORMS)
def test_a_step_reaches_every_parameter(kind, precision):
    values = settings(f"kanet.sample_weights.kind={kind}", f"precision={precision}")
    method = models.build(values)
    method.start()
    names = set(method.state_dict())
    terms = step(updater(method, values), method)
    assert list(terms) == ["network", "reconstruction", "contrastive"]
    assert terms["network"] == pytest.approx(terms["reconstruction"] + 0.04 * terms["contrastive"], rel=1e-4)
    for name, p in method.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
    moved = {name.split(".")[1] for name, p in method.named_parameters() if p.grad.any()}
    assert moved == {"encoder", "removal", "decoder", "tail", "last"}
    assert set(method.state_dict()) == names  # a loss is no part of the weights


def test_training_learns():
    values = settings(*PLAIN, "kanet.learning_rate=2e-3")
    method = models.build(values)
    method.start()
    moving = updater(method, values)
    first, *_, last = [step(moving, method)["network"] for _ in range(6)]
    assert last < 0.95 * first


def test_samples_are_weighted(monkeypatch):
    """Each sample's own L1 counts by its weight, and no gradient flows by way of the weights."""
    method, data, seen = models.build(settings(*PLAIN)).eval(), batch(), []
    shares = torch.tensor([0.1, 0.2, 0.3, 0.4])
    method.sample_weights.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]) or shares)
    (loss,) = method.losses(data, "train")
    predicted, z = method.network(data["hazy"])
    errors = torch.stack([(p - c).abs().mean() for p, c in zip(predicted, data["clear"], strict=True)])
    torch.testing.assert_close(loss.value, errors @ shares)
    torch.testing.assert_close(seen[0], z)
    assert not seen[0].requires_grad


def test_negative_predictions_are_penalised():
    method = models.build(settings(*PLAIN))
    with torch.no_grad():
        method.network.last.bias.fill_(-2)
    (loss,) = method.losses(batch(), "train")
    loss.value.backward()
    assert (method.network.last.bias.grad < 0).all()
    assert not method.eval().dehaze(batch()["hazy"]).any()


def test_no_vgg_without_its_loss(monkeypatch):
    def missing(weights=None):
        raise OSError("offline")

    monkeypatch.setattr(torchvision.models, "vgg19", missing)
    method = models.build(settings("kanet.contrastive_weight=0"))
    method.start()
    (loss,) = method.losses(batch(), "train")
    assert set(loss.terms) == {"reconstruction"}
    with pytest.raises(UserError, match=r"kanet\.contrastive\.weights=FILE.*kanet\.contrastive_weight=0"):
        models.build(settings()).start()


@pytest.mark.parametrize("kind", ["random_fourier", "density_ratio"])
def test_the_state_of_the_sample_weights_is_saved(kind):
    """A method with another's state dict goes on as that one does, the random features of the weights among it."""
    values = settings(f"kanet.sample_weights.kind={kind}", "kanet.contrastive_weight=0")
    one, other = models.build(values).eval(), models.build(values).eval()
    for _ in range(2):
        list(one.losses(batch(), "train"))
    other.load_state_dict({key: value.clone() for key, value in one.state_dict().items()})
    for _ in range(2):
        (a,), (b,) = one.losses(batch(), "train"), other.losses(batch(), "train")
        assert torch.equal(a.value, b.value)
    assert not [key for key in one.inference_state() if not key.startswith("network.")]


def test_images():
    method = models.build(settings(*PLAIN)).eval()
    found = method.sample_images(batch())
    assert list(found) == ["hazy", "dehazed", "clear"]
    assert 0 <= found["dehazed"].min() <= found["dehazed"].max() <= 1
    assert torch.equal(found["dehazed"], method.dehaze(batch()["hazy"]))
