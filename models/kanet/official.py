"""Official KA-Net files: one table of names for both directions; tensors unused by the released code are left out."""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from models.kanet.network import WIDTH, KANetwork, widths
from utils.checkpoint import load_strict
from utils.errors import UserError

FIRST = "Tencoder.patch_embed1.proj.weight"  # identifies these files and gives their network's width
RANDOM = "removal.remove.random."  # not in official files

# Our names -> official ones; all rules are applied, in this order.
RULES = [
    (r"^encoder\.(embed|side_embed|stages|side_stages)\.(\d)\.", lambda m: _encoder_name(m[1], int(m[2]) + 1)),
    (r"^decoder\.embed\.", "Tdecoder.patch_embed1."),
    (r"^decoder\.blocks\.", "Tdecoder.block1."),
    (r"^decoder\.norm\.", "Tdecoder.norm1."),
    (r"^(Tencoder\.(?:patch_)?block\d)\.blocks\.", r"\1."),
    (r"^Tencoder\.(p?)(?:atch_)?block(\d)\.norm\.", r"Tencoder.\1norm\2."),
    (r"(patch_embed\d)\.conv\.", r"\1.proj."),
    (r"\.attention\.queries$", ".attn.task_query"),
    (r"\.attention\.query\.", ".attn.q."),
    (r"\.attention\.key_value\.", ".attn.kv."),
    (r"\.attention\.project\.", ".attn.proj."),
    (r"\.attention\.reduce\.", ".attn.sr."),
    (r"\.attention\.norm\.", ".attn.norm."),
    (r"\.mlp\.expand\.", ".mlp.fc1."),
    (r"\.mlp\.depthwise\.", ".mlp.dwconv.dwconv."),
    (r"\.mlp\.contract\.", ".mlp.fc2."),
    (r"^tail\.up\.(\d)\.", lambda m: f"convtail.convd{32 >> int(m[1])}x.conv2d."),
    (r"^tail\.refine\.(\d)\.", lambda m: f"convtail.dense_{4 - int(m[1])}.0."),
    (r"(dense_\d\.0)\.first\.", r"\1.conv1.conv2d."),
    (r"(dense_\d\.0)\.second\.", r"\1.conv2.conv2d."),
    (r"^last\.", "clean.conv2d."),
    (r"^removal\.first\.", "block.conv1."),
    (r"^removal\.second\.", "block.conv2."),
    (r"^removal\.remove\.reduce\.", "block.MRFEB1.faix."),
    (r"^removal\.remove\.merge\.weigh\.", "block.MRFEB1.AGB.fc."),
    (r"^removal\.remove\.merge\.merge\.", "block.MRFEB1.AGB.conv_out."),
    (r"^removal\.remove\.branches\.(\d)\.", lambda m: f"block.MRFEB1.MRFRB_{int(m[1]) + 1}."),
    (r"(MRFRB_\d)\.first\.", r"\1.DFconv1."),
    (r"(MRFRB_\d)\.second\.", r"\1.DFconv2."),
    (r"(MRFRB_\d)\.merge\.", r"\1.conv_cat."),
    (r"\.gate\.squeeze\.", ".AM.CAU.fc."),
    (r"\.gate\.local\.", ".AM.CAU.fc1."),
    (r"\.gate\.score\.", ".AM.SAU.conv_1."),
    (r"\.gate\.place\.", ".AM.SAU.conv_sigm."),
    (r"\.gate\.merge\.", ".AM.conv_out."),
]


def recognise(state: Mapping) -> bool:
    """Does ``state``, free of wrappers, look like an official KA-Net file?"""
    return FIRST in state or any(str(key).startswith("block.MRFEB1.") for key in state)


def width(state: Mapping) -> int:
    """The width of the network of this official state dict. Raises `UserError` if it cannot be determined."""
    first = state.get(FIRST)
    if not isinstance(first, Tensor) or first.dim() != 4:
        raise UserError(f"the official KA-Net file has no convolution '{FIRST}'; it is incomplete or foreign")
    return first.shape[0]


def load(network: KANetwork, state: Mapping[str, Tensor]) -> list[str]:
    """Load the weights of an official state dict into ``network``; returns the names of the tensors left out.

    ``network`` keeps its random features. Raises `UserError` for missing, unknown and wrongly shaped tensors.
    """
    our_names = {theirs: ours for ours, theirs in names(network.state_dict()).items()}
    unused = _unused(width(state))
    weights = {our_names.get(key, key): value for key, value in state.items() if key not in unused}
    weights |= {key: value for key, value in network.state_dict().items() if key.startswith(RANDOM)}
    load_strict(network, weights, "the official KA-Net file")
    return [key for key in state if key in unused]


def export(network: KANetwork) -> dict[str, dict[str, Tensor]]:
    """A file for the released code: all its tensors under ``model``, named as by DataParallel; unused ones are zeros.

    The random features are left out: the released code draws its own. Raises `UserError` for another width.
    """
    weights = network.state_dict()
    current = len(weights["encoder.embed.0.conv.weight"])
    if current != WIDTH:
        raise UserError(f"kanet.width={current}: the released network is {WIDTH} wide; train with that to export")
    released = {theirs: weights[ours].detach().cpu().clone() for ours, theirs in names(weights).items()}
    released |= {key: torch.zeros(shape) for key, shape in _unused(WIDTH).items()}
    return {"model": {f"module.{key}": value for key, value in released.items()}}


def names(keys: Iterable[str]) -> dict[str, str]:
    """Our names -> official ones, without the tensors that official files do not hold."""
    official = {}
    for key in keys:
        if key.startswith(RANDOM):
            continue
        official[key] = key
        for pattern, replacement in RULES:
            official[key] = re.sub(pattern, replacement, official[key])
    return official


def _encoder_name(part: str, number: int) -> str:
    official = {
        "embed": "patch_embed",
        "side_embed": "mini_patch_embed",
        "stages": "block",
        "side_stages": "patch_block",
    }
    return f"Tencoder.{official[part]}{number}."


def _unused(width: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that the released code constructs and saves and never uses."""
    first, *_, last = widths(width)
    embed, output = "Tencoder.mini_patch_embed4", "convtail.conv_output.conv2d"
    shapes = {f"{embed}.proj.weight": (last, first, 3, 3)}
    shapes |= {f"{embed}.{name}": (last,) for name in ("proj.bias", "norm.weight", "norm.bias")}
    return shapes | {f"{output}.weight": (3, width // 8, 3, 3), f"{output}.bias": (3,)}
