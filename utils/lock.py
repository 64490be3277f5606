"""A folder for one process at a time: a second one is refused by name, and one that died leaves no trouble."""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from utils import processes
from utils.errors import UserError
from utils.files import clear_temporaries, writing

NAME = ".lock"
PATIENCE = 1.0  # seconds for another process to write who it is


@contextlib.contextmanager
def held(folder: Path) -> Iterator[str]:
    """Inside, ``folder``, which is there, is this process's. Gives "", or a remark on the dead owner before it.

    The owner's host, number and start stand in the folder's file ``.lock``. Raises `UserError` while another process
    has it; where that is gone (no such process on this machine, or its number is another's by now) it is replaced, and
    what dead processes had begun to write in the folder is removed.
    """
    path, own = folder / NAME, _own()
    remark = ""
    with writing(path):
        while not _create(path, own):
            owner = _owner(path)
            if owner is not None and _alive(owner):
                raise UserError(_refusal(folder, path, owner))
            if _remove(path, owner):
                remark = f"the last run in {folder}{_named(owner)} ended without a word; its lock is taken over"
    try:
        clear_temporaries(folder)
        yield remark
    finally:
        if _owner(path) == own:
            with contextlib.suppress(OSError):
                path.unlink()


def _own() -> dict:
    return {"host": processes.host(), "process": os.getpid(), "started": processes.started(os.getpid())}


def _create(path: Path, own: dict) -> bool:
    """Write the lock, unless there is one."""
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    try:
        os.write(file, json.dumps(own).encode())
        os.fsync(file)
    except OSError:
        path.unlink()
        raise
    finally:
        os.close(file)
    return True


def _owner(path: Path) -> dict | None:
    """Who holds the lock; None where it does not say so, even after some patience, or is gone."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            owner = json.loads(path.read_text(encoding="utf-8"))
            return owner if isinstance(owner["process"], int) and isinstance(owner["host"], str) else None
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            if time.monotonic() > until:
                return None
        time.sleep(0.05)


def _alive(owner: dict) -> bool:
    """Of another machine nothing can be known, so it counts as alive."""
    if owner["host"] != processes.host():
        return True
    started = processes.started(owner["process"])
    return processes.alive(owner["process"]) and started == owner.get("started", started)


def _remove(path: Path, owner: dict | None) -> bool:
    """Take the lock of a dead ``owner`` away; False, and it is as before, if another process was faster."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        os.replace(path, aside)
    except FileNotFoundError:
        return False
    try:
        if _owner(aside) == owner:
            return True
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)  # it was a new one: put back
        return False
    finally:
        aside.unlink()


def _named(owner: dict | None) -> str:
    return f" (process {owner['process']})" if owner else ""


def _refusal(folder: Path, path: Path, owner: dict) -> str:
    who = f"{folder} is in use by process {owner['process']} on {owner['host']}"
    if owner["host"] == processes.host():
        return f"{who}: wait for it, end it (kill {owner['process']}), or name another folder"
    return f"{who}, which cannot be asked from here: if it runs no more, remove {path}; or name another folder"
