"""Sources that users name (folders, .flists, images, the sample set) as lists of files, and what is ignored in them."""

import difflib
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from data import depth as depth_files
from data import sample, video
from utils.errors import UserError, quoted
from utils.files import expand_home

Item = TypeVar("Item")

HEIF = frozenset({".heic", ".heif", ".hif"})
CAMERA = "3fr arw cr2 cr3 crw dcr dng erf iiq kdc mef mos mrw nef nrw orf pef raf raw rw2 rwl sr2 srf srw x3f"
OTHER = "jxl jxr psd psb xcf exr hdr svg eps ai ico pcx dds fits sgi"
UNREAD = frozenset(f".{kind}" for kind in f"{CAMERA} {OTHER}".split())


def _read_heif() -> bool:
    """Register the HEIC reader with Pillow, if its package is installed."""
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
RESULTS = ".dehazed"  # the file in an output folder that lists the sub-folders of images written by a run


def resolve(source: str | Path) -> Path:
    """Turn a source named by the user into a path; ``sample:SUB`` is folder SUB of the sample set, made if needed.

    ``~`` is the home folder. Raises `UserError` if the path does not exist.
    """
    name = str(source)
    if name.startswith("sample:"):
        return sample.part(name.removeprefix("sample:"))
    path = expand_home(name)
    if not os.path.exists(path):  # unlike path.exists(), it takes any text
        if os.path.islink(path):
            raise UserError(f"{path}: a broken link; fix or remove it")
        siblings = os.listdir(path.parent) if os.path.isdir(path.parent) else []
        close = difflib.get_close_matches(quoted(path.name), siblings, n=1)
        hint = f"; did you mean '{quoted(close[0])}'?" if close else "; check the path"
        if any(sign in path.name for sign in "*?"):
            hint = f"; patterns are not looked up here: name the folder {path.parent}, or a .flist"
        raise UserError(f"{quoted(path)}: no such file or folder (relative paths start from {Path.cwd()}){hint}")
    return path


def find(
    source: str | Path | Sequence[str | Path],
    extensions: frozenset[str] = EXTENSIONS,
    absent: list[str] | None = None,
) -> list[Path]:
    """List the images of a folder (with its subfolders, 2 before 10), an image file, a .flist, or several of these.

    Results of earlier runs in the folder or below are left out (see `mark_results`) and reported by `passed_over`.
    A .flist has one path a line; its order and repetitions are kept. Blank lines are skipped, and so are lines that
    begin with # unless a file has that name. Paths are relative to the working directory or else to the .flist. A
    file named by several sources is listed once. Never empty: raises `UserError` instead.

    Absent files raise `UserError` too, unless a list ``absent`` is given, which then gets one message for each, and
    at least one other file exists.
    """
    if not isinstance(source, str | Path):
        if len(source) == 1:
            return find(source[0], extensions, absent)
        return _find_all(source, extensions, absent)
    path = resolve(source)
    if path.is_dir():
        files = sorted(_walk(path, extensions).images, key=_natural_key)
        if not files:
            ignored = "".join(f"; {warning}" for warning in passed_over(path, extensions))
            raise UserError(
                f"{path}: no images in this folder or below{ignored}; expected {' '.join(sorted(extensions))}"
            )
        return files
    if path.suffix.lower() == ".flist":
        return _read_list(path, absent)
    if path.suffix.lower() not in extensions:
        if unread := describe_unread([path.name], extensions):
            raise UserError(f"{path}: {unread}")
        raise UserError(f"{path}: neither a folder, an image nor a .flist (a text file with one path a line)")
    return [path]


def _find_all(sources: Sequence[str | Path], extensions: frozenset[str], absent: list[str] | None) -> list[Path]:
    files: dict[Path, None] = {}
    for source in sources:
        try:
            files |= dict.fromkeys(find(source, extensions, absent))
        except UserError as error:
            if absent is None:
                raise
            absent.append(str(error))
    if absent and not files:
        raise UserError(absent[0])
    return list(files)


def folder_of(source: str | Path | Sequence[str | Path]) -> Path | None:
    """The path of ``source`` if it is a single folder, else None."""
    if not isinstance(source, str | Path):
        return folder_of(source[0]) if len(source) == 1 else None
    path = resolve(source)
    return path if path.is_dir() else None


def passed_over(source: str | Path | Sequence[str | Path], extensions: frozenset[str] = EXTENSIONS) -> list[str]:
    """Warnings, one line each, about what `find` leaves out: unsupported image formats, results of earlier runs."""
    if not isinstance(source, str | Path):
        return list(dict.fromkeys(warning for each in source for warning in passed_over(each, extensions)))
    try:
        path = resolve(source)
    except UserError:  # `find` reports it
        return []
    if not path.is_dir():
        return []
    walked = _walk(path, extensions)
    warnings = []
    if unread := describe_unread(walked.others, extensions):
        warnings.append(f"{path}: passed over {unread}")
    for folder, why in walked.unreadable:
        warnings.append(f"{quoted(folder)}: this folder cannot be opened ({why}); check its permissions")
    if walked.results:
        more = f" and {len(walked.results) - 1} more such folders" if len(walked.results) > 1 else ""
        warnings.append(
            f"{walked.results[0]}{more}: results of an earlier run, passed over; to use them, name that folder itself"
        )
    return warnings


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """``count`` of the ``items``, evenly spread over them, from the first on; all of them if there are no more."""
    count = min(count, len(items))
    return [items[k * len(items) // count] for k in range(count)]


def describe_unread(names: Iterable[str], extensions: frozenset[str] = EXTENSIONS) -> str:
    """How many files there are of each unsupported image or video format, and what to do; empty if there are none."""
    kinds = Counter(os.path.splitext(name)[1].lower() for name in names if not name.startswith("."))
    unread = {k: number for k, number in kinds.items() if k in (HEIF | UNREAD | video.EXTENSIONS) - extensions}
    if not unread:
        return ""
    counts = ", ".join(f"{number} {kind[1:].upper()}" for kind, number in sorted(unread.items()))
    remedies = ["HEIC is read with pillow-heif (pip install pillow-heif)"] if HEIF & unread.keys() else []
    remedies += ["convert them to PNG, TIFF or JPEG"] if unread.keys() - HEIF - video.EXTENSIONS else []
    remedies += ["to dehaze a clip, name it itself: --hazy CLIP"] if unread.keys() & video.EXTENSIONS else []
    return f"{counts}, of kinds that are not read; {', or '.join(remedies)}"


def mark_results(folder: Path, parts: Sequence[str]) -> None:
    """Record that ``parts``, sub-folders of ``folder``, hold output, so that no later run reads it as input."""
    try:
        (folder / RESULTS).write_text("".join(f"{part}\n" for part in parts), encoding="utf-8")
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"{folder / RESULTS}: cannot be written ({why}); check permissions and space") from error


def results(folder: str | Path) -> list[str]:
    """The sub-folders of ``folder`` that `mark_results` named."""
    try:
        return Path(folder, RESULTS).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError):
        return []


class _Walked(NamedTuple):
    images: list[Path]
    others: list[str]  # names of further files
    results: list[Path]  # folders that were not entered
    unreadable: list[tuple[str, str]]  # folders that cannot be opened, and why


def _walk(root: Path, extensions: frozenset[str]) -> _Walked:
    """Files below ``root`` by extension, links followed, each folder once; hidden names (macOS ._x.jpg) left out."""
    seen = set()
    walked = _Walked([], [], [], [])

    def on_error(error: OSError) -> None:
        walked.unreadable.append((error.filename, error.strerror))

    for folder, folders, names in os.walk(root, onerror=on_error, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link to a folder already visited
            folders.clear()
            continue
        seen.add(real)
        outputs = results(folder) if RESULTS in names else []
        walked.results.extend(Path(folder, name) for name in folders if name in outputs)
        folders[:] = [name for name in folders if not name.startswith(".") and name not in outputs]
        for name in names:
            if os.path.splitext(name)[1].lower() not in extensions:
                walked.others.append(name)
            elif not name.startswith("."):
                walked.images.append(Path(folder, name))
    return walked


def _natural_key(path: Path) -> tuple:
    """Sort key: runs of digits count as numbers, folders go part by part."""
    parts = [[int(run) if run.isdigit() else run for run in re.split("([0-9]+)", part.lower())] for part in path.parts]
    return parts, str(path)  # the plain name orders 1 and 01


def _read_list(path: Path, absent: list[str] | None = None) -> list[Path]:
    """The files that a .flist names, see `find`. Raises `UserError` that names the line."""
    lines = _read_lines(path)
    entries = [(number, line, _find_file(line, path.parent)) for number, line in enumerate(lines, 1) if line.strip()]
    entries = [entry for entry in entries if entry[2] or not entry[1].lstrip().startswith("#")]
    if not entries:
        raise UserError(f"{path}: names no files; write one path a line")
    missing = [(number, line.strip()) for number, line, file in entries if file is None]
    if missing and (absent is None or len(missing) == len(entries)):
        number, line = missing[0]
        raise UserError(
            f"{path}, line {number}: {len(missing)} of its {len(entries)} files are absent, the first {quoted(line)}; "
            f"{_why_absent(line, path.parent)}"
        )
    for number, line in missing:
        absent.append(
            quoted(f"{path}, line {number}: {quoted(line)} is absent; {_why_absent(line, path.parent)}", 1000)
        )
    return [file for _, _, file in entries if file is not None]


def _read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file; invalid bytes are kept by surrogateescape, as Python does for file names."""
    try:
        if not path.is_file():
            raise UserError(f"{path}: a pipe or a device, not a file; write the list to a file")
        text = path.read_bytes()
        if text.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise UserError(f"{path}: is UTF-16, as Windows writes it; save it as UTF-8, one path a line")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions and the disk") from error
    return text.decode("utf-8-sig", "surrogateescape").replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _find_file(line: str, folder: Path) -> Path | None:
    """The file that a line names, relative to the working directory or to ``folder``; None if there is none.

    If the line as it stands names none, it is tried without surrounding spaces, without quotes, and with the
    backslashes of Windows as slashes.
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
    if any(os.path.isdir(path) for path in (os.path.expanduser(line), folder / line)):
        return "that is a folder, and a .flist names files; name the folder itself instead of the list"
    splits = (line.split(separator) for separator in ("\t", ",", ";", None))
    columns = next((parts for parts in splits if len(parts) > 1), [line])
    if len(columns) > 1 and _find_file(columns[0], folder):
        first = quoted(columns[0])
        return f"{first} exists, but more text follows it: a .flist has one path a line; write one list for each column"
    return "paths are relative to the working directory or to the list"
