"""NeDR and D4 written as official files: every key and shape of the released networks, and back without a change."""

import re
import warnings

import pytest
import torch
from helpers import D4, picture, tiny

import models
from models.nedr import official
from utils import config, foreign
from utils.errors import UserError

SIZES = ("nedr.encoder=tf_efficientnet_lite3", "nedr.idrm_hidden=256", "nedr.drem_growth=64")
RELEASED = (*SIZES, "nedr.variant=released", "nedr.airlight=max")
NETWORKS = ("net_h2c", "net_c2h", "net_depth", "discriminator_h2c", "discriminator_c2h")
DEAD = re.compile(
    r"mcc\.|scratch\.refinenet4\.resConfUnit1\.|cid_\d+\.channel_dependent\.fc\d\.(weight|bias)$|.*\.0\.conv1\."
)
MODULES = re.compile(r"cid_|nrn\.|mcc\.")


def exported(method: models.Method) -> dict:
    with warnings.catch_warnings(action="ignore"):
        return method.to_official()


def imported(state: dict) -> models.Method:
    """The method that an official file of this content gives."""
    weights = foreign.find(state, official.recognise)
    methods = (models.METHODS[name].from_official(weights, settings(name)) for name in ("nedr", "d4"))
    with warnings.catch_warnings(action="ignore"):
        return next(filter(None, methods)).eval()


def settings(name: str):
    return config.load(name, models.settings_types()).method


def shapes(state: dict) -> dict[str, dict[str, list[int]]]:
    return {name: {key: list(value.shape) for key, value in weights.items()} for name, weights in state.items()}


def assert_same(one: dict, other: dict) -> None:
    """Bit by bit, but for dead weight, which the export makes zero."""
    for name, weights in other.items():
        for key, value in weights.items():
            expected = torch.zeros_like(value) if DEAD.match(key) else value
            assert one[name][key].dtype == expected.dtype
            if key.endswith(".grid"):  # both are -2.2 ... 2.2, by other roundings
                torch.testing.assert_close(one[name][key], expected, rtol=0, atol=1e-6)
            else:
                assert torch.equal(one[name][key], expected), f"{name}.{key}"


def without_modules(state: dict) -> dict:
    kept = {key: value for key, value in state["net_h2c"].items() if not MODULES.match(key)}
    return {name: state[name] for name in NETWORKS} | {"net_h2c": kept}


def test_an_official_file_is_written_as_it_was_read(official_state, official_keys):
    found = exported(imported(official_state))
    expected = official_keys | dict.fromkeys(("discriminator_h2c", "discriminator_c2h"), official_keys["discriminator"])
    assert shapes(found) == {name: expected[name] for name in (*NETWORKS, "drem")}
    assert_same(found, official_state)


def test_a_bare_removal_network_without_drem(official_state):
    """As the released code saves it; the module that stands for DREM is the identity, and is not written."""
    found = exported(imported(official_state["net_h2c"]))
    assert shapes(found) == shapes({"net_h2c": official_state["net_h2c"]})


def test_d4(official_state):
    d4 = without_modules(official_state)
    method = imported(d4)
    found = method.to_official()  # without a warning: nothing is lost
    assert models.name_of(method) == "d4"
    assert shapes(found) == shapes(d4)
    assert_same(found, d4)


OURS = {
    "nedr": ((), {*NETWORKS, "drem"}, 8),
    "without drem": (("nedr.drem=false",), {*NETWORKS}, 8),
    "d4": (D4, {*NETWORKS}, 24),
}


@pytest.mark.parametrize("case", OURS)
def test_ours_comes_back_the_same(case):
    modules, entries, width = OURS[case]
    method = tiny(*RELEASED, *modules, f"nedr.base_channels={width}").eval()
    found = exported(method)
    again = imported(found)
    own, theirs = method.state_dict(), again.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in own.items())
    assert all(key.startswith("removal.drem.") for key in theirs.keys() - own.keys())
    assert again.settings.base_channels == width
    assert set(found) == entries
    assert_dead_shapes(found)
    hazy = picture(3, 1, 3, 128, 160)
    assert torch.equal(method.dehaze(hazy), again.dehaze(hazy))


def assert_dead_shapes(state: dict) -> None:
    """Dead layers have the shapes of the living ones beside them, at any width."""
    for weights in state["net_h2c"], state["net_depth"]:
        for key in weights:
            if "refinenet4.resConfUnit1" in key:
                assert weights[key].shape == weights[key.replace("Unit1", "Unit2")].shape
            elif key.endswith("base_weight"):
                assert weights[key].shape == weights[key.replace("base_weight", "weight")].shape
                assert weights[key].shape[:1] == weights[key.replace("base_weight", "bias")].shape
                assert weights[key].shape[1] == len(weights[key.replace("base_weight", "grid")])


def test_losses_of_the_export_are_reported():
    with pytest.warns(UserWarning, match="never reads DREM"):
        tiny(*RELEASED).to_official()
    with pytest.warns(UserWarning, match="airlight head is left out"):
        found = tiny(*SIZES, *D4).to_official()
    assert not [key for key in found["net_h2c"] if "airlight" in key]


REFUSED = {
    "positions": (SIZES, r"nedr\.variant=published: .*train with nedr\.variant=released"),
    "kan_cid": ((*RELEASED, "nedr.kan_cid=false"), r"kan_cid=false, idrm=true, drem=true: the released code has NeDR"),
    "idrm": ((*RELEASED, "nedr.idrm=false"), "kan_cid=true, idrm=false"),
    "encoder": ((*D4, "nedr.encoder=resnet18"), r"nedr\.encoder=resnet18: the released code has tf_efficientnet_lite3"),
    "smaller IDRM": ((*RELEASED, "nedr.idrm_hidden=64"), r"nedr\.idrm_hidden=64: the released code has 256 alone"),
    "smaller DREM": ((*RELEASED, "nedr.drem_growth=16"), r"nedr\.drem_growth=16: the released code has 64 alone"),
    "transmission": (
        (*SIZES, *D4, "nedr.transmission_range=[0.05, 1]"),
        r"the released code has \(0\.05, 0\.95\) alone",
    ),
    "drem alone": ((*RELEASED, *D4, "nedr.drem=true"), "kan_cid=false, idrm=false, drem=true"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_released_networks_cannot_hold_is_refused(case):
    overrides, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        tiny(*overrides).to_official()


def test_official_names_map_one_to_one():
    """No two modules share a name, and no name is the beginning of another, on either side."""
    for network in official.TABLES:
        names = official._names(network, 32)
        for side in (list(names), list(names.values())):
            assert len(set(side)) == len(side)
            assert not [(a, b) for a in side for b in side if b.startswith(f"{a}.")]
