"""KA-Net's parts against plain forms of them, images of any size, and official files that are refused."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from helpers import picture
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import DropPath
from torch import nn

import models
from models.kanet import official
from models.kanet.network import Attention, KANetwork, QueryAttention, initialise
from models.kanet.removal import RandomFourierFeatures
from utils import config
from utils.errors import UserError


def tiny(*overrides: str) -> models.Method:
    values = config.load("kanet", models.settings_types(), overrides=["kanet.width=8", *overrides])
    return models.build(values)


@pytest.fixture(scope="module")
def method() -> models.Method:
    torch.manual_seed(0)
    return tiny().eval()


# The parts, against plain forms of them.


def plain_attention(query, key, value, heads: int):
    """Head by head."""
    found = []
    for q, k, v in zip(*(x.chunk(heads, -1) for x in (query, key, value)), strict=True):
        found.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v)
    return torch.cat(found, -1)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12))
def test_queries_are_resampled_before_attention(height, width):
    """As released: the queries are stretched first, to fewer or to more than there are, and then look."""
    module, x = QueryAttention(16, 8), torch.randn(2, height, width, 16)
    tokens = x.flatten(1, 2)
    queries = module.query(module.queries).expand(2, -1, -1)
    queries = F.interpolate(queries.mT, size=height * width).mT
    expected = module.project(plain_attention(queries, *module.key_value(tokens).chunk(2, -1), 8))
    torch.testing.assert_close(module(x), expected.view_as(x), rtol=1e-5, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(4, 12), st.integers(4, 12), st.sampled_from([1, 2, 4]))
def test_attention_to_a_coarse_map(height, width, reduction):
    module, x = Attention(8, 2, reduction), torch.randn(2, height, width, 8)
    seen = x.flatten(1, 2)
    if reduction > 1:  # cell by cell; what does not fill a last cell is not seen
        rows, columns = height // reduction, width // reduction
        cells = x[:, : rows * reduction, : columns * reduction].unflatten(2, (columns, -1)).unflatten(1, (rows, -1))
        seen = torch.einsum("nrickd,odik->nrco", cells, module.reduce.weight) + module.reduce.bias
        seen = module.norm(seen).flatten(1, 2)
    query = module.query(x.flatten(1, 2))
    expected = module.project(plain_attention(query, *module.key_value(seen).chunk(2, -1), 2))
    torch.testing.assert_close(module(x), expected.view_as(x), rtol=1e-5, atol=1e-6)


def test_random_features():
    module, p = RandomFourierFeatures(3, 5), torch.randn(2, 3, 4, 6)
    angles = p.permute(0, 2, 3, 1) @ module.weight.mT + module.bias
    expected = (2 / 5) ** 0.5 * angles.cos().permute(0, 3, 1, 2)
    torch.testing.assert_close(module(p), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(module(p), expected)
    assert not list(module.parameters())
    assert set(module.state_dict()) == {"weight", "bias"}


def test_random_features_are_the_same_in_every_network():
    state = torch.get_rng_state()
    one, other = RandomFourierFeatures(8, 64), RandomFourierFeatures(8, 64)
    assert torch.equal(one.weight, other.weight)
    assert torch.equal(one.bias, other.bias)
    assert torch.equal(torch.get_rng_state(), state)
    assert 0 <= one.bias.min() < 1
    assert 5 < one.bias.max() <= 2 * torch.pi


@torch.no_grad()
def test_only_resampled_features_are_random(method):
    x = picture(1, 1, 3, 64, 64)
    state = torch.get_rng_state()
    fixed = method.dehaze(x)
    assert torch.equal(method.dehaze(x), fixed)
    assert torch.equal(torch.get_rng_state(), state)
    models.change(method, {"random_features": "resampled"})
    resampled = method.dehaze(x)
    assert not torch.equal(method.dehaze(x), resampled)
    torch.set_rng_state(state)
    assert torch.equal(method.dehaze(x), resampled)
    models.change(method, {"random_features": "fixed"})
    assert torch.equal(method.dehaze(x), fixed)


def test_initial_weights():
    network = KANetwork(8)
    with torch.no_grad():
        for p in network.parameters():
            p.fill_(3)
    initialise(network.requires_grad_(False))
    block = network.encoder.stages[3].blocks[0]
    assert block.mlp.expand.weight.std() == pytest.approx(0.02, rel=0.1)
    assert block.mlp.depthwise.weight.std() == pytest.approx((2 / 9) ** 0.5, rel=0.1)
    assert network.encoder.embed[3].conv.weight.std() == pytest.approx((2 / 9 / 64) ** 0.5, rel=0.1)
    for module in (*network.encoder.modules(), *network.decoder.modules()):
        if isinstance(module, nn.Linear | nn.Conv2d):
            assert not module.bias.any()


def test_drop_path_rises_block_by_block():
    network = KANetwork(8)
    rates = {
        part: [module.drop_prob for module in modules.modules() if isinstance(module, DropPath)]
        for part, modules in (
            ("main", network.encoder.stages),
            ("side", network.encoder.side_stages),
            ("decoder", network.decoder),
        )
    }
    assert rates["main"] == pytest.approx([k / 70 for k in range(8)])
    assert rates["side"] == pytest.approx([0, 2 / 70, 4 / 70])
    assert rates["decoder"] == pytest.approx([0, 1 / 150, 2 / 150])


# Images and settings.


@torch.no_grad()
@settings(max_examples=8, deadline=None)
@given(st.integers(3, 9), st.integers(3, 9))
def test_the_network_takes_multiples_of_16(method, rows, columns):
    clear, z = method.network(torch.rand(2, 3, 16 * rows, 16 * columns))
    assert clear.shape == (2, 3, 16 * rows, 16 * columns)
    assert z.shape == (2, 64)


@pytest.mark.parametrize("size", [(1, 1), (65, 40), (100, 131)])
def test_dehaze_takes_any_size(method, size):
    clear = method.dehaze(picture(2, 1, 3, *size))
    assert clear.shape == (1, 3, *size)
    assert 0 <= clear.min() <= clear.max() <= 1
    assert not clear.requires_grad


def test_dehaze_pads_by_reflection(method):
    x = picture(3, 1, 3, 50, 64)
    padded = torch.cat([x, x[:, :, -15:-1].flip(2)], 2)
    assert torch.equal(method.dehaze(x), method.dehaze(padded)[:, :, :50])


@pytest.mark.parametrize("width", [4, 12, 0])
def test_unsuitable_widths_are_refused(width):
    with pytest.raises(UserError, match=r"kanet\.width=.*(multiple of 8 \(64|at least 1)"):
        tiny(f"kanet.width={width}")


@pytest.mark.parametrize(("size", "good"), [(48, True), (64, True), (80, True), (32, False), (100, False)])
def test_crop_sizes_are_checked(size, good):
    values = config.load("kanet", models.settings_types(), overrides=[f"data.crop_size={size}"])
    if good:
        models.check_training(values)
    else:
        with pytest.raises(UserError, match=f"data.crop_size={size}: kanet needs a multiple of 16, at least 48"):
            models.check_training(values)


# Official files, narrow ones, so that tests are quick.


@pytest.fixture
def state(method) -> dict[str, torch.Tensor]:
    weights = method.network.state_dict()
    state = {theirs: weights[own] for own, theirs in official.names(weights).items()}
    return state | {"convtail.conv_output.conv2d.bias": torch.zeros(3)}


def test_an_official_file(method, state, tmp_path):
    torch.save({"epoch": 2, "model": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "ka.pk")
    loaded = models.load(tmp_path / "ka.pk", random_features="resampled")
    assert models.name_of(loaded) == "kanet"
    assert loaded.settings.width == 8
    assert loaded.skipped == ["convtail.conv_output.conv2d.bias"]
    models.change(loaded, {"random_features": "fixed"})
    x = picture(4, 1, 3, 64, 64)
    assert torch.equal(loaded.dehaze(x), method.dehaze(x))


def test_official_names_map_one_to_one(method):
    names = official.names(method.network.state_dict())
    assert len(set(names.values())) == len(names) == 475
    assert not set(names.values()) & set(names)


FIRST = "Tencoder.patch_embed1.proj.weight"
REFUSED = {
    "missing": ({"block.conv1.bias": None}, r"1 missing \(removal\.first\.bias\)"),
    "extra": ({"block.conv3.bias": torch.zeros(3)}, r"1 unknown \(block\.conv3\.bias\)"),
    "shape": ({"clean.conv2d.bias": torch.zeros(4)}, r"1 of another shape \(last\.bias\)"),
    "first": ({FIRST: None}, "incomplete or foreign"),
    "first's shape": ({FIRST: torch.zeros(8)}, "incomplete or foreign"),
    "width": ({FIRST: torch.zeros(16, 3, 7, 7)}, "of another shape"),
    "odd width": ({FIRST: torch.zeros(12, 3, 7, 7)}, r"kanet\.width=12"),
    "number": ({"clean.conv2d.bias": 3}, r"1 not tensors \(last\.bias\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_official_files(method, state, case):
    changes, message = REFUSED[case]
    changed = {key: value for key, value in (state | changes).items() if value is not None}
    with pytest.raises(UserError, match=message) as error:
        models.METHODS["kanet"].from_official(changed, dataclasses.replace(method.settings))
    assert len(str(error.value)) < 400


def test_another_width_is_not_exported(method):
    with pytest.raises(UserError, match=r"kanet\.width=8: the released network is 64 wide"):
        method.to_official()
