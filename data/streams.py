"""Endless shuffled streams of images, of pairs, and of clear images with added haze: pure functions of the position."""

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from data import pictures, synthesis
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
    """A random crop (C,h,w) of ``shape`` (h,w) from (C,H,W), all in [0,1]. Stack images to be cropped alike along C.

    ``rule``: ``random`` is a plain crop; raises `UserError` if the image is smaller. The others crop a rectangle of
    that aspect ratio and resize it: ``short_side`` the largest one (for squares the released rule of NeDR and D4;
    bicubic, antialiased); ``view`` a share of the largest, uniform in ``view``, by antialiased bilinear interpolation,
    as a network with a working size sees images. ``flip``: mirrored with probability 1/2.
    """
    height, width = shape
    if rule != "random":
        scale = min(image.shape[1] / height, image.shape[2] / width)
        if rule == "view":
            scale *= rng.uniform(*view)
        height = max(1, round(scale * height))
        width = max(1, round(scale * width))
    if height > image.shape[1] or width > image.shape[2]:
        raise UserError(
            f"{image.shape[2]}x{image.shape[1]} is smaller than the crop of {_size(shape)}; set a smaller "
            f"data.crop_size or data.crop=short_side"
        )
    top = rng.integers(image.shape[1] - height + 1)
    left = rng.integers(image.shape[2] - width + 1)
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
    """An endless stream of images, in a new random order for every epoch.

    ``stream[k]``, k >= 0, is ``{name: transform(image, rng), "skipped": [...]}``. Each image comes once in an epoch
    of ``len(paths)``; streams of different ``name`` are shuffled independently. An unusable image is replaced by the
    next one in the order, and ``skipped`` gives the reason. Raises `UserError` if none can be used. ``cache`` saves
    decoding and changes nothing else.
    """

    remarks: Sequence[str] = ()  # warnings about the images, one line each

    def __init__(self, paths: Sequence, transform: Transform, seed: int, name: str, cache: Cache | None = None):
        self.paths = list(paths)
        self.transform = transform
        self.name = name
        self.cache = cache or Cache()
        self.entropy = [seed, zlib.crc32(name.encode())]
        self.epoch_length = len(self.paths)
        self._shuffled = (-1, np.empty(0, dtype=int))  # the last epoch requested, and its order
        self._announce()

    def _announce(self) -> None:
        """Announce to the cache which images will be read."""
        self.cache.add(self.paths)

    def __getitem__(self, k: int) -> dict:
        if k < 0:
            raise IndexError(f"position {k}: a stream starts at 0 and has no end")
        epoch, position = divmod(k, len(self.paths))
        order = self._order(epoch)
        skipped = []
        for step in range(len(order)):
            # Orders are seeded by [..., epoch], images by [..., k + 2^32]: never the same seed.
            rng = np.random.default_rng([*self.entropy, 2**32 + k])
            try:
                item = self._load(order[(position + step) % len(order)], rng)
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
        return {self.name: _transformed(path, self.transform, self.cache.image(path), rng)}


class Synthetic(Stream):
    """A stream of clear images with haze added on the fly: the items of ``add_haze``, with ``skipped``.

    ``add_haze(clear (3,h,w), depth (1,h,w) | None, rng)`` is called with the crop, as `synthesis.random_haze` or
    `degradations.degrade`. Depth maps are matched to the images by name, see `pairing`; without ``depth_paths`` it
    generates them. With probability ``mix`` a second image covers a part of the first (`synthesis.mixed`). The
    constructor raises `UserError` if an image has no depth map; a map of another size than its image is skipped like an
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
        mix: float = 0.0,
    ):
        self.mix = mix
        self.depth = None if depth_paths is None else pairing.match_depth(clear_paths, depth_paths)
        self.add_haze = add_haze
        super().__init__(clear_paths, transform, seed, name, cache)

    def _announce(self) -> None:
        self.cache.add(self.paths, self.depth or ())

    def _load(self, index: int, rng: np.random.Generator) -> dict:
        crops = self._crops(index, rng)
        if self.mix and rng.random() < self.mix:
            crops = synthesis.mixed(crops, self._crops(int(rng.integers(len(self.paths))), rng), rng)
        return self.add_haze(crops[:3], crops[3:] if self.depth else None, rng)

    def _crops(self, index: int, rng: np.random.Generator) -> Tensor:
        """The crop of an image, and of its depth if it has a map: (3 or 4,h,w)."""
        path = self.paths[index]
        image, depth = pictures.read_with_depth(path, self.depth and self.depth[index], self.cache)
        return _transformed(path, self.transform, image if depth is None else Stack((image, depth)), rng)


class Pairs(Stream):
    """A stream of hazy images with their ground truth, cropped and flipped alike: {hazy, clear, skipped}.

    A pair that cannot be read, or whose sizes do not fit by the rule of `Paired`, is skipped.
    """

    def _announce(self) -> None:
        self.cache.add(path for pair in self.paths for path in pair)

    def _load(self, index: int, rng: np.random.Generator) -> dict:
        pair = self.paths[index]
        crops = _transformed(pair[0], self.transform, Stack(read_pair(*pair, SOTS_BORDER, self.cache)), rng)
        return {"hazy": crops[:3], "clear": crops[3:]}


class Mixed(Dataset):
    """Two streams as one: item k is item k of ``second`` with probability ``share``, else item k of ``first``.

    The items of both have the same names. ``epoch_length`` is that of the larger.
    """

    remarks: Sequence[str] = ()

    def __init__(self, first: Stream, second: Stream, share: float):
        self.first = first
        self.second = second
        self.share = share
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
        self.hazy = hazy
        self.clear = clear
        self.epoch_length = max(hazy.epoch_length, clear.epoch_length)

    def __getitem__(self, k: int) -> dict:
        hazy = self.hazy[k]
        clear = self.clear[k]
        return {"hazy": hazy["hazy"], "clear": clear["clear"], "skipped": hazy["skipped"] + clear["skipped"]}


def _transformed(path: Path, transform: Transform, image: Pixels | Stack, rng: np.random.Generator) -> Tensor:
    try:
        return transform(image, rng)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


class Replayed(Dataset):
    """Item k of ``adversarial`` with item k of ``warm_start`` added to it, whose keys get the prefix ``replay_``."""

    remarks: Sequence[str] = ()

    def __init__(self, adversarial: Dataset, warm_start: Dataset):
        self.adversarial = adversarial
        self.warm_start = warm_start
        self.epoch_length = adversarial.epoch_length

    def __getitem__(self, k: int) -> dict:
        item = self.adversarial[k]
        replay = self.warm_start[k]
        skipped = item.pop("skipped") + replay.pop("skipped")
        return item | {f"replay_{name}": value for name, value in replay.items()} | {"skipped": skipped}
