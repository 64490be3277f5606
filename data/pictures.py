"""Datasets of whole images, each once and in order: pairs to score on, folders to dehaze."""

import functools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from data import images
from data.cache import Cache
from data.pixels import Pixels
from utils.errors import UserError

SOTS_BORDER = 10  # pixels by which SOTS-indoor's official ground truth is larger on every side


class Paired(Dataset):
    """Whole images with their ground truth, to score on: {hazy, clear, name, path}; see `pairing.pairs`.

    A ground truth that is ``border`` pixels larger on every side is cropped at the centre: SOTS-indoor is shipped as
    640x480 against 620x460. Any other difference in size raises a `UserError`; nothing is ever resized.
    The name is the hazy image's path below ``root`` (or below the folder that all share).
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Path, Path]],
        root: str | Path | None = None,
        border: int = SOTS_BORDER,
        remarks: Sequence[str] = (),
    ):
        self.pairs = list(pairs)
        self.border = border
        self.remarks = list(remarks)
        self.names = names([hazy for hazy, _ in self.pairs], root)

    @property
    def files(self) -> list[Path]:
        """Every file that is read."""
        return [path for pair in self.pairs for path in pair]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict:
        hazy, clear = read_pair(*self.pairs[index], self.border, Cache())
        return {"hazy": hazy[:], "clear": clear[:], "name": self.names[index], "path": self.pairs[index][0]}


class Folder(Dataset):
    """Whole images to dehaze: {hazy, name, path}; the name is the path below ``root`` (or the folder all share)."""

    def __init__(self, paths: Sequence[Path], root: str | Path | None = None):
        self.paths = list(paths)
        self.names = names(self.paths, root)

    @property
    def files(self) -> list[Path]:
        """Every file that is read."""
        return self.paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict:
        path = self.paths[index]
        return {"hazy": images.read(path), "name": self.names[index], "path": path}


def doubts(paired: Paired) -> list[str]:
    """A warning if the hazy images look clearer than their ground truth, as when the folders are swapped; else none.

    Haze adds light to every channel, so the darkest channel of a hazy image should be the brighter one. Reads three.
    """
    clearer = 0
    checked = sorted({0, len(paired) // 2, len(paired) - 1})
    for index in checked:
        try:
            item = paired[index]
        except UserError:  # reported when the pair is scored
            continue
        clearer += bool(item["hazy"].amin(0).mean() < item["clear"].amin(0).mean())
    if clearer * 2 <= len(checked):
        return []
    return ["the hazy images look clearer than their ground truth; are the two folders swapped?"]


def read_pair(hazy_path: Path, clear_path: Path, border: int, cache: Cache) -> tuple[Pixels, Pixels]:
    """Both images, of equal size: a ground truth ``border`` larger on every side is cropped. Raises `UserError`."""
    hazy = cache.image(hazy_path)

    def inside(clear: Tensor) -> Tensor:
        larger = all(b - a == 2 * border for a, b in zip(hazy.whole, clear.shape[1:], strict=True))
        return clear[:, border:-border, border:-border] if border and larger else clear

    clear = cache.image(clear_path, inside)
    if hazy.whole != clear.whole:
        (h, w), (H, W) = hazy.whole, clear.whole
        raise UserError(f"{hazy_path} is {w}x{h} but its ground truth {clear_path} is {W}x{H}; crop them to one size")
    return hazy, clear


def of_other_size(pairs: Iterable[tuple[Path, Path]], border: int) -> list[str]:
    """A text for every pair that `read_pair` would refuse, by the files' headers; unreadable ones are passed over."""
    size = functools.cache(images.size)
    wrong = []
    for hazy, truth in pairs:
        if size(hazy) and size(truth):
            (w, h), (W, H) = size(hazy), size(truth)
            if (W - w, H - h) not in [(0, 0), (2 * border, 2 * border)]:
                wrong.append(f"{hazy} is {w}x{h} but its ground truth {truth} is {W}x{H}")
    return wrong


def names(paths: list[Path], root: str | Path | None = None) -> list[str]:
    """Paths relative to ``root`` if all lie below it, else to the folder that they share."""
    absolute = [Path(os.path.abspath(path)) for path in paths]
    root = None if root is None else Path(os.path.abspath(root))
    if root is None or not all(root in path.parents for path in absolute):
        root = os.path.commonpath([path.parent for path in absolute]) if absolute else "."
    return [path.relative_to(root).as_posix() for path in absolute]


def read_with_depth(clear: Path, depth: Path | None, cache: Cache | None = None) -> tuple[Pixels, Pixels | None]:
    """Read an image (3,H,W) and its depth map (1,H,W). Raises `UserError` if their sizes differ."""
    cache = cache or Cache()
    image = cache.image(clear)
    if depth is None:
        return image, None
    distance = cache.depth(depth)
    if distance.whole != image.whole:
        sizes = ["{1}x{0}".format(*pixels.whole) for pixels in (image, distance)]
        raise UserError(f"{clear} is {sizes[0]} but its depth map {depth} is {sizes[1]}; they must have one size")
    return image, distance
