"""The page's work on images: check them, estimate the haze, change the strength, write the results."""

import zipfile
from collections.abc import Callable, Collection
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

SHOWN = 1280  # pixels of the longer side on the page; downloads have full size
SUFFIX = "_dehazed"
COMPRESSION = 3  # of PNG: a third of the time of Pillow's 6, and files a few percent larger


class View(NamedTuple):
    """An image as the page shows it, with the method's estimates, which suffice to change the strength."""

    hazy: Tensor  # (1,3,h,w) in [0,1]
    transmission: Tensor | None  # (1,1,h,w); None: the method estimates none, so strength has no effect
    airlight: Tensor | None  # (1,3,1,1)
    dehazed: Tensor  # (1,3,h,w) in [0,1]

    def clear(self, strength: float) -> Tensor:
        if self.transmission is None:
            return self.dehazed
        return physics.restore_partly(self.hazy, self.transmission, self.airlight, strength)


def check(path: Path, megapixels: float) -> None:
    """Raise `UserError` for a file that is not an image or is too large, from its header alone."""
    try:
        Image.MAX_IMAGE_PIXELS = images.MAX_PIXELS  # else Pillow warns of smaller images
        with Image.open(path) as image:
            width, height = image.size
    except Exception:  # on broken bytes Pillow raises nearly any kind; `images.decode` has the message
        images.decode(path)
        raise
    if width * height > megapixels * 1e6:
        raise UserError(
            f"{path}: {width}x{height} are {width * height / 1e6:.0f} megapixels, and this page accepts "
            f"{megapixels:g}; shrink it, or dehaze it with test.py"
        )


@torch.no_grad()
def estimate(path: Path, method: Method) -> View:
    """The estimates of ``method`` for an image at full size, reduced to the size shown. Raises `UserError`."""
    hazy, outputs = _estimate(path, method)
    haze = (_reduced(outputs["transmission"]), outputs["airlight"]) if "transmission" in outputs else (None, None)
    return View(_reduced(hazy).clamp(0, 1), *haze, _reduced(outputs["clear"]).clamp(0, 1))


@torch.no_grad()
def write(path: Path, method: Method, strength: float, folder: Path) -> Path:
    """Dehaze an image at its full size into ``folder``, in its format if that can be written, else as PNG.

    ``strength`` has no effect if the method estimates no transmission.
    """
    _, outputs = _estimate(path, method, strength)
    ending = path.suffix if path.suffix.lower() in files.IMAGE_FORMATS else ".png"
    output = folder / f"{path.stem}{SUFFIX}{ending}"
    images.write(output, outputs["clear"][0], COMPRESSION, like=path)
    return output


def message(error: UserError, path: Path) -> str:
    """The error message with the image's name in place of its path on the server."""
    return str(error).replace(quoted(path, LONGEST), quoted(path.name)).replace(quoted(path), quoted(path.name))


def for_each(paths: list[Path], do: Callable[[Path], None], proceed: Callable[[int], bool]) -> list[str]:
    """Call ``do`` for every image while ``proceed``, given the number done, is true; returns the error messages."""
    refused = []
    for done, path in enumerate(paths):
        if not proceed(done):
            break
        try:
            do(path)
        except UserError as error:
            refused.append(message(error, path))
    return refused


def write_zip(
    archive: Path, paths: list[Path], write: Callable[[Path], Path], proceed: Callable[[int], bool]
) -> list[str]:
    """The files that ``write`` makes of all images, in one zip; see `for_each`."""
    with zipfile.ZipFile(archive, "w") as file:  # without compression: images are compressed already

        def add(path: Path) -> None:
            written = write(path)
            file.write(written, unused(written.name, file.namelist()))
            written.unlink()

        return for_each(paths, add, proceed)


def unused(name: str, names: Collection[str]) -> str:
    """``name``, with a number added if it is among ``names``."""
    number = 1
    free = name
    while free in names:
        number += 1
        free = f"{Path(name).stem} ({number}){Path(name).suffix}"
    return free


def _estimate(path: Path, method: Method, strength: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    try:
        hazy = images.read(path)[None]
        on_device = hazy.to(next(method.parameters(), hazy).device)
        outputs = method.estimate(on_device, method.tile(on_device, "auto"))
        if strength != 1 and "transmission" in outputs:
            outputs["clear"] = physics.restore_partly(on_device, outputs["transmission"], outputs["airlight"], strength)
        return hazy, {name: value.float().cpu() for name, value in outputs.items()}
    except (MemoryError, RuntimeError) as error:
        if memory.exhausted(error):
            raise UserError(f"{path}: there is too little memory for so many pixels; shrink it") from error
        raise


def _reduced(x: Tensor) -> Tensor:
    scale = SHOWN / max(x.shape[2:])
    if scale >= 1:
        return x
    size = [max(1, round(side * scale)) for side in x.shape[2:]]
    return F.interpolate(x, size, mode="bilinear", antialias=True)
