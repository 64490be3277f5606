"""The learned airlight: what its statistics tell, and that old heads stay what they were."""

import pytest
import torch
import torch.nn.functional as F
from helpers import D4, tiny, tiny_settings

import models
from models.encoder import RELEASED
from models.nedr import airlight
from models.nedr.generators import RemovalNet
from utils import checkpoint, config, physics
from utils.errors import UserError


def scene(beta: float, light: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A hazy image (1,3,60,80) of random patches, brighter or darker whatever their depth, and its t."""
    torch.manual_seed(seed)
    clear = torch.rand(1, 3, 12, 16).repeat_interleave(5, 2).repeat_interleave(5, 3)
    depth = torch.linspace(1, 0.05, 60).view(1, 1, 60, 1).expand(1, 1, 60, 80)
    t = (-beta * depth).exp()
    return physics.scatter(clear, t, torch.full((1, 3, 1, 1), light)), t


@pytest.mark.parametrize("light", [0.7, 0.85, 1.0])
@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_the_regression_line_meets_the_airlight_at_no_transmission(light, beta):
    """I = A + t (J - A): where J does not depend on depth, the intercept is A."""
    found = []
    for seed in range(8):
        hazy, t = (x.flatten(2) for x in scene(beta, light, seed))
        found.append(airlight._intercept(hazy, t, torch.ones_like(t)))
    found = torch.stack(found)
    assert found.mean().item() == pytest.approx(light, abs=0.05)


def test_statistics_have_the_size_that_the_head_expects():
    hazy, t = (torch.cat([scene(beta, 0.9)[k] for beta in (0.5, 1.5, 3.0)]) for k in (0, 1))
    head = airlight.StatisticsAirlight((0.5, 1.15))
    found = head(torch.rand(3, 7), hazy, t.requires_grad_())
    assert found.shape == (3, 3, 1, 1)
    assert found.min() >= 0.5
    assert found.max() <= 1
    found.sum().backward()
    assert t.grad is None  # an error of A is not pushed into t
    assert all(p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize("picture", [torch.zeros(1, 3, 64, 64), torch.ones(1, 3, 64, 64), torch.rand(1, 3, 64, 64)])
@pytest.mark.parametrize("t", [0.001, 0.05, 1.0])
def test_statistics_of_flat_images_are_finite(picture, t):
    found = airlight.haze_statistics(picture, torch.full((1, 1, 64, 64), t))
    assert found.isfinite().all()
    assert found.abs().max() < 100


def test_the_head_can_predict_one():
    head = airlight.StatisticsAirlight((0.5, 1.15))
    with torch.no_grad():
        head.layers[-1].weight.zero_()
        head.layers[-1].bias.fill_(4)
    assert (head(torch.rand(1, 2), *scene(1, 0.9)) == 1).all()


def test_the_head_learns_in_the_warm_start():
    values = ("nedr.airlight_head=statistics", "nedr.found_airlight_weight=0.3", *D4)
    method = tiny(*values).train()
    clear, depth = torch.rand(2, 3, 64, 96), torch.rand(2, 1, 64, 96)
    t, light = (-depth).exp(), torch.tensor([0.8, 1.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    batch = {"hazy": physics.scatter(clear, t, light), "clear": clear, "transmission": t, "airlight": light}
    loss = next(method.losses(batch | {"density": torch.ones(2, 1)}, "warm_start"))
    assert loss.terms.keys() == {"transmission", "clear", "density", "airlight", "restored"}
    weighed = loss.terms["transmission"] + loss.terms["clear"] + loss.terms["density"] + loss.terms["airlight"]
    torch.testing.assert_close(loss.value, weighed + 0.3 * loss.terms["restored"])
    found = method.removal.estimate_haze(batch["hazy"], "learned")
    by_hand = ((batch["hazy"] - found.airlight) / found.transmission + found.airlight - clear).abs().mean()
    torch.testing.assert_close(loss.terms["restored"], by_hand, rtol=0.05, atol=0)
    loss.value.backward()
    assert method.removal.airlight.layers[0].weight.grad.any()


def test_checkpoints_without_the_setting_of_the_head_load(tmp_path):
    """They name no head, no encoder and no sizes, and have the paper's head under its old names."""
    of_then = (*D4, f"nedr.encoder={RELEASED}")
    whole = tiny(*of_then).eval()
    saved = config.to_dict(tiny_settings(*of_then))
    new = ("airlight_head", "encoder", "encoder_rate", "working_size", "query", "guided_radius", "idrm_hidden")
    for key in (*new, "airlight_bounds", "drem_growth", "transmission_range", "found_airlight_weight", "scales"):
        del saved["nedr"][key]
    assert "removal.airlight.0.weight" in whole.state_dict()
    file = tmp_path / "old.safetensors"
    checkpoint.save_weights(file, whole.inference_state(), {"model": "nedr", "settings": saved})
    loaded, hazy = models.load(file), torch.rand(1, 3, 70, 90)
    assert torch.equal(loaded.dehaze(hazy), whole.dehaze(hazy))
    saved["nedr"]["airlight_head"] = "statistics"
    checkpoint.save_weights(file, whole.inference_state(), {"model": "nedr", "settings": saved})
    with pytest.raises(UserError, match=r"does not fit this model: .*removal\.airlight\."):
        models.load(file)


@pytest.mark.parametrize("before", ["pooled", "max"])
def test_training_may_begin_with_weights_of_another_head(tmp_path, before):
    """The head keeps its own start, all else is the file's."""
    setting = "nedr.airlight=max" if before == "max" else f"nedr.airlight_head={before}"
    old, new = tiny(*D4, setting), tiny(*D4, "nedr.airlight_head=statistics")
    with torch.no_grad():
        old.removal.head.conv3.bias.fill_(0.7)
    metadata = {"model": "nedr", "settings": config.to_dict(tiny_settings(*D4, setting))}
    checkpoint.save_weights(tmp_path / "old.safetensors", old.inference_state(), metadata)
    torch.manual_seed(3)
    models.start(new, tmp_path / "old.safetensors")
    assert new.removal.head.conv3.bias == 0.7
    assert len(new.removal.airlight.layers) == 3


def test_heads_are_named():
    assert RemovalNet(4, kan_cid=False, idrm=False, drem=False).airlight is None
    for name, kind in (("pooled", airlight.PooledAirlight), ("statistics", airlight.StatisticsAirlight)):
        assert isinstance(RemovalNet(4, kan_cid=False, idrm=False, drem=False, airlight_head=name).airlight, kind)


def test_the_head_can_predict_dim_airlights():
    head = airlight.StatisticsAirlight((0.25, 1.15))
    with torch.no_grad():
        head.layers[-1].weight.zero_()
        head.layers[-1].bias.fill_(-20)
    torch.testing.assert_close(head(torch.rand(1, 2), *scene(1, 0.9)), torch.full((1, 3, 1, 1), 0.25))


def test_airlight_from_t_of_another_size():
    """With nedr.query, t is finer than the image: A is that of t at the image's size."""
    torch.manual_seed(0)
    head = airlight.create("statistics", 0, (0.5, 1.15)).eval()
    hazy, t = torch.rand(2, 3, 48, 64), F.interpolate(torch.rand(2, 1, 6, 8), (48, 64), mode="bilinear")
    fine = F.interpolate(t, (96, 128), mode="bilinear")
    torch.testing.assert_close(head(None, hazy, fine), head(None, hazy, t), atol=0.01, rtol=0)
