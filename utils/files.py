"""Files written whole or not at all, and known by their digest."""

import contextlib
import hashlib
import os
import zlib
from pathlib import Path

import safetensors.torch

from utils.errors import UserError, quoted

# Endings of the pictures that are written, and what Pillow calls their kind. What was another becomes PNG.
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


def sha256(path: Path) -> str:
    """The digest of a file, which says which weights exactly a figure is of."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic(path: Path):
    """Give a temporary path beside ``path``; what was written there takes its place when the block ends well."""
    temporary = beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # torch and safetensors: a full disk
        why = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {path}: {why}; free some space or change the rights") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically; names of files that are no text are kept as they are."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape", newline="\n")
