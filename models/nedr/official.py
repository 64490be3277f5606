"""Official state dicts of NeDR and D4: recognised by their keys, renamed, dead weight counted, the rest refused."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.nedr.kan import knots
from utils.errors import UserError

NETWORKS = {
    "net_h2c": "removal",
    "net_c2h": "production",
    "net_depth": "depth",
    "discriminator_h2c": "judge_clear",
    "discriminator_c2h": "judge_hazy",
}

PYRAMID = [
    (r"^pretrained\.layer1\.0\.", "pyramid.encoder.conv_stem."),
    (r"^pretrained\.layer1\.1\.", "pyramid.encoder.bn1."),
    (r"^pretrained\.layer1\.([34])\.", lambda m: f"pyramid.encoder.blocks.{int(m[1]) - 3}."),
    (r"^pretrained\.layer2\.0\.", "pyramid.encoder.blocks.2."),
    (r"^pretrained\.layer([34])\.([01])\.", lambda m: f"pyramid.encoder.blocks.{2 * int(m[1]) - 3 + int(m[2])}."),
    (r"^scratch\.layer([1-4])_rn\.1\.", lambda m: f"pyramid.reduce.{int(m[1]) - 1}."),
    (r"^scratch\.refinenet([1-4])\.resConfUnit1\.", lambda m: f"pyramid.fusion.{int(m[1]) - 1}.skip."),
    (r"^scratch\.refinenet([1-4])\.resConfUnit2\.", lambda m: f"pyramid.fusion.{int(m[1]) - 1}.refine."),
    (r"^scratch\.refinenet([1-4])\.out_conv\.", lambda m: f"pyramid.fusion.{int(m[1]) - 1}.project."),
    (r"^scratch\.output_conv\.([146])\.", lambda m: f"head.conv{(int(m[1]) + 2) // 3 + (m[1] == '6')}."),
]
RESIDUAL_DENSE = [
    (r"RDB_([12])\.0\.layers\.(\d)\.conv\.", r"block\1.layers.\2."),
    (r"RDB_([12])\.0\.lff\.", r"block\1.fuse."),
    (r"conv_block2\.0\.", "merge."),
    (r"^(drem\.|)conv1\.", r"\1lift."),
    (r"^(drem\.|)conv2\.", r"\1lower."),
]
RULES = {
    "depth": PYRAMID,
    "removal": [
        *PYRAMID,
        *((pattern.replace("^(drem\\.|)", "^(drem\\.)"), to) for pattern, to in RESIDUAL_DENSE),
        (r"^final_conv_beta_([12])\.0\.", lambda m: f"density.{int(m[1]) - 1}."),
        (r"^nrn\.imnet\.layers\.([0246])\.", lambda m: f"idrm.layers.{int(m[1]) // 2}."),
        (r"^cid_\d+\.", lambda m: f"pyramid.mixers.{m[0]}"),
        (r"channel_independent\.dconv\.", "spatial."),
        (r"channel_dependent\.", ""),
    ],
    "production": [
        (r"^enc_conv([0-3])\.1\.", r"encode.\1.conv."),
        (r"^enc_conv([0-3])\.2\.", r"encode.\1.norm."),
        (r"^bottleneck([1-4])\.res\.([1256])\.", lambda m: _residual(int(m[1]), int(m[2]))),
        (r"^dec_conv1\.1\.", "decode.0.conv."),
        (r"^dec_conv1\.2\.", "decode.0.norm."),
        (r"^dec_conv2\.1\.", "decode.1.conv."),
        (r"^dec_conv_last\.1\.", "decode.2.conv."),
        (r"^dec_conv_last_2\.1\.", "decode.3.conv."),
    ],
    "judge_clear": [(r"^conv([1-5])\.0\.", lambda m: f"convs.{int(m[1]) - 1}.")],
}
RULES["judge_hazy"] = RULES["judge_clear"]

# Constructed, saved, and never used by the released forward pass.
DEAD = re.compile(
    r"^mcc\.|^scratch\.refinenet4\.resConfUnit1\.|channel_dependent\.fc\d\.(weight|bias)$|RDB_\d\.0\.conv1\."
)


@dataclass
class Official:
    """What an official file holds, in this project's names."""

    networks: dict[str, dict[str, Tensor]]
    features: int
    modules: dict[str, bool]  # kan_cid, idrm, drem
    has_drem: bool
    skipped: list[str] = field(default_factory=list)


def recognise(state: Mapping) -> bool:
    """Does ``state`` look like an official NeDR or D4 file (nested, prefixed or the bare removal network)?"""
    return "net_h2c" in state or any(_clean(k).startswith(("net_h2c.", "scratch.layer1_rn.")) for k in map(str, state))


def translate(state: Mapping) -> Official:
    """Rename an official state dict. Raises `UserError` for what is neither known nor known to be dead."""
    networks: dict[str, dict[str, Tensor]] = {}
    skipped: list[str] = []
    official = _split(state)
    for name, weights in official.items():
        ours = NETWORKS[name]
        networks[ours] = {}
        for key, value in weights.items():
            if DEAD.search(key):
                skipped.append(f"{name}.{key}")
            elif key.endswith(".grid"):
                _check_grid(f"{name}.{key}", value)
            else:
                networks[ours][_rename(key, ours)] = value
    removal = official.get("net_h2c", {})
    first = removal.get("scratch.layer1_rn.1.weight")
    if first is None or first.dim() != 4:
        raise UserError(
            "the official file's net_h2c has no convolution 'scratch.layer1_rn.1'; it is cut short or foreign"
        )
    _order_mixers(networks["removal"])
    for key in [key for key in networks["removal"] if key.startswith("density.") and key.endswith("weight")]:
        weight = networks["removal"][key]  # a 1x1 convolution on 1x1 maps
        networks["removal"][key] = weight.flatten(1) if weight.dim() == 4 else weight
    modules = {
        "kan_cid": any(k.startswith("cid_") for k in removal),
        "idrm": any(k.startswith("nrn.") for k in removal),
    }
    has_drem = any(key.startswith("drem.") for key in removal)
    modules["drem"] = has_drem or any(modules.values())  # the released NeDR builds DREM anew and never saves it
    return Official(networks, first.shape[0], modules, has_drem, skipped)


def _split(state: Mapping) -> dict[str, dict[str, Tensor]]:
    """Official network name -> its flat state dict; DREM's weights, kept apart or not, go with net_h2c as drem.*"""
    flat: dict[str, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{_clean(inner)}": tensor for inner, tensor in value.items()}
        elif isinstance(value, Tensor) and value.dim() + ("." in str(key)) > 0:
            flat[_clean(key)] = value
    if not any(key.startswith("net_h2c.") for key in flat):
        flat = {f"net_h2c.{key}": value for key, value in flat.items()}
    networks: dict[str, dict[str, Tensor]] = {}
    for key, value in flat.items():
        if not isinstance(value, Tensor):
            raise UserError(f"the official file's '{key}' is not a tensor; it is of another format")
        name, _, rest = key.partition(".")
        if name == "drem":
            name, rest = "net_h2c", key
        if name not in NETWORKS:
            raise UserError(f"the official file holds '{key}', which belongs to no network of NeDR or D4")
        networks.setdefault(name, {})[rest] = value
    return networks


def _clean(key: str) -> str:
    return str(key).removeprefix("module.").replace(".module.", ".")


def _rename(key: str, network: str) -> str:
    for pattern, to in RULES[network]:
        key = re.sub(pattern, to, key)
    return key


def _residual(block: int, place: int) -> str:
    return f"residual.{block - 1}.{int(place > 2)}.{'conv' if place in (1, 5) else 'norm'}."


def _order_mixers(weights: dict[str, Tensor]) -> None:
    """pyramid.mixers.cid_64.* -> pyramid.mixers.1.*: official files name them by width, narrowest first."""
    widths = sorted({int(m[1]) for m in (re.match(r"pyramid\.mixers\.cid_(\d+)\.", key) for key in weights) if m})
    for key in [key for key in weights if key.startswith("pyramid.mixers.cid_")]:
        width = int(key.split("cid_")[1].split(".")[0])
        weights[key.replace(f"cid_{width}", str(widths.index(width)))] = weights.pop(key)


def _check_grid(key: str, grid: Tensor) -> None:
    uniform = grid.dim() == 2 and grid.shape[1] == len(knots()) and torch.allclose(grid.float(), knots(), atol=1e-5)
    if not uniform:
        raise UserError(f"the official file's '{key}' is not the uniform grid on [-1,1] with 5 intervals")
