"""The one door through which pixels enter and leave, and the rules by which files are found.

Pictures are decoded by content, not by name, turned upright by their EXIF tag and handed out as RGB tensors
(3,H,W), float32 in [0,1]. What cannot be read whole is refused with a `UserError`; nothing is guessed or filled in.
"""

import contextlib
import difflib
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from data import depth as depth_files
from data import keepsakes
from data.pixels import Pixels
from utils.errors import UserError
from utils.metrics import to_8bit

HEIF = frozenset({".heic", ".heif", ".hif"})
RAW = frozenset(
    f".{kind}"
    for kind in [
        "3fr",
        "arw",
        "cr2",
        "cr3",
        "crw",
        "dcr",
        "dng",
        "erf",
        "iiq",
        "kdc",
        "mef",
        "mos",
        "mrw",
        "nef",
        "nrw",
        "orf",
        "pef",
        "raf",
        "raw",
        "rw2",
        "rwl",
        "sr2",
        "srf",
        "srw",
        "x3f",
    ]
)
OTHER = frozenset(
    f".{kind}"
    for kind in [
        "jxl",
        "jxr",
        "psd",
        "psb",
        "xcf",
        "exr",
        "hdr",
        "svg",
        "eps",
        "ai",
        "ico",
        "pcx",
        "dds",
        "fits",
        "sgi",
        "mp4",
        "mov",
        "avi",
        "mkv",
        "m4v",
        "webm",
        "mpg",
        "mts",
    ]
)


def _read_heif() -> bool:
    """Teach Pillow to read HEIC, if the package for it is installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


EXTENSIONS = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".tif", ".tiff"}
    | {".webp", ".gif", ".ppm", ".pgm", ".pnm", ".jp2", ".tga", ".avif"}
    | (HEIF if _read_heif() else set())
)
DEPTH_EXTENSIONS = EXTENSIONS | depth_files.EXTENSIONS
MAX_PIXELS = 500_000_000
JPEG_QUALITY = 95
JPEG_EXIF = 65533  # bytes that a JPEG has room for
WRITTEN = {".png": "PNG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF"}
WRITTEN |= dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), "JPEG")
RESULTS = ".dehazed"  # the file that names, in a folder of results, the sub-folders of pictures that were made


def read(path: str | Path) -> Tensor:
    """Read a picture of any kind as RGB: (3,H,W), float32 in [0,1].

    Grey becomes three equal channels, alpha is dropped, 16-bit grey is divided by 65535; of an animation or a
    multi-page file this is the first page. Raises `UserError` for anything that is not a whole picture.
    """
    return Pixels(decode(path))[:]


def decode(path: str | Path) -> Tensor:
    """What `read` divides by 255: (3,H,W) uint8; of 16-bit grey what it returns. Raises `UserError` as it does."""
    image = _decode(Path(path))
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
    path = Path(path)
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

    ``like`` is the picture that it was made from, whose colours and EXIF it keeps (`data.keepsakes`). Folders are made,
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


def resolve(source: str | Path) -> Path:
    """Turn what the user names into a path: ``sample:SUB`` is folder SUB of the embedded sample set, made if need be.

    ``~`` is the home folder. Raises `UserError` if there is nothing there.
    """
    name = str(source)
    if name.startswith("sample:"):
        from data import sample  # here, not above: the sample set is itself made through this module

        return sample.part(name.removeprefix("sample:"))
    path = Path(name).expanduser()
    if not os.path.exists(path):  # which, unlike path.exists(), takes any text
        beside = os.listdir(path.parent) if os.path.isdir(path.parent) else []
        close = difflib.get_close_matches(path.name, beside, n=1)
        hint = f"; did you mean '{close[0]}'?" if close else "; check the path"
        if any(sign in path.name for sign in "*?"):
            hint = f"; patterns are not looked up here: name the folder {path.parent}, or a .flist"
        raise UserError(f"{path}: no such file or folder (relative paths start from {Path.cwd()}){hint}")
    return path


def find(source: str | Path | Sequence[str | Path], extensions: frozenset[str] = EXTENSIONS) -> list[Path]:
    """List the pictures of a folder (with its subfolders, 2 before 10), a picture file, a .flist, or several of these.

    What an earlier run has made in the folder or below is left out, see `mark_results`; `passed_over` tells of it.
    A .flist names one file a line, in its own order, as often as it says; blank lines are skipped, and so are those
    that begin with # and are no file's name; paths are relative to where the user stands or else to the .flist. What
    several sources name twice is listed once. Never empty: raises `UserError` instead.
    """
    if not isinstance(source, str | Path):
        if len(source) == 1:
            return find(source[0], extensions)
        return list(dict.fromkeys(path for each in source for path in find(each, extensions)))
    path = resolve(source)
    if path.is_dir():
        found = sorted(_walk(path, extensions).pictures, key=_natural)
        if not found:
            told = "".join(f"; {remark}" for remark in passed_over(path, extensions))
            wanted = " ".join(sorted(extensions))
            raise UserError(f"{path}: no pictures in this folder or below{told}; wanted: {wanted}")
        return found
    if path.suffix.lower() == ".flist":
        return _read_list(path)
    if path.suffix.lower() not in extensions:
        if unread := describe_unread([path.name], extensions):
            raise UserError(f"{path}: {unread}")
        raise UserError(f"{path}: neither a folder, a picture nor a .flist (a text file with one path a line)")
    return [path]


def folder_of(source: str | Path | Sequence[str | Path]) -> Path | None:
    """The folder that ``source`` is, if it is one and one alone."""
    if not isinstance(source, str | Path):
        return folder_of(source[0]) if len(source) == 1 else None
    path = resolve(source)
    return path if path.is_dir() else None


def passed_over(source: str | Path | Sequence[str | Path], extensions: frozenset[str] = EXTENSIONS) -> list[str]:
    """What `find` does not list though it could be thought to, a line each: unread kinds of files, earlier results."""
    if not isinstance(source, str | Path):
        return list(dict.fromkeys(remark for each in source for remark in passed_over(each, extensions)))
    path = resolve(source)
    if not path.is_dir():
        return []
    walked, remarks = _walk(path, extensions), []
    if unread := describe_unread(walked.others, extensions):
        remarks.append(f"{path}: passed over {unread}")
    if walked.results:
        more = f" and {len(walked.results) - 1} more such folders" if len(walked.results) > 1 else ""
        remarks.append(
            f"{walked.results[0]}{more}: results of an earlier run, passed over; to take them, name that folder itself"
        )
    return remarks


def describe_unread(names: Iterable[str], extensions: frozenset[str] = EXTENSIONS) -> str:
    """Of files whose kind holds pictures but is not read: how many of which kind, and what to do. Empty if none are."""
    kinds = Counter(os.path.splitext(name)[1].lower() for name in names if not name.startswith("."))
    unread = {kind: number for kind, number in kinds.items() if kind in (HEIF | RAW | OTHER) - extensions}
    if not unread:
        return ""
    counts = ", ".join(f"{number} {kind[1:].upper()}" for kind, number in sorted(unread.items()))
    remedies = ["HEIC is read with pillow-heif (pip install pillow-heif)"] if HEIF & unread.keys() else []
    remedies += ["convert them to PNG, TIFF or JPEG"] if unread.keys() - HEIF else []
    return f"{counts}, of kinds that are not read; {', or '.join(remedies)}"


def mark_results(folder: Path, parts: Sequence[str]) -> None:
    """Note that ``parts``, sub-folders of ``folder``, hold what a run makes, so that no later one takes it as input."""
    try:
        (folder / RESULTS).write_text("".join(f"{part}\n" for part in parts), encoding="utf-8")
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"{folder / RESULTS}: cannot be written ({why}); check rights and space") from error


def results(folder: str | Path) -> list[str]:
    """The sub-folders of ``folder`` that `mark_results` named."""
    try:
        return Path(folder, RESULTS).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError):
        return []


def _decode(path: Path) -> Image.Image:
    """Open, load whole and turn upright. Raises `UserError`."""
    if not path.is_file():
        what = "a folder, not a picture; name a file in it" if path.is_dir() else "no such picture; check the path"
        raise UserError(f"{path}: {what}")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty; put the whole one in its place, or remove it")
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # Pillow would warn of large photographs from 89 million pixels on
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            image.load()
            return _upright(image)
    except Exception as error:  # on broken bytes Pillow's decoders raise nearly any kind
        why, remedy = _unread(error)
        raise UserError(f"{path}: cannot be read as a picture ({why}); {remedy}") from error


def _unread(error: Exception) -> tuple[str, str]:
    """Why a picture could not be decoded, and what to do."""
    told = " ".join(str(error).split())
    if isinstance(error, Image.UnidentifiedImageError):
        return "of no known picture format, or damaged at its beginning", "convert it to PNG or JPEG, or remove it"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"it has more than {MAX_PIXELS:,} pixels", "shrink it or cut it into parts"
    if isinstance(error, MemoryError):
        return "there is too little memory for it", "free some, or shrink it"
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
    """(H,W) of a picture in one of Pillow's integer modes (I, I;16, I;16B ...), which must fit 16 bit."""
    values = np.array(image)
    if values.min() < 0 or values.max() > 65535:
        raise UserError(f"{path}: pixels beyond 16 bit have no agreed white; save it with 8 or 16 bit")
    return values.astype(np.uint16)


def _single_channel(path: Path) -> np.ndarray:
    """(H,W) of a depth map that is a picture, in the numbers of the file: 8, 16 or 32 bit, or float."""
    image = _decode(path)
    if image.mode == "F" or image.mode.startswith("I"):
        return np.array(image)
    pixels = np.array(image if image.mode == "L" else _rgb(path, image))
    if pixels.ndim == 3:
        if (pixels != pixels[..., :1]).any():
            raise UserError(f"{path}: a coloured picture cannot be a depth map; save depth as grey, of any bit depth")
        pixels = pixels[..., 0]
    return pixels


def _save(path: Path, image: Image.Image, compress_level: int = 6, quality: int = JPEG_QUALITY, **kept: bytes) -> None:
    if path.suffix.lower() not in WRITTEN:
        raise UserError(f"{path}: pictures are written as .png, .jpg, .webp or .tif; give it such a name")
    format = WRITTEN[path.suffix.lower()]
    options = {"PNG": {"compress_level": compress_level}, "TIFF": {"compression": "tiff_deflate"}}
    options = options.get(format, {"quality": quality})
    options |= {k: v for k, v in kept.items() if format != "JPEG" or k != "exif" or len(v) <= JPEG_EXIF}
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(part, format=format, **options)
        os.replace(part, path)
    except (OSError, ValueError) as error:  # WebP ends at 16383 pixels a side, JPEG at 65535
        with contextlib.suppress(OSError):
            part.unlink()
        why = getattr(error, "strerror", None) or error
        small = max(image.size) < 16384 or format not in ("WEBP", "JPEG")
        remedy = "check rights and space" if small else f"{format} is not for so large pictures; write PNG"
        raise UserError(f"{path}: cannot be written ({why}); {remedy}") from error


class _Walked(NamedTuple):
    pictures: list[Path]
    others: list[str]  # names of further files
    results: list[Path]  # folders that were not entered


def _walk(root: Path, extensions: frozenset[str]) -> _Walked:
    """Files below ``root`` by extension, links followed, each folder once; hidden names (macOS ._x.jpg) left out."""
    seen, walked = set(), _Walked([], [], [])
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        made = results(folder) if RESULTS in names else []
        walked.results.extend(Path(folder, name) for name in folders if name in made)
        folders[:] = [name for name in folders if not name.startswith(".") and name not in made]
        for name in names:
            if os.path.splitext(name)[1].lower() not in extensions:
                walked.others.append(name)
            elif not name.startswith("."):
                walked.pictures.append(Path(folder, name))
    return walked


def _natural(path: Path) -> tuple:
    """Sort key: runs of digits count as numbers, folders go part by part."""
    parts = [[int(run) if run.isdigit() else run for run in re.split("([0-9]+)", part.lower())] for part in path.parts]
    return parts, str(path)  # the plain name settles 1 against 01


def _read_list(path: Path) -> list[Path]:
    """The files that a .flist names, see `find`. Raises `UserError` that names the line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a text file ({error}); write one path a line, UTF-8") from error
    named = [(number, line, _listed(line, path.parent)) for number, line in enumerate(lines, 1) if line.strip()]
    named = [each for each in named if each[2] or not each[1].lstrip().startswith("#")]
    if not named:
        raise UserError(f"{path}: names no files; write one path a line")
    absent = [(number, line.strip()) for number, line, file in named if file is None]
    if absent:
        number, line = absent[0]
        raise UserError(
            f"{path}, line {number}: {len(absent)} of its {len(named)} files are absent, the first {line}; "
            f"{_why_absent(line, path.parent)}"
        )
    return [file for _, _, file in named]


def _listed(line: str, folder: Path) -> Path | None:
    """The file that a line names, from where the user stands or from ``folder``: as it is, else as programs write it.

    That is with spaces around it, in quotes, or with the backslashes of Windows.
    """
    bare = line.strip()
    plain = bare[1:-1] if len(bare) > 2 and bare[0] == bare[-1] and bare[0] in "\"'" else bare
    for name in dict.fromkeys((line, bare, plain, plain.replace("\\", "/"))):
        for file in (os.path.expanduser(name), folder / name):
            if os.path.isfile(file):
                return Path(file)
    return None


def _why_absent(line: str, folder: Path) -> str:
    """What may be wrong with a line that names no file, and what to do."""
    if any(os.path.isdir(place) for place in (os.path.expanduser(line), folder / line)):
        return "that is a folder, and a .flist names files; name the folder itself in place of the list"
    columns = next((cut for cut in (line.split(sign) for sign in ("\t", ",", ";", None)) if len(cut) > 1), [line])
    if len(columns) > 1 and _listed(columns[0], folder):
        return (
            f"{columns[0]} is there, and more follows it: a .flist has one path a line, so write a list of each column"
        )
    return "paths are relative to where you stand or to the list"
