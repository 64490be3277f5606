"""Whole images, each once and in order: pairs to score on, folders to dehaze."""

import os
from collections.abc import Sequence
from pathlib import Path

from torch.utils.data import Dataset

from data import images
from data.cache import Cache
from data.pixels import Pixels
from utils.errors import UserError

SOTS_BORDER = 10  # pixels by which SOTS-indoor's official ground truth is larger on every side


class Paired(Dataset):
    """Whole images with their ground truth, to score on: {hazy, clear, name, path}; see `pairing.pairs`.

    A ground truth that is ``border`` pixels larger on every side is cut at the centre: SOTS-indoor as RESIDE ships
    it, 640x480 against 620x460. Any other difference in size raises a `UserError`; nothing is ever resized.
    The name is the hazy picture's path below ``root`` (or what they share).
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Path, Path]],
        root: str | Path | None = None,
        border: int = SOTS_BORDER,
        remarks: Sequence[str] = (),
    ):
        self.pairs, self.border, self.remarks = list(pairs), border, list(remarks)
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
    """Whole images to dehaze: {hazy, name, path}, the name being the path below ``root`` (or what they share)."""

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
    """A warning where the hazy images look clearer than their ground truth, as in mixed-up folders; else none.

    Haze is light added to every channel, so a hazy picture's darkest channel is the brighter one. Looks at three.
    """
    clearer = 0
    looked = sorted({0, len(paired) // 2, len(paired) - 1})
    for index in looked:
        try:
            item = paired[index]
        except UserError:  # it will be told in its turn
            continue
        clearer += bool(item["hazy"].amin(0).mean() < item["clear"].amin(0).mean())
    if clearer * 2 <= len(looked):
        return []
    return ["the hazy images look clearer than their ground truth; are the two folders mixed up?"]


def read_pair(hazy_path: Path, clear_path: Path, border: int, cache: Cache) -> tuple[Pixels, Pixels]:
    """Both images, in one size: a ground truth ``border`` larger on every side is cut. Else raises `UserError`."""
    hazy, clear = cache.picture(hazy_path), cache.picture(clear_path)
    if border and all(b - a == 2 * border for a, b in zip(hazy.shape[1:], clear.shape[1:], strict=True)):
        clear = clear.inside(border)
    if hazy.shape != clear.shape:
        (_, h, w), (_, H, W) = hazy.shape, clear.shape
        raise UserError(f"{hazy_path} is {w}x{h} but its ground truth {clear_path} is {W}x{H}; crop them to one size")
    return hazy, clear


def names(paths: list[Path], root: str | Path | None = None) -> list[str]:
    """Paths relative to ``root`` if all lie below it, else to the folder that they share."""
    whole = [Path(os.path.abspath(path)) for path in paths]
    root = None if root is None else Path(os.path.abspath(root))
    if root is None or not all(root in path.parents for path in whole):
        root = os.path.commonpath([path.parent for path in whole]) if whole else "."
    return [path.relative_to(root).as_posix() for path in whole]


def read_with_depth(clear: Path, depth: Path | None, cache: Cache | None = None) -> tuple[Pixels, Pixels | None]:
    """Read an image (3,H,W) and its depth map (1,H,W). Raises `UserError` if their sizes differ."""
    cache = cache or Cache()
    picture = cache.picture(clear)
    if depth is None:
        return picture, None
    distance = cache.depth(depth)
    if distance.shape[1:] != picture.shape[1:]:
        sizes = [f"{pixels.shape[2]}x{pixels.shape[1]}" for pixels in (picture, distance)]
        raise UserError(f"{clear} is {sizes[0]} but its depth map {depth} is {sizes[1]}; they must have one size")
    return picture, distance
