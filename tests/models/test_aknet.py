"""AKNet: the numbers of the released code from weights made by a rule (tests/golden), its training and its files."""

import json
import re

import numpy as np
import pytest
import torch
from helpers import GOLDEN, _fill, picture

import models
from models import cost
from models.aknet import AKNet
from models.aknet.fusion import hamming
from utils import config, foreign
from utils.errors import UserError

KEYS = json.loads((GOLDEN / "aknet_keys.json").read_text())
DEAD = re.compile(r"feat_extract\.[34]\.|bottelneck\.fgm\.conv\.")


def values(*overrides: str) -> config.Settings:
    return config.load("aknet", models.settings_types(), overrides=overrides)


def released(scale: float = 0.5) -> dict[str, torch.Tensor]:
    """The released state dict by the rule of tests/golden/fill.py."""
    state = {}
    for key, shape in KEYS.items():
        norm = len(shape) == 1 and key.endswith(".weight")
        filled = hamming(shape[-1]).numpy()[None, None] if "hamming" in key else _fill.fill(key, shape, norm, scale)
        state[key] = torch.from_numpy(filled)
    return state


def imported(state: dict, *overrides: str) -> AKNet:
    return AKNet.from_official(state, values(*overrides).method).eval()


def arrays(name: str) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file}


def drawn(seed: int, *shape: int) -> torch.Tensor:
    """Random numbers as the golden outputs have them: drawn in double precision, unlike `picture`."""
    return torch.from_numpy(np.random.default_rng(seed).random(shape)).float()


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """Shared: copy before changing."""
    return released()


@pytest.fixture(scope="module")
def method(state) -> AKNet:
    return imported(state)


# Numbers.


def assert_near(actual: torch.Tensor, expected: torch.Tensor, scale: float) -> None:
    tolerance = 1e-5 if scale < 1 else 1e-4 * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize(("name", "scale"), [("aknet", 0.5), ("aknet_s1", 1.0)])
def test_outputs(name, scale):
    golden, network = arrays(name), imported(released(scale)).network
    for border, prefix in {"zero": "zeropad_", "reflect": ""}.items():
        for k, output in enumerate(network(golden["input"], border)):
            assert_near(output, golden[f"{prefix}output_{k}"], scale)


@torch.no_grad()
def test_a_larger_image(method):
    output = method.network(drawn(7, 1, 3, 256, 256), "reflect")[-1]
    assert_near(output[..., ::4, ::4], arrays("aknet")["big_output_2_stride4"], 0.5)


def test_one_training_step(state):
    expected = json.loads((GOLDEN / "aknet_train.json").read_text())
    method = imported(state, "aknet.border=reflect")
    batch = {"hazy": arrays("aknet")["input"], "clear": drawn(8, 1, 3, 64, 96)}
    (loss,) = method.losses(batch, "train")
    loss.value.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in method.parameters()])
    assert loss.optimiser == "network"
    assert loss.terms["content"].item() == pytest.approx(expected["loss_content"], rel=1e-3)
    assert loss.terms["frequency"].item() == pytest.approx(expected["loss_fft"], rel=1e-3)
    assert loss.value.item() == pytest.approx(expected["loss"], rel=1e-3)
    assert norm.item() == pytest.approx(expected["grad_norm_before_clip"], rel=1e-3)


def test_published_size(method):
    """4,484,141 parameters as released, less 459,104 that its forward pass never uses."""
    assert cost.parameters(method, method.inference) == 4_484_141 - 459_104


# Training.


def batch(size: int = 16) -> dict[str, torch.Tensor]:
    clear = picture(1, 2, 3, size, size)
    return {"hazy": clear * 0.5 + 0.4, "clear": clear}


def narrow(*overrides: str) -> AKNet:
    return models.build(values("aknet.width=8", *overrides))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_every_parameter_gets_a_gradient(precision):
    """The gate of the frequencies begins shut and must be able to open."""
    method = narrow().train()
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        (loss,) = method.losses(batch(), "train")
    loss.value.backward()
    gradients = {name: p.grad for name, p in method.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    assert gradients["network.bottleneck.fgm.alpha"].any()


def test_half_precision_is_close_to_float32():
    method, hazy = narrow().eval(), picture(2, 1, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        half = method.dehaze(hazy)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, method.dehaze(hazy), rtol=0, atol=0.03)


def test_training_lowers_the_loss():
    method, data = narrow("aknet.learning_rate=1e-3").train(), batch()
    optimiser, losses = method.optimisers("train", values())["network"], []
    for _ in range(8):
        (loss,) = method.losses(data, "train")
        optimiser.zero_grad()
        loss.value.backward()
        optimiser.step()
        losses.append(loss.value.item())
    assert losses[-1] < 0.8 * losses[0]


def test_released_start():
    """PyTorch's own but for the fusion: its kernels begin as bare Hamming windows, and the frequency gate shut."""
    network = narrow().network
    assert not network.bottleneck.fgm.alpha.any()
    assert network.bottleneck.fgm.beta.eq(1).all()
    for fusion, width in zip(network.fusion, (8, 16), strict=True):
        low, high = fusion.kernels(torch.rand(1, width, 8, 8), torch.rand(1, 2 * width, 4, 4), "zero")
        for kernels, side in ((low, 5), (high, 3)):
            window = hamming(side).flatten()
            torch.testing.assert_close(kernels[0, :, 3, 4], window / window.sum(), rtol=0.05, atol=0)
        limit = (6 / (width + width // 2)) ** 0.5
        assert 0.8 * limit < fusion.compress_fine.weight.abs().max() <= limit
        assert not any(conv.bias.any() for conv in (fusion.compress_fine, fusion.compress_coarse, fusion.low))


def test_settings_of_the_optimiser():
    method = narrow("aknet.learning_rate=3e-4", "aknet.betas=[0.8, 0.9]")
    (group,) = method.optimisers("train", values())["network"].param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (3e-4, (0.8, 0.9), 1e-8, 0)


def test_a_weight_of_zero_disables_the_loss():
    with_it, without = (next(narrow(f"aknet.frequency_weight={w}").losses(batch(), "train")) for w in (0.1, 0))
    assert set(with_it.terms) == {"content", "frequency"}
    assert set(without.terms) == {"content"}


def test_sample_images_for_the_log():
    data = batch()
    shown = narrow().eval().sample_images(data)
    assert list(shown) == ["hazy", "dehazed", "clear"]
    assert 0 <= shown["dehazed"].min() <= shown["dehazed"].max() <= 1
    assert not shown["dehazed"].requires_grad


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("aknet.width=10", "multiple of 4"),
        ("aknet.width=4", "at least 8"),
        ("aknet.border=wrap", "zero, reflect"),
        ("aknet.betas=[0.9, 1]", r"aknet\.betas"),
    ],
)
def test_refused_settings(override, message):
    with pytest.raises(UserError, match=message):
        values(override)


def test_refused_crops():
    with pytest.raises(UserError, match=r"data\.crop_size=130: aknet needs a multiple of 4"):
        models.check_training(values("data.crop_size=130"))


def test_the_border_may_change_after_training(method):
    hazy = picture(3, 1, 3, 37, 41)
    zero = method.dehaze(hazy)
    models.change(method, {"border": "reflect"})
    reflect = method.dehaze(hazy)
    models.change(method, {"border": "zero"})
    assert not torch.equal(zero, reflect)
    assert torch.equal(zero, method.dehaze(hazy))
    with pytest.raises(UserError, match="'width' of aknet cannot change"):
        models.change(method, {"width": 16})


# Released files.


def test_an_official_file_round_trips(state, method):
    again = foreign.find(method.to_official(), AKNet.recognises)
    assert {key: list(value.shape) for key, value in again.items()} == KEYS
    for key, value in again.items():
        assert torch.equal(value, torch.zeros_like(value) if DEAD.match(key) else state[key]), key
    assert method.skipped == [key for key in KEYS if DEAD.match(key)]
    twice = imported(again)
    assert all(torch.equal(a, b) for a, b in zip(method.parameters(), twice.parameters(), strict=True))


def test_dead_tensors_and_constants_may_be_absent(state, method):
    lean = {key: value for key, value in state.items() if not DEAD.match(key) and "hamming" not in key}
    assert all(torch.equal(a, b) for a, b in zip(method.parameters(), imported(lean).parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("ff2.content_encoder.bias"), r"1 missing \(fusion\.0\.low\.bias\)"),
        (lambda s: s.update({"Encoder.3.bias": torch.ones(1)}), r"1 unknown \(Encoder\.3\.bias\)"),
        (lambda s: s.update({"bottelneck.conv.bias": torch.ones(1)}), r"1 of another shape \(bottleneck\.spatial_gate"),
        (lambda s: s.update({"ff1.hamming_lowpass": torch.ones(1, 1, 5, 5)}), "not the Hamming window of 5x5"),
        (lambda s: s.update({"ff1.hamming_lowpass": torch.ones(7)}), "not the Hamming window of 5x5"),
    ],
)
def test_files_that_do_not_fit(state, change, message):
    state = dict(state)
    change(state)
    with pytest.raises(UserError, match=message) as caught:
        imported(state)
    assert len(str(caught.value)) < 200


def test_files_of_other_methods_are_not_recognised():
    assert AKNet.from_official({"net_h2c": {}, "conv.weight": torch.ones(1)}, values().method) is None


def test_released_code_has_one_width():
    with pytest.raises(UserError, match=r"aknet\.width=8: the released network is 32 wide"):
        narrow().to_official()
