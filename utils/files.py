"""Files written whole or not at all, and known by their digest."""

import contextlib
import hashlib
import os
from pathlib import Path

import safetensors.torch

from utils.errors import UserError


def sha256(path: Path) -> str:
    """The digest of a file, which says which weights exactly a figure is of."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic(path: Path):
    """Give a temporary path beside ``path``; what was written there takes its place when the block ends well.

    torch.save writes the name up to its last dot into the file: that is the same for all files and processes.
    """
    temporary = path.with_name(f".unfinished.{path.name.replace('.', '_')}-{os.getpid()}")
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
