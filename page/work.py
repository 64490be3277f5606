"""What the page does with images, whoever asks: check, look, change the strength, write."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data import images
from models.method import Method
from utils import files, memory, physics
from utils.errors import LONGEST, UserError, quoted

SHOWN = 1280  # pixels of the longer side on the page; what is downloaded has all of them
SUFFIX = "_dehazed"
COMPRESSION = 3  # of PNG: a third of the time of Pillow's 6, and files a few percent larger


class View(NamedTuple):
    """An image as the page shows it, with what the method found in it: all that a change of strength needs."""

    hazy: Tensor  # (1,3,h,w) in [0,1]
    transmission: Tensor | None  # (1,1,h,w); None: the method finds none, and knows one strength alone
    airlight: Tensor | None  # (1,3,1,1)
    made: Tensor  # (1,3,h,w) in [0,1], what the method makes of it

    def clear(self, strength: float) -> Tensor:
        if self.transmission is None:
            return self.made
        return physics.restore_partly(self.hazy, self.transmission, self.airlight, strength)


def check(path: Path, megapixels: float) -> None:
    """Refuse what is no image, or too large, from its first bytes. Raises `UserError`."""
    try:
        Image.MAX_IMAGE_PIXELS = images.MAX_PIXELS  # Pillow would warn of less than the page takes
        with Image.open(path) as image:
            width, height = image.size
    except Exception:  # on broken bytes Pillow raises nearly any kind; the project's own reader finds the words
        images.decode(path)
        raise
    if width * height > megapixels * 1e6:
        raise UserError(
            f"{path}: {width}x{height} are {width * height / 1e6:.0f} megapixels, and this page takes {megapixels:g}; "
            f"shrink it, or dehaze it with test.py"
        )


@torch.no_grad()
def look(path: Path, method: Method) -> View:
    """What ``method`` finds in an image at its full size, made small enough to be shown. Raises `UserError`."""
    hazy, found = _found(path, method)
    haze = (_small(found["transmission"]), found["airlight"]) if "transmission" in found else (None, None)
    return View(_small(hazy).clamp(0, 1), *haze, _small(found["clear"]).clamp(0, 1))


@torch.no_grad()
def write(path: Path, method: Method, strength: float, folder: Path) -> Path:
    """Dehaze an image at its full size into ``folder``, in its format if that can be written, else as PNG.

    A method that finds no transmission knows one strength alone.
    """
    _, found = _found(path, method, strength)
    ending = path.suffix if path.suffix.lower() in files.IMAGE_FORMATS else ".png"
    output = folder / f"{path.stem}{SUFFIX}{ending}"
    images.write(output, found["clear"][0], COMPRESSION, like=path)
    return output


def told(error: UserError, path: Path) -> str:
    """The error's words with the picture's name in place of where the server keeps it."""
    return str(error).replace(quoted(path, LONGEST), quoted(path.name)).replace(quoted(path), quoted(path.name))


def each(paths: list[Path], do: Callable[[Path], None], going: Callable[[int], bool]) -> list[str]:
    """``do`` with every image while ``going`` says so, told how many are done; what could not be done, in words."""
    refused = []
    for done, path in enumerate(paths):
        if not going(done):
            break
        try:
            do(path)
        except UserError as error:
            refused.append(told(error, path))
    return refused


def write_zip(
    archive: Path, paths: list[Path], write: Callable[[Path], Path], going: Callable[[int], bool]
) -> list[str]:
    """What ``write`` makes of every image, in one file; see `each`."""
    with zipfile.ZipFile(archive, "w") as file:  # stored as they are: images are compressed already

        def add(path: Path) -> None:
            written = write(path)
            file.write(written, written.name)
            written.unlink()

        return each(paths, add, going)


def _found(path: Path, method: Method, strength: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    try:
        hazy = images.read(path)[None]
        there = hazy.to(next(method.parameters(), hazy).device)
        found = method.estimate(there, method.tile(there, "auto"))
        if strength != 1 and "transmission" in found:
            found["clear"] = physics.restore_partly(there, found["transmission"], found["airlight"], strength)
        return hazy, {name: value.float().cpu() for name, value in found.items()}
    except (MemoryError, RuntimeError) as error:
        if memory.exhausted(error):
            raise UserError(f"{path}: there is too little memory for so many pixels; shrink it") from error
        raise


def _small(x: Tensor) -> Tensor:
    scale = SHOWN / max(x.shape[2:])
    if scale >= 1:
        return x
    size = [max(1, round(side * scale)) for side in x.shape[2:]]
    return F.interpolate(x, size, mode="bilinear", antialias=True)
