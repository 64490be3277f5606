"""Official state dicts of NeDR and D4, read and written: one table of names, and the list of unused tensors."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from models.nedr.kan import knots
from utils.errors import UserError

NETWORKS = {
    "net_h2c": "removal",
    "drem": "removal",  # an entry of this project: the released code creates DREM in every pass and never saves it
    "net_c2h": "production",
    "net_depth": "depth",
    "discriminator_h2c": "discriminator_clear",
    "discriminator_c2h": "discriminator_hazy",
}

# Official name of a module -> its name here.
PYRAMID = {
    "pretrained.layer1.0": "pyramid.encoder.conv_stem",
    "pretrained.layer1.1": "pyramid.encoder.bn1",
    "pretrained.layer1.3": "pyramid.encoder.blocks.0",
    "pretrained.layer1.4": "pyramid.encoder.blocks.1",
    "pretrained.layer2.0": "pyramid.encoder.blocks.2",
    "pretrained.layer3.0": "pyramid.encoder.blocks.3",
    "pretrained.layer3.1": "pyramid.encoder.blocks.4",
    "pretrained.layer4.0": "pyramid.encoder.blocks.5",
    "pretrained.layer4.1": "pyramid.encoder.blocks.6",
    **{f"scratch.layer{k + 1}_rn.1": f"pyramid.reduce.{k}" for k in range(4)},
    **{f"scratch.refinenet{k + 1}.resConfUnit1": f"pyramid.fusion.{k}.skip" for k in range(3)},
    **{f"scratch.refinenet{k + 1}.resConfUnit2": f"pyramid.fusion.{k}.refine" for k in range(4)},
    **{f"scratch.refinenet{k + 1}.out_conv": f"pyramid.fusion.{k}.project" for k in range(4)},
    "scratch.output_conv.1": "head.conv1",
    "scratch.output_conv.4": "head.conv2",
    "scratch.output_conv.6": "head.conv3",
}
REMOVAL = {
    **PYRAMID,
    "final_conv_beta_1.0": "density.0",
    "final_conv_beta_2.0": "density.1",
    **{f"nrn.imnet.layers.{2 * k}": f"idrm.layers.{k}" for k in range(4)},
}
DREM = {
    "conv1": "drem.lift",
    **{f"RDB_{k}.0.layers.{n}.conv": f"drem.block{k}.layers.{n}" for k in (1, 2) for n in range(3)},
    **{f"RDB_{k}.0.lff": f"drem.block{k}.fuse" for k in (1, 2)},
    "conv_block2.0": "drem.merge",
    "conv2": "drem.lower",
}
PRODUCTION = {
    **{f"enc_conv{k}.1": f"encode.{k}.conv" for k in range(4)},
    **{f"enc_conv{k}.2": f"encode.{k}.norm" for k in range(1, 4)},
    **{f"bottleneck{k + 1}.res.{4 * n + 1}": f"residual.{k}.{n}.conv" for k in range(4) for n in range(2)},
    **{f"bottleneck{k + 1}.res.{4 * n + 2}": f"residual.{k}.{n}.norm" for k in range(4) for n in range(2)},
    "dec_conv1.1": "decode.0.conv",
    "dec_conv1.2": "decode.0.norm",
    "dec_conv2.1": "decode.1.conv",
    "dec_conv_last.1": "decode.2.conv",
    "dec_conv_last_2.1": "decode.3.conv",
}
DISCRIMINATOR = {f"conv{k + 1}.0": f"convs.{k}" for k in range(5)}
TABLES = {
    "net_h2c": REMOVAL,
    "drem": DREM,
    "net_c2h": PRODUCTION,
    "net_depth": PYRAMID,
    "discriminator_h2c": DISCRIMINATOR,
    "discriminator_c2h": DISCRIMINATOR,
}


TOLERANCE = 0.01  # for values up to 2.2 from a file in half precision; other grids differ by more


@dataclass
class Official:
    """The contents of an official file, in this project's names."""

    networks: dict[str, dict[str, Tensor]]
    features: int
    modules: dict[str, bool]  # kan_cid, idrm, drem
    has_drem: bool
    skipped: list[str] = field(default_factory=list)


def recognise(state: Mapping) -> str | None:
    """``nedr`` or ``d4``, the method whose official file ``state`` looks like (all networks, or the removal one)."""
    keys = _flatten(state)
    has_networks = any(str(key).split(".")[0] == "net_h2c" for key in state)
    if not has_networks and not any(key.startswith("net_h2c.scratch.layer1_rn.") for key in keys):
        return None
    return "nedr" if any(key.startswith(("net_h2c.cid_", "net_h2c.nrn.", "drem.")) for key in keys) else "d4"


def translate(state: Mapping) -> Official:
    """Rename an official state dict. Raises `UserError` for unknown tensors."""
    official = _split(state)
    removal = official.get("net_h2c", {})
    first = removal.get("scratch.layer1_rn.1.weight")
    if first is None or first.dim() != 4:
        raise UserError(
            "the official file's net_h2c has no convolution 'scratch.layer1_rn.1'; it is incomplete or foreign"
        )
    features = first.shape[0]
    networks: dict[str, dict[str, Tensor]] = {}
    skipped: list[str] = []
    for name, weights in official.items():
        ours = networks.setdefault(NETWORKS[name], {})
        names = _names(name, features)
        unused = _unused(name, features)
        for key, value in weights.items():
            if key in unused:
                skipped.append(f"{name}.{key}")
            elif key.endswith(".grid"):
                _check_grid(f"{name}.{key}", value)
            else:
                ours[_rename(key, names) or key] = value
    for key in [key for key in networks["removal"] if key.startswith("density.") and key.endswith("weight")]:
        weight = networks["removal"][key]  # a 1x1 convolution on 1x1 maps
        networks["removal"][key] = weight.flatten(1) if weight.dim() == 4 else weight
    modules = {
        "kan_cid": any(k.startswith("cid_") for k in removal),
        "idrm": any(k.startswith("nrn.") for k in removal),
    }
    has_drem = "drem" in official
    modules["drem"] = has_drem or any(modules.values())
    return Official(networks, features, modules, has_drem, skipped)


def export(networks: Mapping[str, Mapping[str, Tensor]], features: int) -> dict[str, dict[str, Tensor]]:
    """The reverse of `translate`: state dicts by official names, with all tensors of the released networks.

    ``networks`` are state dicts by this project's names; tensors that the released networks lack are left out, unused
    ones are zeros. At other widths than the released ``features`` 32 the shapes of the unused ``mcc`` are guessed.
    """
    official = {}
    for name, network in NETWORKS.items():
        names = {ours: theirs for theirs, ours in _names(name, features).items()}
        renamed = ((_rename(key, names), value.cpu()) for key, value in networks.get(network, {}).items())
        weights = {key: value for key, value in renamed if key}
        if not weights or (name == "drem" and not (weights["conv2.weight"].any() or weights["conv2.bias"].any())):
            continue  # nothing, or the DREM that stands for one which the imported file did not hold
        for key in [key for key in weights if key.startswith("final_conv_beta_") and key.endswith("weight")]:
            weights[key] = weights[key][..., None, None]
        modular = any(key.startswith("cid_") for key in weights)
        for key, shape in _unused(name, features).items():
            if modular or not key.startswith(("cid_", "mcc.")):
                weights[key] = torch.zeros(shape)
        for key, width in _grids(features).items() if modular else ():
            weights[key] = knots().repeat(width, 1)
        official[name] = weights
    return official


def _split(state: Mapping) -> dict[str, dict[str, Tensor]]:
    """Official network name -> its flat state dict."""
    networks: dict[str, dict[str, Tensor]] = {}
    for key, value in _flatten(state).items():
        if not isinstance(value, Tensor):
            raise UserError(f"the official file's '{key}' is not a tensor; it is of another format")
        name, _, rest = key.partition(".")
        if name not in NETWORKS:
            raise UserError(f"the official file holds '{key}', which belongs to no network of NeDR or D4")
        networks.setdefault(name, {})[rest] = value
    return networks


def _flatten(state: Mapping) -> dict[str, Any]:
    """``network.key`` -> its value, with drem as a network of its own; scalars beside the networks are left out."""
    flat: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{inner}": tensor for inner, tensor in value.items()}
        elif "." in str(key) or (isinstance(value, Tensor) and value.dim() > 0):
            flat[str(key)] = value
    if not any(key.startswith("net_h2c.") for key in flat):
        flat = {key if key.startswith("drem.") else f"net_h2c.{key}": value for key, value in flat.items()}
    return {key.replace("net_h2c.drem.", "drem."): value for key, value in flat.items()}


def _names(name: str, features: int) -> dict[str, str]:
    """Official names of a network's modules -> their names here; the official KAN-CIDs are named by width."""
    mixers = {}
    for k, width in enumerate(_widths(features) if name == "net_h2c" else ()):
        mixers[f"cid_{width}.channel_independent.dconv"] = f"pyramid.mixers.{k}.spatial"
        mixers |= {f"cid_{width}.channel_dependent.{fc}": f"pyramid.mixers.{k}.{fc}" for fc in ("fc1", "fc2")}
    return TABLES[name] | mixers


def _rename(key: str, names: Mapping[str, str]) -> str | None:
    """``key`` with the name of its module replaced; None if ``names`` does not hold the module."""
    module = next((module for module in names if key.startswith(f"{module}.")), None)
    return module and names[module] + key.removeprefix(module)


def _widths(features: int) -> list[int]:
    return [features * 2**k for k in range(4)]


def _grids(features: int) -> dict[str, int]:
    """The spline grids that official files repeat for every input: key -> number of inputs."""
    return {f"cid_{w}.channel_dependent.{fc}.grid": w for w in _widths(features) for fc in ("fc1", "fc2")}


def _unused(name: str, features: int) -> dict[str, tuple[int, ...]]:
    """Key -> shape of the tensors that the released code creates and saves and its forward pass never uses."""
    if name == "drem":
        return dict(_layers({f"RDB_{k}.0.conv1": (64, 3, 5, 5) for k in (1, 2)}))
    if name not in ("net_h2c", "net_depth"):
        return {}
    wide = 8 * features
    unit = {f"scratch.refinenet4.resConfUnit1.conv{k}": (wide, wide, 3, 3) for k in (1, 2)}
    if name == "net_depth":
        return dict(_layers(unit))
    linear = {f"cid_{w}.channel_dependent.{fc}": (w, w) for w in _widths(features) for fc in ("fc1", "fc2")}
    return dict(_layers(unit | linear)) | _colour_block(features)


def _layers(weights: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Keys and shapes of layers with these weights, each followed by its bias."""
    for layer, shape in weights.items():
        yield f"{layer}.weight", shape
        yield f"{layer}.bias", shape[:1]


def _colour_block(f: int) -> dict[str, tuple[int, ...]]:
    """The released NeDR's ``mcc``: created for ``f`` channels, saved, never called."""
    squeezed = max(1, f // 16)
    unbiased = {
        "pwconv": (3 * f, f, 1, 1),
        "dwconv": (3 * f, 1, 3, 3),
        "project_out": (f, f, 1, 1),
        "feedforward.0": (f, f, 1, 1),
        "feedforward.2": (f, 1, 3, 3),
        "dehaze_layers.0": (f, f, 3, 3),
        "dehaze_layers.2": (f, f, 3, 3),
        "channel_attention.fc1": (squeezed, f, 1, 1),
        "channel_attention.fc2": (f, squeezed, 1, 1),
        "channel_adjust": (f, 3 * f, 1, 1),
    }
    biased = {
        "norm": (f,),
        "color_space_detector.conv1": (64, f, 3, 3),
        "color_space_detector.conv2": (128, 64, 3, 3),
        "color_space_detector.conv3": (256, 128, 3, 3),
        "color_space_detector.fc": (3, 256),
        "hvi_to_rgb_model.conv1": (64, f, 3, 3),
        "hvi_to_rgb_model.conv2": (f, 64, 3, 3),
        "ycbcr_to_rgb_model.conv1": (64, f, 3, 3),
        "ycbcr_to_rgb_model.conv2": (f, 64, 3, 3),
    }
    shapes = {"temperature": (8, 1, 1)} | {f"{layer}.weight": shape for layer, shape in unbiased.items()}
    return {f"mcc.{key}": shape for key, shape in (shapes | dict(_layers(biased))).items()}


def _check_grid(key: str, grid: Tensor) -> None:
    fits = grid.dim() == 2 and grid.shape[1] == len(knots())
    if not (fits and torch.allclose(grid.float(), knots(), atol=TOLERANCE)):
        raise UserError(f"the official file's '{key}' is not the uniform grid on [-1,1] with 5 intervals")
