"""What users name: folders, .flists, images and the sample set, as lists of files; what is passed over in them."""

import difflib
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from data import depth as depth_files
from data import sample, video
from utils.errors import UserError, quoted
from utils.files import expand_home

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


RESULTS = ".dehazed"  # the file that names, in a folder of results, the sub-folders of images that were made


def resolve(source: str | Path) -> Path:
    """Turn what the user names into a path: ``sample:SUB`` is folder SUB of the embedded sample set, made if need be.

    ``~`` is the home folder. Raises `UserError` if there is nothing there.
    """
    name = str(source)
    if name.startswith("sample:"):
        return sample.part(name.removeprefix("sample:"))
    path = expand_home(name)
    if not os.path.exists(path):  # which, unlike path.exists(), takes any text
        if os.path.islink(path):
            raise UserError(f"{path}: a link that leads nowhere; mend or remove it")
        beside = os.listdir(path.parent) if os.path.isdir(path.parent) else []
        close = difflib.get_close_matches(quoted(path.name), beside, n=1)
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

    What an earlier run has made in the folder or below is left out, see `mark_results`; `passed_over` tells of it.
    A .flist names one file a line, in its own order, as often as it says; blank lines are skipped, and so are those
    that begin with # and are no file's name; paths are relative to where the user stands or else to the .flist. What
    several sources name twice is listed once. Never empty: raises `UserError` instead.

    What is named and is not there is refused too, unless there is a list ``absent`` for what is to be said of it, and
    anything else to be found.
    """
    if not isinstance(source, str | Path):
        if len(source) == 1:
            return find(source[0], extensions, absent)
        return _find_all(source, extensions, absent)
    path = resolve(source)
    if path.is_dir():
        found = sorted(_walk(path, extensions).pictures, key=_natural)
        if not found:
            told = "".join(f"; {remark}" for remark in passed_over(path, extensions))
            wanted = " ".join(sorted(extensions))
            raise UserError(f"{path}: no images in this folder or below{told}; wanted: {wanted}")
        return found
    if path.suffix.lower() == ".flist":
        return _read_list(path, absent)
    if path.suffix.lower() not in extensions:
        if unread := describe_unread([path.name], extensions):
            raise UserError(f"{path}: {unread}")
        raise UserError(f"{path}: neither a folder, an image nor a .flist (a text file with one path a line)")
    return [path]


def _find_all(sources: Sequence[str | Path], extensions: frozenset[str], absent: list[str] | None) -> list[Path]:
    found: dict[Path, None] = {}
    for source in sources:
        try:
            found |= dict.fromkeys(find(source, extensions, absent))
        except UserError as error:
            if absent is None:
                raise
            absent.append(str(error))
    if absent and not found:
        raise UserError(absent[0])
    return list(found)


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
    try:
        path = resolve(source)
    except UserError:  # `find` tells of it
        return []
    if not path.is_dir():
        return []
    walked, remarks = _walk(path, extensions), []
    if unread := describe_unread(walked.others, extensions):
        remarks.append(f"{path}: passed over {unread}")
    remarks += [
        f"{quoted(folder)}: this folder cannot be opened ({why}); check its rights" for folder, why in walked.shut
    ]
    if walked.results:
        more = f" and {len(walked.results) - 1} more such folders" if len(walked.results) > 1 else ""
        remarks.append(
            f"{walked.results[0]}{more}: results of an earlier run, passed over; to take them, name that folder itself"
        )
    return remarks


def describe_unread(names: Iterable[str], extensions: frozenset[str] = EXTENSIONS) -> str:
    """Of files whose kind holds images but is not read: how many of which kind, and what to do. Empty if none are."""
    kinds = Counter(os.path.splitext(name)[1].lower() for name in names if not name.startswith("."))
    unread = {k: number for k, number in kinds.items() if k in (HEIF | RAW | OTHER | video.EXTENSIONS) - extensions}
    if not unread:
        return ""
    counts = ", ".join(f"{number} {kind[1:].upper()}" for kind, number in sorted(unread.items()))
    remedies = ["HEIC is read with pillow-heif (pip install pillow-heif)"] if HEIF & unread.keys() else []
    remedies += ["convert them to PNG, TIFF or JPEG"] if unread.keys() - HEIF - video.EXTENSIONS else []
    remedies += ["a clip is dehazed where it is named itself, --hazy CLIP"] if unread.keys() & video.EXTENSIONS else []
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


class _Walked(NamedTuple):
    pictures: list[Path]
    others: list[str]  # names of further files
    results: list[Path]  # folders that were not entered
    shut: list[tuple[str, str]]  # folders that cannot be opened, and why


def _walk(root: Path, extensions: frozenset[str]) -> _Walked:
    """Files below ``root`` by extension, links followed, each folder once; hidden names (macOS ._x.jpg) left out."""
    seen, walked = set(), _Walked([], [], [], [])

    def shut(error: OSError) -> None:
        walked.shut.append((error.filename, error.strerror))

    for folder, folders, names in os.walk(root, onerror=shut, followlinks=True):
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


def _read_list(path: Path, absent: list[str] | None = None) -> list[Path]:
    """The files that a .flist names, see `find`. Raises `UserError` that names the line."""
    lines = _lines(path)
    named = [(number, line, _listed(line, path.parent)) for number, line in enumerate(lines, 1) if line.strip()]
    named = [each for each in named if each[2] or not each[1].lstrip().startswith("#")]
    if not named:
        raise UserError(f"{path}: names no files; write one path a line")
    gone = [(number, line.strip()) for number, line, file in named if file is None]
    if gone and (absent is None or len(gone) == len(named)):
        number, line = gone[0]
        raise UserError(
            f"{path}, line {number}: {len(gone)} of its {len(named)} files are absent, the first {quoted(line)}; "
            f"{_why_absent(line, path.parent)}"
        )
    for number, line in gone:
        absent.append(
            quoted(f"{path}, line {number}: {quoted(line)} is absent; {_why_absent(line, path.parent)}", 1000)
        )
    return [file for _, _, file in named if file is not None]


def _lines(path: Path) -> list[str]:
    """Of a list in UTF-8; in a name that is none, its bytes are kept as Python keeps those of files' names."""
    try:
        if not path.is_file():
            raise UserError(f"{path}: a pipe or a device, not a file; write the list into a file")
        text = path.read_bytes()
        if text.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise UserError(f"{path}: is UTF-16, as Windows writes it; save it as UTF-8, one path a line")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its rights and the disk") from error
    return text.decode("utf-8-sig", "surrogateescape").replace("\r\n", "\n").replace("\r", "\n").split("\n")


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
        first = quoted(columns[0])
        return f"{first} is there, and more follows it: a .flist has one path a line, so write a list of each column"
    return "paths are relative to where you stand or to the list"
