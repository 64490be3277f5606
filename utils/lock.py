"""A lock that gives a folder to one process at a time, and that a dead process does not keep."""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from utils import processes
from utils.errors import UserError
from utils.files import clear_temporaries, temporary_path, writing

NAME = ".lock"
OWNER_TIMEOUT = 1.0  # seconds for another process to write its identity


@contextlib.contextmanager
def held(folder: Path) -> Iterator[str]:
    """Inside, this process owns ``folder``, which must exist. Yields "", or a warning about a dead previous owner.

    The owner's host, process number and start time are in the folder's file ``.lock``. Raises `UserError` while another
    process owns the folder. The lock of a dead process (not running on this machine, or its number is reused) is
    replaced, and temporary files of dead processes in the folder are removed.
    """
    path = folder / NAME
    identity = _this_process()
    warning = ""
    with writing(path):
        while not _create(path, identity):
            owner = _owner(path)
            if owner is not None and _is_alive(owner):
                raise UserError(_refusal(folder, path, owner))
            if _remove(path, owner):
                warning = f"the last run in {folder}{_process_text(owner)} did not release its lock; it is taken over"
    try:
        clear_temporaries(folder)
        yield warning
    finally:
        if _owner(path) == identity:
            with contextlib.suppress(OSError):
                path.unlink()


def _this_process() -> dict:
    return {"host": processes.host(), "process": os.getpid(), "started": processes.started(os.getpid())}


def _create(path: Path, identity: dict) -> bool:
    """Write the lock; False if there is one already."""
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    try:
        os.write(file, json.dumps(identity).encode())
        os.fsync(file)
    except OSError:
        path.unlink()
        raise
    finally:
        os.close(file)
    return True


def _owner(path: Path) -> dict | None:
    """The owner in the lock file; None where it is absent, or still incomplete after `OWNER_TIMEOUT`."""
    deadline = time.monotonic() + OWNER_TIMEOUT
    while True:
        try:
            owner = json.loads(path.read_text(encoding="utf-8"))
            return owner if isinstance(owner["process"], int) and isinstance(owner["host"], str) else None
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            if time.monotonic() > deadline:
                return None
        time.sleep(0.05)


def _is_alive(owner: dict) -> bool:
    """Whether the owner still runs; a process of another machine, which cannot be checked, counts as alive."""
    if owner["host"] != processes.host():
        return True
    started = processes.started(owner["process"])
    return processes.alive(owner["process"]) and started == owner.get("started", started)


def _remove(path: Path, owner: dict | None) -> bool:
    """Remove the lock of a dead ``owner``; False, with the lock unchanged, if another process was faster."""
    aside = temporary_path(path)
    try:
        os.replace(path, aside)
    except FileNotFoundError:
        return False
    try:
        if _owner(aside) == owner:
            return True
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)  # another process's new lock: restore it
        return False
    finally:
        aside.unlink()


def _process_text(owner: dict | None) -> str:
    return f" (process {owner['process']})" if owner else ""


def _refusal(folder: Path, path: Path, owner: dict) -> str:
    who = f"{folder} is in use by process {owner['process']} on {owner['host']}"
    if owner["host"] == processes.host():
        return f"{who}: wait for it, end it (kill {owner['process']}), or name another folder"
    return f"{who}, which cannot be checked from here: if it no longer runs, remove {path}; or name another folder"
