"""The one door through which pixels enter and leave, and the rules by which files are found.

Images are decoded by content, not by name, turned upright by their EXIF tag and handed out as RGB tensors
(3,H,W), float32 in [0,1]. What cannot be read whole is refused with a `UserError`; nothing is guessed or filled in.
"""

import contextlib
import ctypes
import errno
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, _imaging
from torch import Tensor

from data import depth as depth_files
from data import keepsakes
from data.pixels import Pixels
from utils import files, memory
from utils.errors import ImageError, UserError, quoted
from utils.rounding import to_8bit

MAX_PIXELS = 500_000_000
READING = 16  # bytes a pixel that `read` takes at its height: three floats beside the steps that they come from
JPEG_QUALITY = 95
JPEG_EXIF = 65533  # bytes that a JPEG has room for
# Of the disk, not of one image: it would be so for the next one too.
LASTING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE})


def read(path: str | Path) -> Tensor:
    """Read an image of any kind as RGB: (3,H,W), float32 in [0,1].

    Grey becomes three equal channels, alpha is dropped, 16-bit grey is divided by 65535; of an animation or a
    multi-page file this is the first page. Raises `UserError` for anything that is not a whole image.
    """
    with _enough_memory(path):
        return Pixels(decode(path))[:]


def decode(path: str | Path) -> Tensor:
    """What `read` divides by 255: (3,H,W) uint8; of 16-bit grey what it returns. Raises `UserError` as it does."""
    with _enough_memory(path):
        return _steps(Path(path))


def _steps(path: Path) -> Tensor:
    image = _decode(path)
    if image.mode.startswith("I"):
        grey = torch.from_numpy(_whole_numbers(path, image).astype(np.float32) / 65535)
        return grey.expand(3, -1, -1).contiguous()
    pixels = torch.from_numpy(np.array(_rgb(path, image)))  # (H,W,3); a copy, since PyTorch wants to own it
    return pixels.permute(2, 0, 1)


def read_depth(path: str | Path) -> Tensor:
    """Read a depth map, far is large, divided by its own maximum: (1,H,W), float32 in [0,1].

    Whole numbers are depth in steps, v standing for v + 0.5, as the haze law of RESIDE wants it:
    (v + 0.5) / (max + 0.5). Fractions are the depth itself: of .npy, .mat, .exr, .pfm and float TIFF (`data.depth`).
    Raises `UserError` for what is not a single channel, not finite, negative, or zero everywhere.
    """
    return depth_pixels(decode_depth(path))[:]


def decode_depth(path: str | Path) -> Tensor:
    """A depth map before it is divided by its maximum, (1,H,W) uint8, if it has 8 bits; else what `read_depth` says."""
    with _enough_memory(path):
        return _depth(Path(path))


def _depth(path: Path) -> Tensor:
    depth = depth_files.load(path)
    depth = _single_channel(path) if depth is None else depth
    if depth.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(depth))[None]
    half = 0.5 if depth.dtype.kind in "iub" else 0.0
    depth = depth.astype(np.float64)
    depth_files.check(path, depth + half)
    return torch.from_numpy(((depth + half) / (depth.max() + half)).astype(np.float32))[None]


def depth_pixels(values: Tensor) -> Pixels:
    """What `decode_depth` returns, to be looked at as the numbers that `read_depth` returns."""
    if values.is_floating_point():
        return Pixels(values)
    return Pixels(values, ((np.arange(256) + 0.5) / (int(values.max()) + 0.5)).astype(np.float32))


def write(
    path: str | Path,
    image: Tensor,
    compress_level: int = 6,
    like: str | Path | None = None,
    quality: int = JPEG_QUALITY,
) -> None:
    """Write (3,H,W) or (1,H,W), float in [0,1], as 8 bit by rounding: PNG, JPEG, WebP or TIFF, as the name ends.

    ``like`` is the image that it was made from, whose colours and EXIF it keeps (`data.keepsakes`). Folders are made,
    and the file appears whole or not at all. Values outside [0,1] are clamped. ``quality``: of JPEG and WebP.
    """
    pixels = to_8bit(image)
    pixels = pixels[..., 0] if len(image) == 1 else pixels
    kept = {} if like is None or len(image) == 1 else keepsakes.of(like, image.shape[-2:])
    _save(Path(path), Image.fromarray(np.ascontiguousarray(pixels)), compress_level, quality, **kept)


def write_depth(path: str | Path, depth: Tensor) -> None:
    """Write a depth map (1,H,W), float in [0,1], as 16-bit grey PNG; `read_depth` gives depth / max(depth) back."""
    steps = depth[0].cpu().double().clamp(0, 1).mul(65535).round().numpy().astype(np.uint16)
    _save(Path(path), Image.fromarray(steps))


def _decode(path: Path) -> Image.Image:
    """Open, load whole and turn upright. Raises `UserError`."""
    if not os.path.isfile(path):  # which, unlike path.is_file(), takes any text
        raise UserError(f"{quoted(path)}: {_no_file(path)}")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty; put the whole one in its place, or remove it")
    _silence_libtiff()
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # Pillow would warn of large photographs from 89 million pixels on
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            _check_memory(image)
            image.load()
            return _upright(image)
    except Exception as error:  # on broken bytes Pillow's decoders raise nearly any kind
        why, remedy = _unread(error)
        raise UserError(f"{path}: cannot be read as an image ({why}); {remedy}") from error


@functools.cache
def _silence_libtiff() -> None:
    """Keep the library in C, which Pillow brings, from writing to the terminal itself; Pillow's errors tell enough."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(_imaging.__file__)  # which is linked to it
        library.TIFFSetErrorHandler(None)
        library.TIFFSetWarningHandler(None)


def _no_file(path: Path) -> str:
    """Why there is nothing to read, and what to do."""
    if os.path.isdir(path):
        return "a folder, not an image; name a file in it"
    if os.path.exists(path):
        return "a pipe or a device, not a file; write what comes from it into a file"
    if os.path.islink(path):
        return "no such image: a link that leads nowhere; mend or remove it"
    return "no such image; check the path"


def _check_memory(image: Image.Image) -> None:
    """Refuse, before a byte of it is decoded, an image that does not fit into the memory that is free."""
    free = memory.free_memory(torch.device("cpu"))
    need = image.width * image.height * READING
    if need > free:
        raise MemoryError(f"its {image.width}x{image.height} pixels take {_gib(need)} to read, {_gib(free)} are free")


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


@contextlib.contextmanager
def _enough_memory(path: str | Path) -> Iterator[None]:
    """Turns a lack of memory inside, of whatever library, into a `UserError` that names the file."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not memory.exhausted(error):
            raise
        why, remedy = _unread(MemoryError())
        raise UserError(f"{path}: cannot be read as an image ({why}); {remedy}") from error


def _unread(error: Exception) -> tuple[str, str]:
    """Why an image could not be decoded, and what to do."""
    told = quoted(" ".join(str(error).split()))
    if isinstance(error, Image.UnidentifiedImageError):
        return "of no known image format, or damaged at its beginning", "convert it to PNG or JPEG, or remove it"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"it has more than {MAX_PIXELS:,} pixels", "shrink it or cut it into parts"
    if isinstance(error, MemoryError):
        return told or "there is too little memory for it", "free some memory, or shrink it"
    if isinstance(error, OSError) and error.errno is not None:
        return error.strerror, "check its rights and the disk"
    return f"{told or type(error).__name__}: damaged or cut short", "put a whole copy in its place, or remove it"


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the pixels are whole; a broken EXIF block only fails to say which side is up
        return image.copy()


def _rgb(path: str | Path, image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise UserError(f"{path}: 32-bit float pixels have no agreed white; save it with 8 or 16 bit")
    try:
        # A palette with transparency goes by way of RGBA, as Pillow asks.
        return (image.convert("RGBA") if image.mode in ("P", "PA") else image).convert("RGB")
    except ValueError as error:
        raise UserError(f"{path}: {image.mode} pixels cannot become RGB; save it as RGB") from error


def _whole_numbers(path: str | Path, image: Image.Image) -> np.ndarray:
    """(H,W) of an image in one of Pillow's integer modes (I, I;16, I;16B ...), which must fit 16 bit."""
    values = np.array(image)
    if values.min() < 0 or values.max() > 65535:
        raise UserError(f"{path}: pixels beyond 16 bit have no agreed white; save it with 8 or 16 bit")
    return values.astype(np.uint16)


def _single_channel(path: Path) -> np.ndarray:
    """(H,W) of a depth map that is an image, in the numbers of the file: 8, 16 or 32 bit, or float."""
    image = _decode(path)
    if image.mode == "F" or image.mode.startswith("I"):
        return np.array(image)
    pixels = np.array(image if image.mode == "L" else _rgb(path, image))
    if pixels.ndim == 3:
        if (pixels != pixels[..., :1]).any():
            raise UserError(f"{path}: a coloured image cannot be a depth map; save depth as grey, of any bit depth")
        pixels = pixels[..., 0]
    return pixels


def _save(path: Path, image: Image.Image, compress_level: int = 6, quality: int = JPEG_QUALITY, **kept: bytes) -> None:
    if path.suffix.lower() not in files.IMAGE_FORMATS:
        raise UserError(f"{path}: images are written as .png, .jpg, .webp or .tif; give it such a name")
    format = files.IMAGE_FORMATS[path.suffix.lower()]
    options = {"PNG": {"compress_level": compress_level}, "TIFF": {"compression": "tiff_deflate"}}
    options = options.get(format, {"quality": quality})
    options |= {k: v for k, v in kept.items() if format != "JPEG" or k != "exif" or len(v) <= JPEG_EXIF}
    part = files.temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(part, format=format, **options)
        os.replace(part, path)
    except (OSError, ValueError) as error:  # WebP ends at 16383 pixels a side, JPEG at 65535
        with contextlib.suppress(OSError):
            part.unlink()
        why = getattr(error, "strerror", None) or error
        small = max(image.size) < 16384 or format not in ("WEBP", "JPEG")
        remedy = "check rights and space" if small else f"{format} is not for so large images; write PNG"
        kind = UserError if getattr(error, "errno", None) in LASTING else ImageError
        raise kind(f"{path}: cannot be written ({why}); {remedy}") from error
