"""The encoder: any timm network that gives maps at strides 4, 8, 16 and 32."""

import warnings
from collections.abc import Iterable

import timm
import torch
from torch import Tensor, nn

from models.layers import quicken
from utils import imagenet, tiling
from utils.errors import UserError, nearest, quoted

RELEASED = "tf_efficientnet_lite3"  # D4's and NeDR's
STRIDES = (4, 8, 16, 32)
FAMILY = "tf_efficientnet_lite"  # whose layers have quicker twins here, and whose blocks end at the strides as follows
BLOCKS = (slice(0, 2), slice(2, 3), slice(3, 5), slice(5, 7))


def create(name: str) -> nn.Module:
    """timm's ``name`` without its head and without weights. Raises `UserError` if it cannot serve."""
    options = {"features_only": True, "pretrained": False}
    if ":" in name:  # timm would fetch what a file names
        raise UserError(f"encoder={name}: must be a network of timm's own, such as {RELEASED}; nothing is fetched")
    try:
        with warnings.catch_warnings(action="ignore"):
            strides = timm.create_model(name, **options).feature_info.reduction()
            indices = tuple(strides.index(stride) for stride in STRIDES if stride in strides)
            network = timm.create_model(name, out_indices=indices, **options) if len(indices) == 4 else None
    except Exception as error:  # timm and its networks raise many kinds
        close = "" if timm.is_model(name) else f": timm has no such network{nearest(name, timm.list_models())}"
        raise UserError(f"encoder={quoted(name)}{close or f': timm cannot make it ({_line(error)})'}") from None
    if name.startswith(FAMILY):
        network.in_tiles = True
        return quicken(network)
    if network is None or not _serves(network):
        raise UserError(
            f"encoder={name}: gives maps at strides {', '.join(map(str, strides))}; needed are 4, 8, 16 and 32, as "
            f"(N,C,H,W), of images of any size; take one such as {RELEASED}"
        )
    return network


def channels(network: nn.Module) -> list[int]:
    """How many channels its maps have, from the finest to the coarsest."""
    return network.feature_info.channels()


def maps(network: nn.Module, image: Tensor, tile: int | None) -> list[Tensor]:
    """The maps of ``image`` (N,3,H,W), H and W multiples of 32.

    With ``tile`` each is made from the one before, in exact tiles: all but the first of ``tile`` / 2 of their own
    pixels, not of the picture's: the coarser the map, the wider its halo is, and the less memory it takes. That is for
    EfficientNet-lite alone; other networks look at the whole image, in memory that grows with it.
    """
    if tile is None or not getattr(network, "in_tiles", False):
        return network(image)
    first, *others = (network.blocks[blocks] for blocks in BLOCKS)
    x = tiling.apply_module(nn.Sequential(network.conv_stem, network.bn1, first), image, tile=tile, down=4)
    found = [x]
    for stage in others:
        x = tiling.apply_module(stage, x, tile=tiling.coarse_side(tile, 2), down=2)
        found.append(x)
    return found


def load(networks: Iterable[nn.Module], name: str, weights: str, key: str) -> None:
    """Give every one of ``networks``, encoders ``name``, its start: ImageNet weights (hub | package | a file) or none.

    Raises `UserError` with the remedy, the setting ``key``.
    """
    if weights == "none":
        return
    state = imagenet.load(name, weights, key)
    for network in networks:
        network.load_state_dict(imagenet.fit(network.state_dict(), state, name, weights))


def _serves(network: nn.Module) -> bool:
    """Does it give the maps that it tells, channels first, at an uncommon size?"""
    try:
        with torch.no_grad():
            found = network.eval()(torch.zeros(1, 3, 64, 96))
    except (RuntimeError, AssertionError, ValueError):
        return False
    network.train()
    wanted = [(1, count, 64 // step, 96 // step) for count, step in zip(channels(network), STRIDES, strict=True)]
    return [tuple(each.shape) for each in found] == wanted


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
