"""Reading depth maps: float and 16-bit TIFF, PNG, PFM, NumPy's .npy, MATLAB's .mat, OpenEXR.

Unlike images, depth maps have no white level and no fixed bit depth: any real value >= 0 is allowed.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from utils.errors import UserError

EXTENSIONS = frozenset({".npy", ".mat", ".exr", ".pfm"})  # in addition to those of images
REQUIREMENTS = "requirements-extras.txt"
AXES = ("Z", "Y", "R", "V")  # channels of an EXR file that hold depth, the usual name first


def load(path: Path) -> np.ndarray | None:
    """The values (H,W) of an array file; None if the file is to be read as an image. Raises `UserError`."""
    reader = READERS.get(path.suffix.lower())
    return None if reader is None else reader(path)


def plane(path: Path, values: np.ndarray) -> np.ndarray:
    """``values`` (H,W), (1,H,W) or (H,W,1) as (H,W). Raises `UserError` for any other shape and for non-numbers."""
    if values.ndim == 3 and 1 in (values.shape[0], values.shape[2]):
        values = values[0] if values.shape[0] == 1 else values[..., 0]
    if values.ndim != 2 or values.size == 0 or values.dtype.kind not in "iuf":
        raise UserError(
            f"{path}: {values.dtype} of shape {values.shape} is not a depth map; save numbers of shape (H, W)"
        )
    return values


def check(path: Path, depth: np.ndarray) -> None:
    """Raise `UserError` for values that cannot be distances, with the number of each kind."""
    counts = {
        "NaN": np.isnan(depth).sum(),
        "infinite": np.isinf(depth).sum(),
        "negative": (np.isfinite(depth) & (depth < 0)).sum(),
    }
    invalid = [f"{count} {kind}" for kind, count in counts.items() if count]
    if invalid or depth.max() == 0:
        problem = f"{' and '.join(invalid)} of {depth.size} values" if invalid else "all are zero"
        raise UserError(
            f"{path}: depth must be finite, not negative and not zero everywhere ({problem}); fill such pixels, for "
            f"instance sky with the largest depth, or remove the image"
        )


def _npy(path: Path) -> np.ndarray:
    return plane(path, _read(path, lambda: np.load(path, allow_pickle=False), "a .npy array", "numpy.save"))


def _tif(path: Path) -> np.ndarray | None:
    """TIFF that Pillow misreads: float16, float64, 32 and 64 bits, float RGB. None for any other."""
    tifffile = _module("tifffile", "tifffile", path)  # a dependency of scikit-image
    try:
        with tifffile.TiffFile(path) as file:
            page = file.pages[0]
            rotated = page.tags.valueof("Orientation", 1) != 1
            if rotated or (page.dtype.itemsize < 4 and page.dtype.kind != "f"):
                return None
            values = page.asarray()
    except Exception:  # unknown compression or damage: Pillow reads it or reports the error
        return None
    if values.ndim == 3 and (values == values[..., :1]).all():
        values = values[..., :1]
    return plane(path, values)


def _mat(path: Path) -> np.ndarray:
    """The only matrix of a MATLAB file, or the only one with depth in its name."""
    io = _module("scipy.io", "SciPy", path)
    remedy = "save(name, 'depth', '-v7') of MATLAB"  # -v7.3 is HDF5, which SciPy does not read
    variables: Any = _read(path, lambda: io.loadmat(path), "a .mat file", remedy)
    matrices = {
        name: value
        for name, value in variables.items()
        if not name.startswith("__") and isinstance(value, np.ndarray) and value.dtype.kind in "iuf" and value.size > 1
    }
    depth_names = [name for name in matrices if "depth" in name.lower()]
    names = depth_names if len(depth_names) == 1 else list(matrices)
    if len(names) != 1:
        problem = f"holds several matrices ({', '.join(names)})" if names else "holds no matrix of numbers"
        raise UserError(f"{path}: {problem}; save one, named depth")
    return plane(path, matrices[names[0]])


def _exr(path: Path) -> np.ndarray:
    """The depth of an OpenEXR file: its channel Z, or else its only one."""
    openexr = _module("OpenEXR", "OpenEXR", path)

    def read() -> dict[str, np.ndarray]:
        with openexr.File(str(path), separate_channels=True) as file:
            return {name: np.array(channel.pixels) for name, channel in file.channels().items()}

    channels = _read(path, read, "an OpenEXR file", "one channel Z")
    name = next((axis for axis in AXES if axis in channels), None)
    if name is None and len(channels) == 1:
        name = next(iter(channels))
    others = [other for other in ("R", "G", "B") if name == "R" and other in channels]
    if name is None or any((channels[other] != channels[name]).any() for other in others):
        raise UserError(
            f"{path}: none of the channels {', '.join(sorted(channels))} is known to be depth; save it as Z"
        )
    return plane(path, channels[name])


READERS: dict[str, Callable[[Path], np.ndarray | None]] = {
    ".npy": _npy,
    ".mat": _mat,
    ".exr": _exr,
    ".tif": _tif,
    ".tiff": _tif,
}


def _module(name: str, package: str, path: Path) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"{path}: {package} is not installed; pip install -r {REQUIREMENTS}, or save .npy") from None


def _read(path: Path, read: Callable, kind: str, remedy: str) -> np.ndarray:
    if not path.is_file():
        raise UserError(f"{path}: no such depth map; check the path")
    try:
        return read()
    except Exception as error:  # on broken bytes these readers raise nearly any kind
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"{path}: cannot be read as {kind} ({reason}); save it again with {remedy}") from error
