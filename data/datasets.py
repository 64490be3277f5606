"""Training and validation datasets: endless shuffled streams of images, pairs, and clear images with added haze.

A stream is a pure function of the position: item k does not depend on what was read before, on the number of workers or
on the process. Resuming means starting at a position.
"""

import functools
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from data import degradations, images, paths, pool_checks, synthesis
from data.cache import Cache
from data.pictures import SOTS_BORDER, Paired, of_other_size
from data.sets import locate, pairing
from data.streams import Mixed, Pairs, Replayed, Stream, Synthetic, Unpaired, crop
from utils import physics
from utils.config import Settings
from utils.errors import UserError, quoted

COLOURS = 200  # images of haze.colours_of whose airlights are taken


def training(settings: Settings, stage: str, kind: str, cache: Cache | None = None) -> Dataset:
    """The dataset of a training stage, by the settings; warnings about its images are in its ``remarks``.

    ``kind``: ``paired`` hazy and clear images of one scene; ``unpaired`` ones, independently shuffled; ``synthetic``
    haze or the ``degraded`` imaging model on clear images. For ``unpaired`` without data.hazy, the hazy images are
    clear ones of another stream, with synthetic haze. The stage ``warm_start`` has its own clear images and depth, and
    may take a share of its images from an outdoor pool without depth. With warm_start.replay, unpaired images come
    together with those of the warm start.
    ``cache``, of data.cache GiB, is shared by all stages; None keeps nothing. Raises `UserError` if images are not
    found, or hazy images lack their ground truth.
    """
    data = settings.data
    warm_start = settings.warm_start
    if data.pairs and kind != "paired":
        raise UserError(
            f"data.pairs={quoted(data.pairs)}: {settings.model} does not train on pairs; empty it, set data.clear"
        )
    mix = settings.haze.mix
    transform = partial(crop, shape=data.crop_shape, rule=data.crop, flip=data.flip, view=data.view)
    warnings: list[str] = []

    def find(source: str, extensions: frozenset[str] = paths.EXTENSIONS) -> list[Path]:
        warnings.extend(paths.passed_over(source, extensions))
        return paths.find(source, extensions)

    @functools.cache
    def add_haze() -> Callable:
        return partial(synthesis.random_haze, law=settings.haze, colours=_airlight_colours(settings, find, warnings))

    def stream(source: str, name: str) -> Stream:
        return Stream(find(source), transform, settings.seed, name, cache)

    def synthetic(name: str, add_haze: Callable, mix: float = 0.0) -> Synthetic:
        clear, depth = _clear_and_depth(settings, name, find)
        return Synthetic(clear, depth, transform, add_haze, settings.seed, name, cache, mix)

    def supervised(name: str) -> Stream | Mixed:
        with_depth = synthetic(name, add_haze(), mix)
        if name != "warm_start" or warm_start.outdoor is None or not warm_start.outdoor_share:
            return with_depth
        outdoor_haze = partial(add_haze(), generated="outdoor")
        outdoor = Synthetic(
            find(warm_start.outdoor), None, transform, outdoor_haze, settings.seed, "outdoor", cache, mix
        )
        return Mixed(with_depth, outdoor, warm_start.outdoor_share)

    match kind:
        case "paired":
            pairs, warnings = _pairs(settings, "")
            dataset = Pairs(pairs, transform, settings.seed, stage, cache)
        case "synthetic":
            dataset = supervised(stage)
        case "degraded":
            dataset = synthetic(stage, partial(degradations.degrade, settings=settings.degradations))
        case "unpaired":
            clear = stream(_required(data.clear, "data.clear"), "clear")
            hazy = synthetic("hazy", add_haze(), mix) if data.hazy is None else stream(data.hazy, "hazy")
            warnings += pool_checks.warnings(None if data.hazy is None else hazy.paths, clear.paths)
            dataset = Unpaired(hazy, clear)
            dataset = Replayed(dataset, supervised("warm_start")) if warm_start.replay else dataset
        case _:
            raise ValueError(f"no such kind of training images: {kind}")
    dataset.remarks = list(dict.fromkeys(warnings))
    return dataset


def validation(settings: Settings) -> Paired | None:
    """The validation pairs, or an evenly spread subset of them; None if none are set. Raises `UserError`."""
    data = settings.data
    limit = settings.log.validation_limit
    if not data.validation_pairs and data.validation_hazy is None:
        return None
    pairs, warnings = _pairs(settings, "validation_")
    pairs = paths.spread(pairs, limit) if limit else pairs
    if wrong := of_other_size(pairs, SOTS_BORDER):  # found now, not at the first validation
        raise UserError(f"{wrong[0]}; crop them to one size{f' ({len(wrong)} pairs)' if len(wrong) > 1 else ''}")
    return Paired(pairs, remarks=warnings)


def _required(source: str | None, key: str) -> str:
    if source is None:
        side = re.split("[._]", key)[-1]
        raise UserError(f"{key} is not set: name a folder or a .flist of {side} images, as {key}=PATH")
    return source


def _clear_and_depth(settings: Settings, stage: str, find: Callable) -> tuple[list[Path], list[Path] | None]:
    """The clear images of a stage, and the depth maps if there are any."""
    data, warm_start = settings.data, settings.warm_start
    if stage == "warm_start":
        clear = _required(warm_start.clear or data.clear, "warm_start.clear")
        depth = warm_start.depth
    else:
        clear = _required(data.clear, "data.clear")
        depth = data.depth
    return find(clear), None if depth is None else find(depth, paths.DEPTH_EXTENSIONS)


def _airlight_colours(settings: Settings, find: Callable, warnings: list[str]) -> np.ndarray | None:
    """The airlights' colours of up to `COLOURS` images of haze.colours_of, evenly spread: (N,3).

    Images that cannot be read are left out, with one of the ``warnings`` for each. Raises `UserError` if none can.
    """
    if settings.haze.colours_of is None:
        return None
    colours, unread = [], []
    for file in paths.spread(find(settings.haze.colours_of), COLOURS):
        try:
            colours.append(physics.bright_colour(images.read(file)[None]).flatten().numpy())
        except UserError as error:
            unread.append(f"haze.colours_of: left out: {error}")
    if not colours:
        raise UserError(unread[0])
    warnings += unread
    return np.stack(colours)


def _pairs(settings: Settings, prefix: str) -> tuple[list[tuple[Path, Path]], list[str]]:
    """All pairs of the sets named by data.``prefix``pairs, or of the hazy and the clear pool; and warnings."""
    data = settings.data
    names, hazy, clear = (getattr(data, prefix + key) for key in ("pairs", "hazy", "clear"))
    pools = f"data.{prefix}hazy and data.{prefix}clear"
    if names and (hazy is not None or clear is not None):
        raise UserError(f"data.{prefix}pairs={quoted(names)} and {pools} are two sources of pairs; empty one of them")
    if names:
        return locate.pairs(names, data.root)
    if hazy is None and clear is None:
        raise UserError(f"no pairs: set data.{prefix}pairs to sets by name, as data.{prefix}pairs=[ITS], or {pools}")
    hazy = _required(hazy, f"data.{prefix}hazy")
    clear = _required(clear, f"data.{prefix}clear")
    matched, warnings = pairing.pairs(hazy, clear)
    return matched, [*paths.passed_over(hazy), *paths.passed_over(clear), *warnings]
