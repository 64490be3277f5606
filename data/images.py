"""Reading and writing images and depth maps; all of the project's images pass through this module.

Images are decoded by content, not by name, turned upright by their EXIF tag and returned as RGB tensors (3,H,W),
float32 in [0,1]. A file that cannot be read completely raises a `UserError`; nothing is guessed or filled in.
"""

import contextlib
import ctypes
import errno
import functools
import os
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
READ_BYTES = 16  # peak memory of `read` in bytes per pixel: three floats beside the 8-bit steps
ORIENTATION = 0x0112  # the EXIF tag
QUARTER_TURNS = (5, 6, 7, 8)  # its values that swap width and height
JPEG_QUALITY = 95
JPEG_EXIF = 65533  # the most bytes of EXIF that a JPEG can hold
# Errors of the disk, not of one image: the next image would fail too.
DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE})


def read(path: str | Path) -> Tensor:
    """Read an image of any kind as RGB: (3,H,W), float32 in [0,1].

    Grey becomes three equal channels, alpha is dropped, 16-bit grey is divided by 65535; of an animation or a
    multi-page file this is the first page. Raises `UserError` for anything that is not a whole image.
    """
    with _enough_memory(path):
        return Pixels(decode(path))[:]


def decode(path: str | Path) -> Tensor:
    """Decode an image without dividing by 255: (3,H,W) uint8; 16-bit grey as `read` returns it. Errors as in `read`."""
    with _enough_memory(path):
        return _decode_rgb(Path(path))


def _decode_rgb(path: Path) -> Tensor:
    image = _open(path)
    if image.mode.startswith("I"):
        grey = torch.from_numpy(_integers(path, image).astype(np.float32) / 65535)
        return grey.expand(3, -1, -1).contiguous()
    pixels = torch.from_numpy(np.array(_rgb(path, image)))  # (H,W,3); a copy, since PyTorch needs writable memory
    return pixels.permute(2, 0, 1)


def size(path: str | Path) -> tuple[int, int] | None:
    """Width and height when upright, from the header alone; None if unreadable, which is reported on reading."""
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    with contextlib.suppress(Exception), Image.open(path) as image:  # on broken bytes Pillow raises nearly any kind
        exif = Image.Image.getexif(image)  # the method of PNG files would decode all pixels
        return image.size[::-1] if exif.get(ORIENTATION) in QUARTER_TURNS else image.size
    return None


def read_depth(path: str | Path) -> Tensor:
    """Read a depth map (larger is farther), divided by its own maximum: (1,H,W), float32 in [0,1].

    Integers are depth in steps, where v stands for v + 0.5, as the haze law of RESIDE needs it:
    (v + 0.5) / (max + 0.5). Floats are the depth itself: of .npy, .mat, .exr, .pfm and float TIFF (`data.depth`).
    Raises `UserError` for several channels and for depth that is not finite, negative, or zero everywhere.
    """
    values = decode_depth(path)
    return depth_pixels(values, int(values.max()))[:]


def decode_depth(path: str | Path) -> Tensor:
    """An 8-bit depth map before division by its maximum, (1,H,W) uint8; any other as `read_depth` returns it."""
    with _enough_memory(path):
        return _decode_depth(Path(path))


def _decode_depth(path: Path) -> Tensor:
    depth = depth_files.load(path)
    depth = _single_channel(path) if depth is None else depth
    if depth.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(depth))[None]
    half = 0.5 if depth.dtype.kind in "iub" else 0.0
    depth = depth.astype(np.float64)
    depth_files.check(path, depth + half)
    return torch.from_numpy(((depth + half) / (depth.max() + half)).astype(np.float32))[None]


def depth_pixels(values: Tensor, peak: int) -> Pixels:
    """The result of `decode_depth`, or a part of it, as `Pixels`; ``peak`` is the maximum of the whole map."""
    if values.is_floating_point():
        return Pixels(values)
    return Pixels(values, ((np.arange(256) + 0.5) / (peak + 0.5)).astype(np.float32))


def write(
    path: str | Path,
    image: Tensor,
    compress_level: int = 6,
    like: str | Path | None = None,
    quality: int = JPEG_QUALITY,
) -> None:
    """Write (3,H,W) or (1,H,W), float in [0,1], as 8 bit by rounding: PNG, JPEG, WebP or TIFF, by the extension.

    ``like`` is the source image, whose colour profile and EXIF are kept (`data.keepsakes`). Folders are made, and the
    write is atomic. Values outside [0,1] are clamped. ``quality`` is that of JPEG and WebP.
    """
    pixels = to_8bit(image)
    pixels = pixels[..., 0] if len(image) == 1 else pixels
    kept = {} if like is None or len(image) == 1 else keepsakes.metadata(like, image.shape[-2:])
    _save(Path(path), Image.fromarray(np.ascontiguousarray(pixels)), compress_level, quality, **kept)


def write_depth(path: str | Path, depth: Tensor) -> None:
    """Write a depth map (1,H,W), float in [0,1], as 16-bit grey PNG; `read_depth` gives depth / max(depth) back."""
    steps = depth[0].cpu().double().clamp(0, 1).mul(65535).round().numpy().astype(np.uint16)
    _save(Path(path), Image.fromarray(steps))


def _open(path: Path) -> Image.Image:
    """Open an image, load it completely and turn it upright. Raises `UserError`."""
    if not os.path.isfile(path):  # unlike path.is_file(), it takes any text
        raise UserError(f"{quoted(path)}: {_why_no_file(path)}")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty; replace it with a complete copy, or remove it")
    _silence_libtiff()
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # else Pillow warns from 89 million pixels on
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            _check_memory(image)
            image.load()
            return _upright(image)
    except Exception as error:  # on broken bytes Pillow's decoders raise nearly any kind
        why, remedy = _explain(error)
        raise UserError(f"{path}: cannot be read as an image ({why}); {remedy}") from error


@functools.cache
def _silence_libtiff() -> None:
    """Keep libtiff, which comes with Pillow, from printing to the terminal; Pillow raises its errors anyway."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(_imaging.__file__)  # linked to libtiff
        library.TIFFSetErrorHandler(None)
        library.TIFFSetWarningHandler(None)


def _why_no_file(path: Path) -> str:
    """Why there is nothing to read, and what to do."""
    if os.path.isdir(path):
        return "a folder, not an image; name a file in it"
    if os.path.exists(path):
        return "a pipe or a device, not a file; save its output to a file"
    if os.path.islink(path):
        return "no such image: a broken link; fix or remove it"
    return "no such image; check the path"


def _check_memory(image: Image.Image) -> None:
    """Raise `MemoryError`, before anything is decoded, if the image does not fit into the free memory."""
    free = memory.free_memory(torch.device("cpu"))
    need = image.width * image.height * READ_BYTES
    if need > free:
        raise MemoryError(f"its {image.width}x{image.height} pixels take {_gib(need)} to read, {_gib(free)} are free")


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def _enough_memory(path: str | Path) -> contextlib.AbstractContextManager[None]:
    """Turns a lack of memory of any library inside into a `UserError` that names the file."""
    why, remedy = _explain(MemoryError())
    return memory.shortage_as(lambda: UserError(f"{path}: cannot be read as an image ({why}); {remedy}"))


def _explain(error: Exception) -> tuple[str, str]:
    """Why an image could not be decoded, and what to do."""
    message = quoted(" ".join(str(error).split()))
    if isinstance(error, Image.UnidentifiedImageError):
        return "of no known image format, or damaged at its beginning", "convert it to PNG or JPEG, or remove it"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"it has more than {MAX_PIXELS:,} pixels", "shrink it or cut it into parts"
    if isinstance(error, MemoryError):
        return message or "there is too little memory for it", "free some memory, or shrink it"
    if isinstance(error, OSError) and error.errno is not None:
        return error.strerror, "check its permissions and the disk"
    return f"{message or type(error).__name__}: damaged or cut short", "replace it with a complete copy, or remove it"


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the pixels are intact; only the orientation is unknown
        return image.copy()


def _rgb(path: str | Path, image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise UserError(f"{path}: 32-bit float pixels have no agreed white; save it with 8 or 16 bit")
    try:
        # A palette with transparency goes by way of RGBA, as Pillow asks.
        return (image.convert("RGBA") if image.mode in ("P", "PA") else image).convert("RGB")
    except ValueError as error:
        raise UserError(f"{path}: {image.mode} pixels cannot become RGB; save it as RGB") from error


def _integers(path: str | Path, image: Image.Image) -> np.ndarray:
    """(H,W), an image in one of Pillow's integer modes (I, I;16, I;16B ...), whose values must fit 16 bit."""
    values = np.array(image)
    if values.min() < 0 or values.max() > 65535:
        raise UserError(f"{path}: pixels beyond 16 bit have no agreed white; save it with 8 or 16 bit")
    return values.astype(np.uint16)


def _single_channel(path: Path) -> np.ndarray:
    """(H,W), a depth map stored as an image, in the values of the file: 8, 16 or 32 bit, or float."""
    image = _open(path)
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
    try:
        with files.replacing(path) as part:
            image.save(part, format=format, **options)
    except (OSError, ValueError) as error:  # WebP allows 16383 pixels a side, JPEG 65535
        why = getattr(error, "strerror", None) or error
        small = max(image.size) < 16384 or format not in ("WEBP", "JPEG")
        remedy = "check permissions and space" if small else f"{format} does not allow images this large; write PNG"
        kind = UserError if getattr(error, "errno", None) in DISK_ERRORS else ImageError
        raise kind(f"{path}: cannot be written ({why}); {remedy}") from error
