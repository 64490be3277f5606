"""The released state dicts of AKNet and this project's, renamed one into the other."""

from collections.abc import Mapping

import torch
from torch import Tensor

from models.aknet.fusion import HIGH, LOW, hamming
from models.aknet.network import BLOCKS
from utils.errors import UserError

WIDTH = 32  # of every released network
CONV = "main.0"  # what the released code calls the convolution in its block

# Module by module: the released name -> ours. Levels: 0 full size, 1 half, 2 a quarter.
MODULES = {
    f"feat_extract.0.{CONV}": "stem",
    f"feat_extract.1.{CONV}": "down.0",
    f"feat_extract.2.{CONV}": "down.1",
    f"feat_extract.5.{CONV}": "head.0",
    f"ConvsOut.1.{CONV}": "head.1",
    f"ConvsOut.0.{CONV}": "head.2",
    "bottelneck.in_conv.0": "bottleneck.enter",
    "bottelneck.out_conv": "bottleneck.leave",
    "bottelneck.fac_conv": "bottleneck.frequency_gate",
    "bottelneck.conv": "bottleneck.spatial_gate",
    "bottelneck.dw_33": "bottleneck.square",
    "bottelneck.dw_13": "bottleneck.wide",
    "bottelneck.dw_31": "bottleneck.tall",
    "bottelneck.dw_11": "bottleneck.point",
    "bottelneck.fgm": "bottleneck.fgm",
    "bottelneck.fgm.dwconv1": "bottleneck.fgm.gate",
    "bottelneck.fgm.dwconv2": "bottleneck.fgm.signal",
}
for level, name in enumerate(("2", "1")):
    MODULES |= {
        f"FAM{name}.merge.{CONV}": f"attach.{level}",
        f"SCM{name}.main.4": f"shallow.{level}.7",
        f"ff{name}.hr_channel_compressor": f"fusion.{level}.compress_fine",
        f"ff{name}.lr_channel_compressor": f"fusion.{level}.compress_coarse",
        f"ff{name}.content_encoder": f"fusion.{level}.low",
        f"ff{name}.content_encoder2": f"fusion.{level}.high",
        f"Convs.{1 - level}.{CONV}": f"fusion.{level}.merge",
    }
    MODULES |= {f"SCM{name}.main.{k}.{CONV}": f"shallow.{level}.{2 * k}" for k in range(4)}
for level in range(3):
    for block in range(BLOCKS):
        for k in range(2):
            tail, ours = f"layers.{block}.main.{k}.{CONV}", f"{level}.{block}.conv{k + 1}"
            MODULES |= {f"Encoder.{level}.{tail}": f"encoder.{ours}", f"Decoder.{2 - level}.{tail}": f"decoder.{ours}"}

# Constructed, saved, and never used by the released forward pass.
DEAD = {
    f"feat_extract.3.{CONV}.weight": (4 * WIDTH, 2 * WIDTH, 4, 4),
    f"feat_extract.3.{CONV}.bias": (2 * WIDTH,),
    f"feat_extract.4.{CONV}.weight": (2 * WIDTH, WIDTH, 4, 4),
    f"feat_extract.4.{CONV}.bias": (WIDTH,),
    "bottelneck.fgm.conv.weight": (8 * WIDTH, 4 * WIDTH, 3, 3),
    "bottelneck.fgm.conv.bias": (8 * WIDTH,),
}
# Constants that the released modules register.
WINDOWS = {
    f"ff{k}.hamming_{kind}pass": side for k in (1, 2) for kind, side in (("low", LOW), ("high", HIGH))
}


def recognise(state: Mapping) -> bool:
    """Does ``state`` look like the released AKNet's? No other method's code spells the bottleneck so."""
    return any(str(key).startswith("bottelneck.") for key in state)


def translate(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Released weights -> the network's own, and the dead keys left out. Unknown keys keep their names."""
    for key, side in WINDOWS.items():
        if key in state and not torch.allclose(state[key].float().flatten(), hamming(side).flatten(), atol=1e-5):
            raise UserError(f"the official file's '{key}' is not the Hamming window of {side}x{side}")
    live = {_renamed(key, MODULES): value for key, value in state.items() if key not in DEAD and key not in WINDOWS}
    return live, [key for key in state if key in DEAD]


def restore(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The network's weights -> a state dict that the released code loads, with zeros for what it never uses."""
    back = {ours: released for released, ours in MODULES.items()}
    state = {_renamed(key, back): value.detach().cpu().clone() for key, value in weights.items()}
    state |= {key: torch.zeros(shape) for key, shape in DEAD.items()}
    return state | {key: hamming(side)[None, None] for key, side in WINDOWS.items()}


def _renamed(key: str, names: Mapping[str, str]) -> str:
    module, _, leaf = key.rpartition(".")
    return f"{names.get(module, module)}.{leaf}"
