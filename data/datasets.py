"""Datasets to train on: endless shuffled streams of pictures, pairs, and clear pictures made hazy.

A stream is a pure function of the position: item k is the same whatever was read before, by how many workers, in
which process. To resume is to start at a position.
"""

import math
import re
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from data import haze, images, locate, pairing
from data.cache import Cache
from data.pictures import SOTS_BORDER, Paired, read_pair
from data.pixels import Pixels, Stack
from utils.config import Settings
from utils.errors import UserError

Transform = Callable[[Pixels | Stack, np.random.Generator], Tensor]


def crop(
    image: Tensor | Pixels | Stack,
    rng: np.random.Generator,
    shape: tuple[int, int],
    rule: str,
    flip: bool,
    view: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """Cut a random piece of ``shape`` (h,w) out of (C,H,W): (C,h,w), all in [0,1]. Stack what must be cut alike on C.

    ``random``: a plain crop; raises `UserError` if the picture is smaller. The other two cut a rectangle of that aspect
    and resize it. ``short_side``: the largest there is (for squares the released rule of NeDR and D4; bicubic,
    antialiased). ``view``: a share of the largest, uniform in ``view``, by antialiased bilinear interpolation, as a
    network with a working size sees pictures. ``flip``: mirrored half the time.
    """
    height, width = shape
    if rule != "random":
        scale = min(image.shape[1] / height, image.shape[2] / width)
        if rule == "view":
            scale *= rng.uniform(*view)
        height, width = max(1, round(scale * height)), max(1, round(scale * width))
    if height > image.shape[1] or width > image.shape[2]:
        raise UserError(
            f"{image.shape[2]}x{image.shape[1]} is smaller than the crop of {_size(shape)}; set a smaller "
            f"data.crop_size or data.crop=short_side"
        )
    top, left = rng.integers(image.shape[1] - height + 1), rng.integers(image.shape[2] - width + 1)
    image = image[:, top : top + height, left : left + width]
    if (height, width) != tuple(shape):
        mode = "bilinear" if rule == "view" else "bicubic"
        image = F.interpolate(image[None], shape, mode=mode, antialias=True)[0].clamp(0, 1)
    if rng.random() < 0.5 and flip:
        image = image.flip(2)
    return image.contiguous()


def _size(shape: tuple[int, int]) -> str:
    height, width = shape
    return str(height) if height == width else f"{width}x{height}"


class Stream(Dataset):
    """Pictures in an order that is shuffled anew for every epoch, without end.

    ``stream[k]``, k >= 0, is ``{name: transform(picture, rng), "skipped": [...]}``. Each picture comes once an
    epoch of ``len(paths)``; streams of different ``name`` are shuffled independently. A picture that cannot be used
    is replaced by the next one in the order, and ``skipped`` says why. Raises `UserError` if none can be used.
    ``cache`` spares decoding and changes nothing else.
    """

    remarks: Sequence[str] = ()  # what is odd about the pictures, a line each

    def __init__(self, paths: Sequence, transform: Transform, seed: int, name: str, cache: Cache | None = None):
        self.paths, self.transform, self.name, self.cache = list(paths), transform, name, cache or Cache()
        self.entropy = [seed, zlib.crc32(name.encode())]
        self.epoch_length = len(self.paths)
        self._shuffled = (-1, np.empty(0, dtype=int))  # the last epoch asked for, and its order
        self._announce()

    def _announce(self) -> None:
        """Tell the cache which pictures will be read."""
        self.cache.add(self.paths)

    def __getitem__(self, k: int) -> dict:
        if k < 0:
            raise IndexError(f"position {k}: a stream starts at 0 and has no end")
        epoch, place = divmod(k, len(self.paths))
        order, skipped = self._order(epoch), []
        for step in range(len(order)):
            # Orders draw from [..., epoch], pictures from [..., k + 2^32]: never the same numbers.
            rng = np.random.default_rng([*self.entropy, 2**32 + k])
            try:
                item = self._load(order[(place + step) % len(order)], rng)
            except UserError as error:
                skipped.append(str(error))
            else:
                return {**item, "skipped": skipped}
        raise UserError(f"none of the {len(order)} {self.name} pictures can be used; the first: {skipped[0]}")

    def _order(self, epoch: int) -> np.ndarray:
        if self._shuffled[0] != epoch:
            rng = np.random.default_rng([*self.entropy, epoch])
            self._shuffled = epoch, rng.permutation(len(self.paths))
        return self._shuffled[1]

    def _load(self, index: int, rng: np.random.Generator) -> dict:
        path = self.paths[index]
        return {self.name: _named(path, self.transform, self.cache.picture(path), rng)}


class Synthetic(Stream):
    """A stream of clear pictures made hazy on the fly: the items of ``add_haze``, with ``skipped``.

    ``add_haze(clear (3,h,w), depth (1,h,w) | None, rng)`` gets the crop and is as `haze.random_haze` or `haze.degrade`.
    Depth maps are matched to the pictures by name, see `pairing`; without ``depth_paths`` it makes them up. Raises
    `UserError` at once if a picture has no depth map; a map of another size than its picture is skipped like an
    unreadable one.
    """

    def __init__(
        self,
        clear_paths: Sequence[Path],
        depth_paths: Sequence[Path] | None,
        transform: Transform,
        add_haze: Callable[[Tensor, Tensor | None, np.random.Generator], dict],
        seed: int,
        name: str,
        cache: Cache | None = None,
    ):
        self.depth = None if depth_paths is None else pairing.match_depth(clear_paths, depth_paths)
        self.add_haze = add_haze
        super().__init__(clear_paths, transform, seed, name, cache)

    def _announce(self) -> None:
        self.cache.add(self.paths, self.depth or ())

    def _load(self, index: int, rng: np.random.Generator) -> dict:
        path = self.paths[index]
        picture, depth = haze.read_with_depth(path, self.depth and self.depth[index], self.cache)
        both = _named(path, self.transform, picture if depth is None else Stack((picture, depth)), rng)
        return self.add_haze(both[:3], None if depth is None else both[3:], rng)


class Pairs(Stream):
    """A stream of hazy pictures with their ground truth, cut and flipped alike: {hazy, clear, skipped}.

    A pair that cannot be read, or whose sizes do not agree by the rule of `Paired`, is skipped.
    """

    def _announce(self) -> None:
        self.cache.add(path for pair in self.paths for path in pair)

    def _load(self, index: int, rng: np.random.Generator) -> dict:
        pair = self.paths[index]
        both = _named(pair[0], self.transform, Stack(read_pair(*pair, SOTS_BORDER, self.cache)), rng)
        return {"hazy": both[:3], "clear": both[3:]}


class Mixed(Dataset):
    """Two streams as one: item k is item k of ``second`` with probability ``share``, else item k of ``first``.

    The items of both have the same names. ``epoch_length`` is that of the larger.
    """

    remarks: Sequence[str] = ()

    def __init__(self, first: Stream, second: Stream, share: float):
        self.first, self.second, self.share = first, second, share
        self.entropy = [*first.entropy, *second.entropy]
        self.epoch_length = max(first.epoch_length, second.epoch_length)

    def __getitem__(self, k: int) -> dict:
        rng = np.random.default_rng([*self.entropy, k])
        return (self.second if rng.random() < self.share else self.first)[k]


class Unpaired(Dataset):
    """Hazy and clear pictures of different scenes: item k holds item k of each stream, {hazy, clear, skipped}.

    ``epoch_length`` is the size of the larger pool.
    """

    remarks: Sequence[str] = ()

    def __init__(self, hazy: Stream, clear: Stream):
        self.hazy, self.clear = hazy, clear
        self.epoch_length = max(hazy.epoch_length, clear.epoch_length)

    def __getitem__(self, k: int) -> dict:
        hazy, clear = self.hazy[k], self.clear[k]
        return {"hazy": hazy["hazy"], "clear": clear["clear"], "skipped": hazy["skipped"] + clear["skipped"]}


class Replayed(Dataset):
    """Item k of ``game`` with item k of ``warm`` beside it, whose names get ``replay_`` in front."""

    remarks: Sequence[str] = ()

    def __init__(self, game: Dataset, warm: Dataset):
        self.game, self.warm, self.epoch_length = game, warm, game.epoch_length

    def __getitem__(self, k: int) -> dict:
        item, again = self.game[k], self.warm[k]
        skipped = item.pop("skipped") + again.pop("skipped")
        return item | {f"replay_{name}": value for name, value in again.items()} | {"skipped": skipped}


def training(settings: Settings, stage: str, kind: str, cache: Cache | None = None) -> Dataset:
    """The pictures of a stage of training, as the settings have it; what is odd about them is in its ``remarks``.

    ``kind``: ``paired`` hazy and clear pictures of one scene; ``unpaired`` ones, independently shuffled; ``synthetic``
    haze or the ``degraded`` imaging model on clear pictures. Unpaired without data.hazy, the hazy pictures are clear
    ones of another stream, with synthetic haze. The stage ``warm_start`` has clear pictures and depth of its own, and
    may take a part of its pictures from a pool without depth, outdoors. With warm_start.replay, unpaired pictures come
    with those of the warm start.
    ``cache``, of data.cache GiB, is one for all stages; None keeps nothing. Raises `UserError` if they are not to be
    found, or hazy pictures lack their ground truth.
    """
    data, warm = settings.data, settings.warm_start
    if data.pairs and kind != "paired":
        raise UserError(f"data.pairs={data.pairs}: {settings.model} does not train on pairs; empty it, set data.clear")
    cut = partial(crop, shape=data.crop_shape, rule=data.crop, flip=data.flip, view=data.view)
    add_haze = partial(haze.random_haze, law=settings.haze)

    remarks: list[str] = []

    def find(source: str, extensions: frozenset[str] = images.EXTENSIONS) -> list[Path]:
        remarks.extend(images.passed_over(source, extensions))
        return images.find(source, extensions)

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
            made = synthetic(stage, partial(haze.degrade, settings=settings.degradations))
        case "unpaired":
            clear = stream(_required(data.clear, "data.clear"), "clear")
            made = Unpaired(synthetic("hazy", add_haze) if data.hazy is None else stream(data.hazy, "hazy"), clear)
            made = Replayed(made, supervised("warm_start")) if warm.replay else made
        case _:
            raise ValueError(f"no such kind of training pictures: {kind}")
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
        raise UserError(f"{key} is not set: name a folder or a .flist of {what} pictures, as {key}=PATH")
    return source


def _clear_and_depth(settings: Settings, stage: str, find: Callable) -> tuple[list[Path], list[Path] | None]:
    """The clear pictures of a stage, and the depth maps if there are any."""
    data, warm = settings.data, settings.warm_start
    if stage == "warm_start":
        clear, depth = _required(warm.clear or data.clear, "warm_start.clear"), warm.depth
    else:
        clear, depth = _required(data.clear, "data.clear"), data.depth
    return find(clear), None if depth is None else find(depth, images.DEPTH_EXTENSIONS)


def _pairs(settings: Settings, prefix: str) -> tuple[list[tuple[Path, Path]], list[str]]:
    """All pairs of the sets that data.``prefix``pairs names, or those of two pools; and what is odd about them."""
    data = settings.data
    names, hazy, clear = (getattr(data, prefix + key) for key in ("pairs", "hazy", "clear"))
    pools = f"data.{prefix}hazy and data.{prefix}clear"
    if names and (hazy is not None or clear is not None):
        raise UserError(f"data.{prefix}pairs={names} and {pools} are two sources of pairs; empty one of them")
    if names:
        return locate.pairs(names, data.root)
    if hazy is None and clear is None:
        raise UserError(f"no pairs: set data.{prefix}pairs to sets by name, as data.{prefix}pairs=[ITS], or {pools}")
    hazy, clear = _required(hazy, f"data.{prefix}hazy"), _required(clear, f"data.{prefix}clear")
    found, remarks = pairing.pairs(hazy, clear)
    return found, [*images.passed_over(hazy), *images.passed_over(clear), *remarks]


def _named(path: Path, transform: Transform, image: Pixels | Stack, rng: np.random.Generator) -> Tensor:
    try:
        return transform(image, rng)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
