"""The embedded sample set: a few photographs that ship inside scikit-image, with added haze. Needs no network.

    python -m data.sample [FOLDER]

train/{clear,depth,hazy} and test/{clear,hazy}, the latter paired as in RESIDE (coffee_1.png -> coffee.png). It is for
trying every command and for testing the code; it is too small to train a useful network.
The source and licence of each photograph are in the docstrings of skimage.data. The motorcycle is a scene of
Middlebury Stereo 2014 (Scharstein et al., GCPR 2014) with measured disparity.
"""

import argparse
import os
import shutil
import zlib
from importlib import resources
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from skimage.filters import median
from torch import Tensor

from data import images, synthesis
from utils import errors
from utils.errors import UserError, nearest, quoted
from utils.files import temporary_path

FOLDER = Path(__file__).with_name("sample_set")
TRAIN = ("astronaut.png", "rocket.jpg", "motorcycle_left.png", "motorcycle_right.png")
TEST = ("coffee.png", "chelsea.png")  # no scene of these is in TRAIN
DENSITIES = (0.7, 1.2, 1.7)  # of the hazy images _1, _2, _3 of each scene
LONG_SIDE = 400  # pixels
SEED = 10
DOFFS = 31.086  # Middlebury: depth is proportional to 1 / (disparity + this many pixels)
PARTS = ("train/clear", "train/depth", "train/hazy", "test/clear", "test/hazy")
MARKER = "complete.txt"  # lists the files, one a line
NOTE = "# The embedded sample set, version 1: made by data/sample.py, which replaces this folder if a file is missing."


def part(name: str) -> Path:
    """Folder ``name`` of the sample set at its default path, made if needed. Raises `UserError` if unknown."""
    name = name.strip("/")
    if name not in (*PARTS, "train", "test"):
        raise UserError(f"sample:{quoted(name)}: no such part of the sample set{nearest(name, PARTS)}")
    return make(FOLDER) / name


def make(folder: str | Path = FOLDER) -> Path:
    """Make the sample set in ``folder`` unless it is complete already; return the folder.

    Deterministic and atomic; several processes may call it at once. Raises `UserError` if the folder holds anything
    else.
    """
    folder = Path(folder)
    if _complete(folder):
        return folder
    if folder.exists() and not (folder / MARKER).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not the sample set; give another folder or remove it")
    part = temporary_path(folder)
    try:
        shutil.rmtree(part, ignore_errors=True)
        for split, names in (("train", TRAIN), ("test", TEST)):
            for name in names:
                _write_scene(part / split, name)
        files = sorted(path.relative_to(part).as_posix() for path in part.rglob("*.png"))
        (part / MARKER).write_text("\n".join([NOTE, *files, ""]))
        _move(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _complete(folder: Path) -> bool:
    marker = folder / MARKER
    if not marker.is_file():
        return False
    note, *files = marker.read_text().splitlines()
    return note == NOTE and all((folder / file).is_file() for file in files)


def _move(part: Path, folder: Path) -> None:
    """Rename ``part`` to ``folder``, replacing an incomplete set; a set finished by another process is kept."""
    if folder.is_dir() and not _complete(folder):
        shutil.rmtree(folder)
    try:
        os.replace(part, folder)
    except OSError as error:
        if not _complete(folder):
            raise UserError(f"{folder}: cannot be written ({error.strerror}); give another folder") from error


def _write_scene(folder: Path, name: str) -> None:
    stem = Path(name).stem
    rng = np.random.default_rng([SEED, zlib.crc32(stem.encode())])
    clear = _shrink(images.read(_shipped(name)))
    height, width = clear.shape[1:]
    if stem.startswith("motorcycle"):
        depth = _shrink(motorcycle_depth(right=stem.endswith("right")))
    else:
        depth = synthesis.smooth_depth(height, width, rng)
    images.write(folder / "clear" / f"{stem}.png", clear)
    if folder.name == "train":
        images.write_depth(folder / "depth" / f"{stem}.png", depth)
    for n, beta in enumerate(DENSITIES, 1):
        grey = float(rng.uniform(*synthesis.AIRLIGHT))
        hazy, _ = synthesis.add_haze(clear, depth, beta, torch.full((3,), grey))
        images.write(folder / "hazy" / f"{stem}_{n}.png", hazy)


def motorcycle_depth(right: bool) -> Tensor:
    """Depth of the motorcycle scene from the measured disparity of the left view: (1,500,741), largest value 1.

    For the right view the disparities are warped, the nearest taking precedence, and median filtered. Holes take the
    farther of their two neighbours in the row, since what the scanner missed is mostly occluded background.
    """
    with np.load(_shipped("motorcycle_disp.npz")) as archive:
        disparity = archive["arr_0"].astype(np.float64)
    disparity[~np.isfinite(disparity)] = np.nan
    if right:
        disparity = median(_fill_holes(_warp(disparity)), np.ones((5, 5)))
    depth = 1 / (_fill_holes(disparity) + DOFFS)
    return torch.from_numpy((depth / depth.max()).astype(np.float32))[None]


def _warp(disparity: np.ndarray) -> np.ndarray:
    """Warp disparities (H,W) from the left view to the right one, where they lie that many pixels further left."""
    # The map was downscaled by averaging: values at edges belong to neither side and are dropped.
    known = np.isfinite(disparity) & ~(np.abs(np.gradient(disparity, axis=1)) > 1)
    rows, columns = np.nonzero(known)
    values = disparity[rows, columns]
    columns = np.rint(columns - values).astype(int)
    order = np.argsort(values, kind="stable")  # nearest last, so that they overwrite the others
    order = order[columns[order] >= 0]
    warped = np.full_like(disparity, np.nan)
    warped[rows[order], columns[order]] = values[order]
    return warped


def _fill_holes(disparity: np.ndarray) -> np.ndarray:
    """Replace every NaN by the smaller of the nearest values to its left and right in the row."""
    width = disparity.shape[1]
    known = np.isfinite(disparity)
    columns = np.arange(width)
    left = np.maximum.accumulate(np.where(known, columns, -1), axis=1)
    right = np.minimum.accumulate(np.where(known, columns, width)[:, ::-1], axis=1)[:, ::-1]
    padded = np.pad(disparity, ((0, 0), (0, 1)), constant_values=np.nan)  # columns -1 and ``width``: no value
    rows = np.arange(len(disparity))[:, None]
    return np.fmin(padded[rows, left], padded[rows, right])


def _shrink(image: Tensor) -> Tensor:
    """Resize (C,H,W) to a long side of ``LONG_SIDE``."""
    height, width = image.shape[1:]
    scale = LONG_SIDE / max(height, width)
    size = (round(height * scale), round(width * scale))
    return F.interpolate(image[None], size, mode="bicubic", antialias=True)[0].clamp(0, 1)


def _shipped(name: str) -> Path:
    """A data file of the installed scikit-image, one that it ships rather than downloads."""
    path = Path(str(resources.files("skimage"))) / "data" / name
    if not path.is_file():
        raise UserError(f"{path}: missing from scikit-image; reinstall it (pip install --force-reinstall scikit-image)")
    return path


def main(arguments: list[str] | None = None) -> None:
    """The command; ``arguments`` as on the command line."""
    parser = argparse.ArgumentParser(prog="python -m data.sample", description="Make the embedded sample set.")
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER, help="output folder (data/sample_set)")
    print(f"sample set in {make(parser.parse_args(arguments).folder)}")


if __name__ == "__main__":
    errors.run(main)
