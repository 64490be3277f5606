"""The step-by-step copy of the released code meets the released outputs, and this code base meets the copy."""

import copy
import re

import pytest
import torch
from helpers import picture, tiny

import models
from models.encoder import RELEASED
from tests.models.nedr_reference import ReferenceTraining
from utils import config
from utils.training import progress
from utils.training.updater import Updater


@pytest.fixture(scope="module")
def reference(official_state) -> ReferenceTraining:
    """The released networks with rule-made weights."""
    live = {key: value for key, value in official_state["drem"].items() if not re.match(r"RDB_\d\.0\.conv1\.", key)}
    reference = ReferenceTraining(live)
    for name, network in reference.named_children():
        assert not network.load_state_dict(official_state[name], strict=False).missing_keys  # others are dead weight
    return reference


@torch.no_grad()
def test_the_reference_meets_the_released_outputs(reference, golden):
    reference.eval()
    x = picture(7, 1, 3, 128, 160)
    found = dict(zip(("J", "d", "beta"), reference.net_h2c(x), strict=True))
    for name, value in found.items():
        torch.testing.assert_close(value, golden[f"h2c_{name}"].reshape(value.shape), rtol=0, atol=1e-5)
    torch.testing.assert_close(reference.net_depth(x), golden["depth"], rtol=0, atol=1e-5)
    torch.testing.assert_close(reference.net_c2h(x, golden["depth"], found["beta"]), golden["c2h"], rtol=0, atol=1e-5)


@torch.no_grad()
def test_ours_meets_the_reference_at_another_size(reference, official_file):
    x = picture(3, 2, 3, 160, 128)
    torch.testing.assert_close(models.load(official_file).dehaze(x), reference.eval().net_h2c(x)[0], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_training_step_meets_the_reference(reference, official_file, monkeypatch):
    """Losses, and what the step did to every network, in float64: there rounding leaves seven places."""
    reference, method = copy.deepcopy(reference).train().double(), models.load(official_file).train().double()
    before = [p.detach().clone() for p in reference.discriminator_h2c.parameters()]
    hazy, clear = picture(5, 2, 3, 128, 128).double() * 0.5 + 0.4, picture(6, 2, 3, 128, 128).double()
    beta = torch.tensor([0.9, 1.5]).double().view(2, 1, 1, 1)
    monkeypatch.setattr(method, "_random_haze", lambda clear: (beta, None))
    values = config.load("nedr", models.settings_types(), overrides=["nedr.variant=released", "nedr.airlight=max"])
    updater = Updater(method.optimisers("train", values), progress.stages(values)[0], values, torch.device("cpu"))
    ours = updater.step(lambda batch: method.losses(batch, "train"), [{"hazy": hazy, "clear": clear}])
    theirs = reference.step(hazy, clear, beta)
    for name, value in theirs.items():
        assert ours[name].item() == pytest.approx(value.item(), rel=1e-7), name
    assert any(not torch.equal(a, b) for a, b in zip(before, reference.discriminator_h2c.parameters(), strict=True))
    for name, network in {
        "discriminator_h2c": method.discriminator_clear,
        "discriminator_c2h": method.discriminator_hazy,
    }.items():
        for (key, p), q in zip(getattr(reference, name).named_parameters(), network.parameters(), strict=True):
            assert (p - q).abs().max() < 1e-7, f"{name}.{key}"  # of a step of 1e-5


@torch.no_grad()
@pytest.mark.parametrize("airlight", ["max", "learned"])
def test_bf16_costs_little_quality(airlight, official_file):
    """With weights that make something of every layer: in the encoder bf16 would cost most of it."""
    if airlight == "max":
        method = models.load(official_file)
    else:
        method = tiny(f"nedr.encoder={RELEASED}", f"nedr.airlight={airlight}").eval()
        for name, buffer in method.named_buffers():  # as after a little training, when batch norm is not yet settled
            if name.endswith("running_var"):
                buffer.uniform_(0.2, 1.0)
    x = picture(7, 1, 3, 128, 160)
    exact = method.dehaze(x)
    with torch.autocast("cpu", torch.bfloat16):
        error = (method.dehaze(x) - exact).square().mean()
    assert -10 * error.log10() > 45
