"""Atomic writing of files and of lines, reading of JSON lines, and digests of files."""

import contextlib
import errno
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

import safetensors.torch

from utils import processes
from utils.errors import UserError, quoted

# Extensions in which images are written, and Pillow's name of the format. Inputs of other formats become PNG.
IMAGE_FORMATS = {".png": "PNG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF"}
IMAGE_FORMATS |= dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), "JPEG")


def expand_home(path: str | Path) -> Path:
    """``path`` with the home folder in place of ``~``. Raises `UserError` for ``~name`` where no user has that name."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        name = Path(path).parts[0]
        raise UserError(f"{quoted(path)}: there is no home folder {quoted(name)}; write the path in full") from None


def temporary_path(path: Path) -> Path:
    """A hidden temporary path in the folder of ``path``, with a name short enough for a file system.

    torch.save stores the name up to its last dot in the file; that part is the same for all files and processes.
    """
    start = path.name[:40].replace(".", "_")
    number = zlib.crc32(os.fsencode(path.name))
    return path.with_name(f".unfinished.{start}-{number:08x}-{os.getpid()}")


# Names of temporary files, with the process that writes them, of this and of earlier versions.
TEMPORARY = re.compile(r"\.unfinished\..+-(\d+)|\..+\.(\d+)\.(?:tmp|part)")


def sha256(path: Path) -> str:
    """The SHA-256 of a file; it identifies the weights that a figure belongs to."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns errors in writing ``path`` (a file or a folder) inside into a `UserError`."""
    try:
        yield
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # torch's and safetensors' for a full disk
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {path}: {reason}; free some space or change the rights") from None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; the file written there replaces ``path`` if the block succeeds."""
    temporary = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """As `replacing`, with the file on the disk before it replaces ``path``, and errors as of `writing`."""
    with writing(path), replacing(path) as temporary:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically; undecodable bytes of file names are kept."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape", newline="\n")


def append_line(path: Path, line: str) -> None:
    """Append ``line`` to a file, whole or not at all, by one write. Raises `UserError` if it cannot be written.

    A last line that lacks its newline, as after a power failure, is completed first.
    """
    with writing(path):
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        try:
            size = os.fstat(file).st_size
            start = "\n" if _lacks_newline(file, size) else ""
            data = f"{start}{line}\n".encode("utf-8", "surrogateescape")
            if os.write(file, data) < len(data):  # the disk is full: remove the part that was written
                os.ftruncate(file, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(file)


def _lacks_newline(file: int, size: int) -> bool:
    if size == 0:
        return False
    os.lseek(file, size - 1, os.SEEK_SET)
    return os.read(file, 1) != b"\n"


def read_records(path: Path) -> tuple[list[dict], list[int]]:
    """The JSON objects of a file with one a line, and the numbers, from 1 on, of damaged lines.

    Both are empty for an absent file. Raises `UserError` for one that cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], []
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; change its rights, or remove it") from None
    records = []
    damaged = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                record = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict):
                records.append(record)
            else:
                damaged.append(number)
    return records, damaged


def clear_temporaries(folder: Path, parts: Iterable[str] = ()) -> None:
    """Remove the temporary files of processes that no longer run on this machine.

    Those in ``folder`` itself, and in its sub-folders ``parts`` and all below them.
    """
    for place, _, names in chain(islice(os.walk(folder), 1), *(os.walk(folder / part) for part in parts)):
        for path, match in ((Path(place, name), TEMPORARY.fullmatch(name)) for name in names):
            with contextlib.suppress(OSError):
                if match and not _writer_alive(path, int(match[1] or match[2])):
                    path.unlink()


def _writer_alive(path: Path, pid: int) -> bool:
    """Whether the process that wrote ``path`` still runs, and is not a later one with the same number."""
    return processes.alive(pid) and processes.started_at(pid) < path.stat().st_mtime + 2  # seconds: coarse clocks
