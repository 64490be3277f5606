"""Endless shuffled streams of images, pairs, and clear images made hazy: pure functions of the position."""

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from data import pictures
from data.cache import Cache
from data.pictures import SOTS_BORDER, read_pair
from data.pixels import Pixels, Stack
from data.sets import pairing
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

    ``random``: a plain crop; raises `UserError` if the image is smaller. The other two cut a rectangle of that aspect
    and resize it. ``short_side``: the largest there is (for squares the released rule of NeDR and D4; bicubic,
    antialiased). ``view``: a share of the largest, uniform in ``view``, by antialiased bilinear interpolation, as a
    network with a working size sees images. ``flip``: mirrored half the time.
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
    """Images in an order that is shuffled anew for every epoch, without end.

    ``stream[k]``, k >= 0, is ``{name: transform(image, rng), "skipped": [...]}``. Each image comes once an
    epoch of ``len(paths)``; streams of different ``name`` are shuffled independently. An image that cannot be used
    is replaced by the next one in the order, and ``skipped`` says why. Raises `UserError` if none can be used.
    ``cache`` spares decoding and changes nothing else.
    """

    remarks: Sequence[str] = ()  # what is odd about the images, a line each

    def __init__(self, paths: Sequence, transform: Transform, seed: int, name: str, cache: Cache | None = None):
        self.paths, self.transform, self.name, self.cache = list(paths), transform, name, cache or Cache()
        self.entropy = [seed, zlib.crc32(name.encode())]
        self.epoch_length = len(self.paths)
        self._shuffled = (-1, np.empty(0, dtype=int))  # the last epoch asked for, and its order
        self._announce()

    def _announce(self) -> None:
        """Tell the cache which images will be read."""
        self.cache.add(self.paths)

    def __getitem__(self, k: int) -> dict:
        if k < 0:
            raise IndexError(f"position {k}: a stream starts at 0 and has no end")
        epoch, place = divmod(k, len(self.paths))
        order, skipped = self._order(epoch), []
        for step in range(len(order)):
            # Orders draw from [..., epoch], images from [..., k + 2^32]: never the same numbers.
            rng = np.random.default_rng([*self.entropy, 2**32 + k])
            try:
                item = self._load(order[(place + step) % len(order)], rng)
            except UserError as error:
                skipped.append(str(error))
            else:
                return {**item, "skipped": skipped}
        raise UserError(f"none of the {len(order)} {self.name} images can be used; the first: {skipped[0]}")

    def _order(self, epoch: int) -> np.ndarray:
        if self._shuffled[0] != epoch:
            rng = np.random.default_rng([*self.entropy, epoch])
            self._shuffled = epoch, rng.permutation(len(self.paths))
        return self._shuffled[1]

    def _load(self, index: int, rng: np.random.Generator) -> dict:
        path = self.paths[index]
        return {self.name: _named(path, self.transform, self.cache.picture(path), rng)}


class Synthetic(Stream):
    """A stream of clear images made hazy on the fly: the items of ``add_haze``, with ``skipped``.

    ``add_haze(clear (3,h,w), depth (1,h,w) | None, rng)`` gets the crop and is as `synthesis.random_haze` or
    `degradations.degrade`. Depth maps are matched to the images by name, see `pairing`; without ``depth_paths`` it
    makes them up. Raises `UserError` at once if an image has no depth map; a map of another size than its image is
    skipped like an unreadable one.
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
        picture, depth = pictures.read_with_depth(path, self.depth and self.depth[index], self.cache)
        both = _named(path, self.transform, picture if depth is None else Stack((picture, depth)), rng)
        return self.add_haze(both[:3], None if depth is None else both[3:], rng)


class Pairs(Stream):
    """A stream of hazy images with their ground truth, cut and flipped alike: {hazy, clear, skipped}.

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
    """Hazy and clear images of different scenes: item k holds item k of each stream, {hazy, clear, skipped}.

    ``epoch_length`` is the size of the larger pool.
    """

    remarks: Sequence[str] = ()

    def __init__(self, hazy: Stream, clear: Stream):
        self.hazy, self.clear = hazy, clear
        self.epoch_length = max(hazy.epoch_length, clear.epoch_length)

    def __getitem__(self, k: int) -> dict:
        hazy, clear = self.hazy[k], self.clear[k]
        return {"hazy": hazy["hazy"], "clear": clear["clear"], "skipped": hazy["skipped"] + clear["skipped"]}


def _named(path: Path, transform: Transform, image: Pixels | Stack, rng: np.random.Generator) -> Tensor:
    try:
        return transform(image, rng)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


class Replayed(Dataset):
    """Item k of ``game`` with item k of ``warm`` beside it, whose names get ``replay_`` in front."""

    remarks: Sequence[str] = ()

    def __init__(self, game: Dataset, warm: Dataset):
        self.game, self.warm, self.epoch_length = game, warm, game.epoch_length

    def __getitem__(self, k: int) -> dict:
        item, again = self.game[k], self.warm[k]
        skipped = item.pop("skipped") + again.pop("skipped")
        return item | {f"replay_{name}": value for name, value in again.items()} | {"skipped": skipped}
