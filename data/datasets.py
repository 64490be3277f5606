"""Datasets to train on: endless shuffled streams of images, pairs, and clear images made hazy.

A stream is a pure function of the position: item k is the same whatever was read before, by how many workers, in
which process. To resume is to start at a position.
"""

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch.utils.data import Dataset

from data import degradations, paths, synthesis
from data.cache import Cache
from data.pictures import Paired
from data.sets import locate, pairing
from data.streams import Mixed, Pairs, Replayed, Stream, Synthetic, Unpaired, crop
from utils.config import Settings
from utils.errors import UserError, quoted


def training(settings: Settings, stage: str, kind: str, cache: Cache | None = None) -> Dataset:
    """The images of a stage of training, as the settings have it; what is odd about them is in its ``remarks``.

    ``kind``: ``paired`` hazy and clear images of one scene; ``unpaired`` ones, independently shuffled; ``synthetic``
    haze or the ``degraded`` imaging model on clear images. Unpaired without data.hazy, the hazy images are clear
    ones of another stream, with synthetic haze. The stage ``warm_start`` has clear images and depth of its own, and
    may take a part of its images from a pool without depth, outdoors. With warm_start.replay, unpaired images come
    with those of the warm start.
    ``cache``, of data.cache GiB, is one for all stages; None keeps nothing. Raises `UserError` if they are not to be
    found, or hazy images lack their ground truth.
    """
    data, warm = settings.data, settings.warm_start
    if data.pairs and kind != "paired":
        raise UserError(
            f"data.pairs={quoted(data.pairs)}: {settings.model} does not train on pairs; empty it, set data.clear"
        )
    cut = partial(crop, shape=data.crop_shape, rule=data.crop, flip=data.flip, view=data.view)
    add_haze = partial(synthesis.random_haze, law=settings.haze)

    remarks: list[str] = []

    def find(source: str, extensions: frozenset[str] = paths.EXTENSIONS) -> list[Path]:
        remarks.extend(paths.passed_over(source, extensions))
        return paths.find(source, extensions)

    def stream(source: str, name: str) -> Stream:
        return Stream(find(source), cut, settings.seed, name, cache)

    def synthetic(name: str, add_haze: Callable) -> Synthetic:
        clear, depth = _clear_and_depth(settings, name, find)
        return Synthetic(clear, depth, cut, add_haze, settings.seed, name, cache)

    def supervised(name: str) -> Stream | Mixed:
        near = synthetic(name, add_haze)
        if name != "warm_start" or warm.outdoor is None or not warm.outdoor_share:
            return near
        far = partial(add_haze, made_up="outdoor")
        outdoor = Synthetic(find(warm.outdoor), None, cut, far, settings.seed, "outdoor", cache)
        return Mixed(near, outdoor, warm.outdoor_share)

    match kind:
        case "paired":
            pairs, remarks = _pairs(settings, "")
            made = Pairs(pairs, cut, settings.seed, stage, cache)
        case "synthetic":
            made = supervised(stage)
        case "degraded":
            made = synthetic(stage, partial(degradations.degrade, settings=settings.degradations))
        case "unpaired":
            clear = stream(_required(data.clear, "data.clear"), "clear")
            made = Unpaired(synthetic("hazy", add_haze) if data.hazy is None else stream(data.hazy, "hazy"), clear)
            made = Replayed(made, supervised("warm_start")) if warm.replay else made
        case _:
            raise ValueError(f"no such kind of training images: {kind}")
    made.remarks = list(dict.fromkeys(remarks))
    return made


def validation(settings: Settings) -> Paired | None:
    """The validation pairs, or an evenly spread part of them; None where none are set. Raises `UserError`."""
    data, limit = settings.data, settings.log.validation_limit
    if not data.validation_pairs and data.validation_hazy is None:
        return None
    pairs, remarks = _pairs(settings, "validation_")
    return Paired(pairs[:: math.ceil(len(pairs) / limit)] if limit else pairs, remarks=remarks)


def _required(source: str | None, key: str) -> str:
    if source is None:
        what = re.split("[._]", key)[-1]
        raise UserError(f"{key} is not set: name a folder or a .flist of {what} images, as {key}=PATH")
    return source


def _clear_and_depth(settings: Settings, stage: str, find: Callable) -> tuple[list[Path], list[Path] | None]:
    """The clear images of a stage, and the depth maps if there are any."""
    data, warm = settings.data, settings.warm_start
    if stage == "warm_start":
        clear, depth = _required(warm.clear or data.clear, "warm_start.clear"), warm.depth
    else:
        clear, depth = _required(data.clear, "data.clear"), data.depth
    return find(clear), None if depth is None else find(depth, paths.DEPTH_EXTENSIONS)


def _pairs(settings: Settings, prefix: str) -> tuple[list[tuple[Path, Path]], list[str]]:
    """All pairs of the sets that data.``prefix``pairs names, or those of two pools; and what is odd about them."""
    data = settings.data
    names, hazy, clear = (getattr(data, prefix + key) for key in ("pairs", "hazy", "clear"))
    pools = f"data.{prefix}hazy and data.{prefix}clear"
    if names and (hazy is not None or clear is not None):
        raise UserError(f"data.{prefix}pairs={quoted(names)} and {pools} are two sources of pairs; empty one of them")
    if names:
        return locate.pairs(names, data.root)
    if hazy is None and clear is None:
        raise UserError(f"no pairs: set data.{prefix}pairs to sets by name, as data.{prefix}pairs=[ITS], or {pools}")
    hazy, clear = _required(hazy, f"data.{prefix}hazy"), _required(clear, f"data.{prefix}clear")
    found, remarks = pairing.pairs(hazy, clear)
    return found, [*paths.passed_over(hazy), *paths.passed_over(clear), *remarks]
