"""The encoder: any timm network with feature maps at strides 4, 8, 16 and 32."""

import warnings
from collections.abc import Iterable

import timm
import torch
from torch import Tensor, nn

from models.layers import use_fast_layers
from utils import imagenet, tiling
from utils.errors import UserError, nearest, quoted

RELEASED = "tf_efficientnet_lite3"  # the encoder of D4 and NeDR
STRIDES = (4, 8, 16, 32)
FAMILY = "tf_efficientnet_lite"  # networks with faster layers (`use_fast_layers`) and tiles
BLOCKS = (slice(0, 2), slice(2, 3), slice(3, 5), slice(5, 7))  # their blocks up to each stride


def create(name: str) -> nn.Module:
    """timm's ``name`` without its head and without weights. Raises `UserError` if it is unsuitable."""
    options = {"features_only": True, "pretrained": False}
    if ":" in name:  # timm would download it
        raise UserError(f"encoder={name}: must be a network of timm's own, such as {RELEASED}; nothing is fetched")
    try:
        with warnings.catch_warnings(action="ignore"):
            strides = timm.create_model(name, **options).feature_info.reduction()
            indices = tuple(strides.index(stride) for stride in STRIDES if stride in strides)
            network = timm.create_model(name, out_indices=indices, **options) if len(indices) == 4 else None
    except Exception as error:  # timm and its networks raise many types
        unknown = "" if timm.is_model(name) else f": timm has no such network{nearest(name, timm.list_models())}"
        raise UserError(f"encoder={quoted(name)}{unknown or f': timm cannot create it ({_line(error)})'}") from None
    if name.startswith(FAMILY):
        network.in_tiles = True
        return use_fast_layers(network)
    if network is None or not _is_suitable(network):
        raise UserError(
            f"encoder={name}: has maps at strides {', '.join(map(str, strides))}; needed are 4, 8, 16 and 32, as "
            f"(N,C,H,W), for images of any size; use another one, such as {RELEASED}"
        )
    return network


def channels(network: nn.Module) -> list[int]:
    """The numbers of channels of its maps, from the finest to the coarsest."""
    return network.feature_info.channels()


def maps(network: nn.Module, image: Tensor, tile: int | None) -> list[Tensor]:
    """The maps of ``image`` (N,3,H,W), H and W multiples of 32.

    With ``tile`` each map is computed from the one before, in exact tiles: the first in tiles of the image, the others
    in tiles of ``tile`` / 2 pixels of their own input, since coarser maps have wider halos and take less memory. Only
    EfficientNet-lite supports this; other networks process the whole image, in memory that grows with it.
    """
    if tile is None or not getattr(network, "in_tiles", False):
        return network(image)
    first, *others = (network.blocks[blocks] for blocks in BLOCKS)
    x = tiling.apply_module(nn.Sequential(network.conv_stem, network.bn1, first), image, tile=tile, down=4)
    outputs = [x]
    for stage in others:
        x = tiling.apply_module(stage, x, tile=tiling.coarse_side(tile, 2), down=2)
        outputs.append(x)
    return outputs


def load(networks: Iterable[nn.Module], name: str, weights: str, key: str) -> None:
    """Load ImageNet ``weights`` (hub | package | a file | none) into all ``networks``, which are encoders ``name``.

    Raises `UserError` whose message names the setting ``key``.
    """
    if weights == "none":
        return
    state = imagenet.load(name, weights, key)
    for network in networks:
        network.load_state_dict(imagenet.fit(network.state_dict(), state, name, weights))


def _is_suitable(network: nn.Module) -> bool:
    """Does it return the maps that it declares, channels first, for an image of unusual size?"""
    try:
        with torch.no_grad():
            outputs = network.eval()(torch.zeros(1, 3, 64, 96))
    except (RuntimeError, AssertionError, ValueError):
        return False
    network.train()
    expected = [(1, count, 64 // step, 96 // step) for count, step in zip(channels(network), STRIDES, strict=True)]
    return [tuple(each.shape) for each in outputs] == expected


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
