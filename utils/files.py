"""Files written whole or not at all, lines that are added whole, and files known by their digest."""

import contextlib
import errno
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch

from utils import processes
from utils.errors import UserError, quoted

# Endings of the images that are written, and what Pillow calls their kind. What was another becomes PNG.
WRITTEN = {".png": "PNG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF"}
WRITTEN |= dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), "JPEG")


def home(path: str | Path) -> Path:
    """``path`` with the home folder in place of ``~``. Raises `UserError` for ``~name`` where no user has that name."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        name = Path(path).parts[0]
        raise UserError(f"{quoted(path)}: {quoted(name)} is nobody's home folder; write the path in full") from None


def beside(path: Path) -> Path:
    """A hidden name in the folder of ``path`` for what is to take its place, no longer than a file's name may be.

    torch.save writes the name up to its last dot into the file: that is the same for all files and processes.
    """
    start, number = path.name[:40].replace(".", "_"), zlib.crc32(os.fsencode(path.name))
    return path.with_name(f".unfinished.{start}-{number:08x}-{os.getpid()}")


# What is written first, by the process, now and by earlier versions.
TEMPORARY = re.compile(r"\.unfinished\..+-(\d+)|\..+\.(\d+)\.(?:tmp|part)")


def sha256(path: Path) -> str:
    """The digest of a file, which says which weights exactly a figure is of."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what goes wrong inside, in writing ``path`` (a file or a folder), into a `UserError`."""
    try:
        yield
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # torch and safetensors: a full disk
        why = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {path}: {why}; free some space or change the rights") from None


@contextlib.contextmanager
def atomic(path: Path):
    """Give a temporary path beside ``path``; what was written there takes its place when the block ends well."""
    temporary = beside(path)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically; names of files that are no text are kept as they are."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape", newline="\n")


def append_line(path: Path, line: str) -> None:
    """Add ``line`` to a file of lines, whole or not at all, by one write. Raises `UserError` if it cannot be written.

    A last line that a lost power left without its end is ended first, so that it spoils no other.
    """
    with writing(path):
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        try:
            before = os.fstat(file).st_size
            start = "\n" if _torn(file, before) else ""
            whole = f"{start}{line}\n".encode("utf-8", "surrogateescape")
            if os.write(file, whole) < len(whole):  # the disk is full: what did fit is taken back
                os.ftruncate(file, before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(file)


def _torn(file: int, size: int) -> bool:
    if size == 0:
        return False
    os.lseek(file, size - 1, os.SEEK_SET)
    return os.read(file, 1) != b"\n"


def read_records(path: Path) -> tuple[list[dict], list[int]]:
    """The JSON objects of a file with one a line, and the numbers of the lines, from 1 on, that are none: damaged.

    A file that is not there has neither. Raises `UserError` for one that may not be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], []
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; change its rights, or remove it") from None
    records, damaged = [], []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                record = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError):
                record = None
            records += [record] if isinstance(record, dict) else []
            damaged += [] if isinstance(record, dict) else [number]
    return records, damaged


def clear_temporaries(folder: Path) -> None:
    """Remove from ``folder`` what processes that are gone from this machine had begun to write under our own names."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            match = TEMPORARY.fullmatch(path.name)
            if match and path.is_file() and not _owned(path, int(match[1] or match[2])):
                with contextlib.suppress(OSError):
                    path.unlink()


def _owned(path: Path, pid: int) -> bool:
    """Does the process that began to write ``path`` still run? A later one of its number does not count."""
    return processes.alive(pid) and processes.started_at(pid) < path.stat().st_mtime + 2  # clocks are coarse
