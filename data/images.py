"""The one door through which pixels enter and leave, and the rules by which files are found and paired.

Pictures are decoded by content, not by name, turned upright by their EXIF tag and handed out as RGB tensors
(3,H,W), float32 in [0,1]. What cannot be read whole is refused with a `UserError`; nothing is guessed or filled in.
"""

import contextlib
import difflib
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from data.pixels import Pixels
from utils.errors import UserError
from utils.metrics import to_8bit

EXTENSIONS = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".tif", ".tiff"}
    | {".webp", ".gif", ".ppm", ".pgm", ".pnm", ".jp2", ".tga", ".avif"}
)
DEPTH_EXTENSIONS = EXTENSIONS | {".npy"}
MAX_PIXELS = 500_000_000
JPEG_QUALITY = 95


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

    8- and 16-bit pictures hold depth in steps, v standing for v + 0.5, as the haze law of RESIDE wants it:
    (v + 0.5) / (max + 0.5). So do .npy arrays of whole numbers; of fractions they hold the depth itself.
    Raises `UserError` for what is not a single channel, not finite, negative, or zero everywhere.
    """
    return depth_pixels(decode_depth(path))[:]


def decode_depth(path: str | Path) -> Tensor:
    """A depth map before it is divided by its maximum, (1,H,W) uint8, if it has 8 bits; else what `read_depth` says."""
    path = Path(path)
    depth = _load_array(path) if path.suffix.lower() == ".npy" else _single_channel(path)
    if depth.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(depth))[None]
    half = 0.5 if depth.dtype.kind in "iub" else 0.0
    depth = depth.astype(np.float64)
    if not np.isfinite(depth).all() or depth.min() < 0 or depth.max() + half == 0:
        raise UserError(f"{path}: depth must be finite, not negative and not zero everywhere; mend or remove it")
    return torch.from_numpy(((depth + half) / (depth.max() + half)).astype(np.float32))[None]


def depth_pixels(values: Tensor) -> Pixels:
    """What `decode_depth` returns, to be looked at as the numbers that `read_depth` returns."""
    if values.is_floating_point():
        return Pixels(values)
    return Pixels(values, ((np.arange(256) + 0.5) / (int(values.max()) + 0.5)).astype(np.float32))


def write(path: str | Path, image: Tensor, compress_level: int = 6) -> None:
    """Write (3,H,W) or (1,H,W), float in [0,1], as 8 bit by rounding: PNG, or JPEG if ``path`` ends in .jpg.

    Folders are made, and the file appears whole or not at all. Values outside [0,1] are clamped.
    """
    pixels = to_8bit(image)
    pixels = pixels[..., 0] if len(image) == 1 else pixels
    _save(Path(path), Image.fromarray(np.ascontiguousarray(pixels)), compress_level)


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

    A .flist names one file a line, in its own order, as often as it says; blank lines are skipped, and so are those
    that begin with # and are no file's name; paths are relative to where the user stands or else to the .flist. What
    several sources name twice is listed once. Never empty: raises `UserError` instead.
    """
    if not isinstance(source, str | Path):
        return list(dict.fromkeys(path for each in source for path in find(each, extensions)))
    path = resolve(source)
    if path.is_dir():
        found = sorted(_walk(path, extensions), key=_natural)
        if not found:
            raise UserError(f"{path}: no pictures in this folder or below; wanted: {' '.join(sorted(extensions))}")
        return found
    if path.suffix.lower() == ".flist":
        return _read_list(path)
    if path.suffix.lower() not in extensions:
        raise UserError(f"{path}: neither a folder, a picture nor a .flist (a text file with one path a line)")
    return [path]


def pair(hazy_source: str | Path, clear_source: str | Path) -> list[tuple[Path, Path]]:
    """Pair every hazy picture with its ground truth: [(hazy, clear), ...] in the order of the hazy ones.

    By stem, in any case: the same; ``_GT`` for ``_hazy`` (*-HAZE: 01_outdoor_hazy, 01_outdoor_GT); else what is left
    when endings at ``_`` are dropped until a ground truth fits (RESIDE, Haze4K: 1400_1, 0005_0.8_0.04).
    Raises `UserError` for a hazy picture with no ground truth, or with two.
    """
    hazy, clear = find(hazy_source), by_stem(find(clear_source))
    pairs = [(path, _truth(path, clear)) for path in hazy]
    alone = [path for path, truth in pairs if truth is None]
    if alone:
        raise UserError(
            f"{alone[0]}: no ground truth in {clear_source} ({len(alone)} of {len(hazy)} pictures have none); "
            f"add it, or name the pictures as RESIDE (1400_1 -> 1400) or O-HAZE (01_hazy -> 01_GT) do"
        )
    return pairs


def match_depth(clear: Sequence[Path], depth: Sequence[Path]) -> list[Path]:
    """The depth map of every clear picture, by stem. Raises `UserError` where there is none, or there are two."""
    stems = by_stem(depth)
    for path in clear:
        if path.stem.casefold() not in stems:
            raise UserError(f"{path}: no depth map {path.stem}.* in {depth[0].parent}; add it, or leave depth out")
    return [_only(path, stems[path.stem.casefold()], "depth maps") for path in clear]


def by_stem(paths: Iterable[Path]) -> dict[str, list[Path]]:
    """Group files by name without extension, case folded."""
    stems = defaultdict(list)
    for path in paths:
        stems[path.stem.casefold()].append(path)
    return dict(stems)


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
    image = _decode(path)
    if image.mode.startswith("I"):
        return _whole_numbers(path, image)
    pixels = np.array(image if image.mode == "L" else _rgb(path, image))
    if pixels.ndim == 3:
        if (pixels != pixels[..., :1]).any():
            raise UserError(f"{path}: a coloured picture cannot be a depth map; save depth as 8- or 16-bit grey")
        pixels = pixels[..., 0]
    return pixels


def _load_array(path: Path) -> np.ndarray:
    try:
        depth = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: cannot be read as a .npy array ({error}); save it again with numpy.save") from error
    if depth.ndim == 3 and 1 in (depth.shape[0], depth.shape[2]):  # (1,H,W) or (H,W,1)
        depth = depth[0] if depth.shape[0] == 1 else depth[..., 0]
    if depth.ndim != 2 or depth.size == 0 or depth.dtype.kind not in "iuf":
        raise UserError(f"{path}: {depth.dtype} of shape {depth.shape} is no depth map; save numbers of shape (H, W)")
    return depth


def _save(path: Path, image: Image.Image, compress_level: int = 6) -> None:
    formats = {".png": ("PNG", {"compress_level": compress_level})}
    formats[".jpg"] = formats[".jpeg"] = ("JPEG", {"quality": JPEG_QUALITY})
    if path.suffix.lower() not in formats:
        raise UserError(f"{path}: pictures are written as .png or .jpg; give it such a name")
    format, options = formats[path.suffix.lower()]
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(part, format=format, **options)
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); check rights and space") from error


def _walk(root: Path, extensions: frozenset[str]) -> Iterable[Path]:
    """Files below ``root`` by extension, links followed, each folder once; hidden names (macOS ._x.jpg) left out."""
    seen = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in extensions:
                yield Path(folder, name)


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


def _truth(hazy: Path, clear: dict[str, list[Path]]) -> Path | None:
    stem = hazy.stem.casefold()
    parts = stem.split("_")
    shorter = ["_".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]
    for candidate in [stem, re.sub("_hazy$", "_gt", stem), *shorter]:
        if candidate in clear:
            truth = _only(hazy, clear[candidate], "ground truths")
            if truth.resolve() == hazy.resolve():
                raise UserError(f"{hazy}: hazy picture and ground truth are one file; name two different sources")
            return truth
    return None


def _only(path: Path, choices: list[Path], what: str) -> Path:
    if len(choices) > 1:
        raise UserError(f"{path}: has two {what}, {choices[0]} and {choices[1]}; keep one")
    return choices[0]
