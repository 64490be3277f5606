"""Conversion between the released state dicts of AKNet and this project's."""

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

from models.aknet.fusion import HIGH, LOW, hamming
from models.aknet.network import BLOCKS
from utils.errors import UserError

WIDTH = 32  # of every released network
CONV = "main.0"  # what the released code calls the convolution in its block
HEADS = ("feat_extract.5", "ConvsOut.1", "ConvsOut.0")
BOTTLENECK = {
    "in_conv.0": "enter",
    "out_conv": "leave",
    "fac_conv": "frequency_gate",
    "conv": "spatial_gate",
    "dw_33": "square",
    "dw_13": "wide",
    "dw_31": "tall",
    "dw_11": "point",
    "fgm.dwconv1": "fgm.gate",
    "fgm.dwconv2": "fgm.signal",
}
FUSION = {
    "hr_channel_compressor": "compress_fine",
    "lr_channel_compressor": "compress_coarse",
    "content_encoder": "low",
    "content_encoder2": "high",
}


def _modules() -> dict[str, str]:
    """Module by module: the released name -> ours. Levels: 0 full size, 1 half, 2 a quarter."""
    names = {f"feat_extract.0.{CONV}": "stem", "bottelneck.fgm": "bottleneck.fgm"}
    names |= {f"{theirs}.{CONV}": f"head.{level}" for level, theirs in enumerate(HEADS)}
    names |= {f"bottelneck.{theirs}": f"bottleneck.{ours}" for theirs, ours in BOTTLENECK.items()}
    for level, theirs in enumerate(("2", "1")):
        names |= {f"ff{theirs}.{part}": f"fusion.{level}.{ours}" for part, ours in FUSION.items()}
        names |= {f"SCM{theirs}.main.{k}.{CONV}": f"shallow.{level}.{2 * k}" for k in range(4)}
        names |= {
            f"SCM{theirs}.main.4": f"shallow.{level}.7",
            f"FAM{theirs}.merge.{CONV}": f"attach.{level}",
            f"Convs.{1 - level}.{CONV}": f"fusion.{level}.merge",
            f"feat_extract.{1 + level}.{CONV}": f"down.{level}",
        }
    for level, block, k in itertools.product(range(3), range(BLOCKS), range(2)):
        theirs, ours = f"layers.{block}.main.{k}.{CONV}", f"{level}.{block}.conv{k + 1}"
        names |= {f"Encoder.{level}.{theirs}": f"encoder.{ours}", f"Decoder.{2 - level}.{theirs}": f"decoder.{ours}"}
    return names


MODULES = _modules()

# Constructed, saved, and never used by the released forward pass.
UNUSED = {
    f"feat_extract.3.{CONV}.weight": (4 * WIDTH, 2 * WIDTH, 4, 4),
    f"feat_extract.3.{CONV}.bias": (2 * WIDTH,),
    f"feat_extract.4.{CONV}.weight": (2 * WIDTH, WIDTH, 4, 4),
    f"feat_extract.4.{CONV}.bias": (WIDTH,),
    "bottelneck.fgm.conv.weight": (8 * WIDTH, 4 * WIDTH, 3, 3),
    "bottelneck.fgm.conv.bias": (8 * WIDTH,),
}
TOLERANCE = 0.01  # for values up to 1 from a file in half precision; other windows differ by more
# Constants that the released modules register.
WINDOWS = {f"ff{k}.hamming_{kind}pass": side for k in (1, 2) for kind, side in (("low", LOW), ("high", HIGH))}


def recognise(state: Mapping) -> bool:
    """Does ``state`` look like the released AKNet's? No other method has this misspelt name."""
    return any(str(key).startswith("bottelneck.") for key in state)


def translate(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Released weights -> the network's, and the unused keys left out. Unknown keys keep their names."""
    for key, side in WINDOWS.items():
        window = hamming(side).flatten()
        stored = state.get(key, hamming(side)).float().flatten()
        if stored.shape != window.shape or not torch.allclose(stored, window, atol=TOLERANCE):
            raise UserError(f"the official file's '{key}' is not the Hamming window of {side}x{side}")
    used = {_renamed(key, MODULES): value for key, value in state.items() if key not in UNUSED and key not in WINDOWS}
    return used, [key for key in state if key in UNUSED]


def export(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The network's weights -> a state dict that the released code loads, with zeros for what it never uses."""
    released_names = {ours: released for released, ours in MODULES.items()}
    state = {_renamed(key, released_names): value.detach().cpu().clone() for key, value in weights.items()}
    state |= {key: torch.zeros(shape) for key, shape in UNUSED.items()}
    return state | {key: hamming(side)[None, None] for key, side in WINDOWS.items()}


def _renamed(key: str, names: Mapping[str, str]) -> str:
    module, _, leaf = key.rpartition(".")
    return f"{names[module]}.{leaf}" if module in names else key
