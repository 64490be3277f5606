"""Who is on the page, with which images; what was uploaded is deleted when its visitor leaves."""

import contextlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from data import images
from page import work
from utils.errors import UserError

KEEP = 12  # files of what is shown; the browser may still be loading the last but one
LINGER = 600.0  # seconds that the server's first copy of an upload may lie about
IDLE = 6 * 3600.0  # seconds after which a visitor who does nothing counts as gone, though the browser did not say so


class Visitor:
    """One open page: its images, in a folder of its own, and what is shown of them."""

    def __init__(self, root: Path):
        self.folder = Path(tempfile.mkdtemp(prefix="visitor-", dir=root))
        self._taken: dict[Path, Path] = {}  # by the file that the server made of the upload
        self.view: work.View | None = None
        self._shown: list[Path] = []
        self.seen = time.monotonic()

    def take(self, files: Sequence[str | Path], megapixels: float) -> list[str]:
        """Take these images in place of those that are here; returns what is refused, in words.

        Those among them that were taken before stay as they are: the server's own copies may be gone by now.
        """
        uploads, before, self.view = self.new_folder(), self._taken, None
        self._taken = {}

        def take(source: Path) -> None:
            if source in before:
                self._taken[source] = before[source]
                return
            work.check(source, megapixels)
            # A copy, since another visitor's upload of the same bytes may be the same file.
            self._taken[source] = shutil.copyfile(source, _free(uploads / source.name, self.pictures))

        refused = work.each([Path(file) for file in files], take, lambda done: True)
        kept = {path.parent for path in self._taken.values()}
        for folder in self.folder.iterdir():
            if folder not in kept:
                shutil.rmtree(folder, ignore_errors=True)
        return refused

    @property
    def pictures(self) -> dict[str, Path]:
        """The visitor's images by name."""
        return {path.name: path for path in self._taken.values()}

    def show(self, image: Tensor) -> str:
        """A file of an image (1,C,H,W) for the browser, under a new name, which no cache knows; old ones go."""
        path = self.new_folder() / "shown.jpg"
        images.write(path, image[0])
        self._shown.append(path)
        for old in self._shown[:-KEEP]:
            shutil.rmtree(old.parent, ignore_errors=True)
        self._shown = self._shown[-KEEP:]
        return str(path)

    def new_folder(self) -> Path:
        """A new folder among the visitor's own. Raises `UserError` if the visitor has left."""
        try:
            return Path(tempfile.mkdtemp(dir=self.folder))
        except FileNotFoundError as error:
            raise UserError("these images were deleted when the page was left; drop them again") from error


class Visitors:
    """All visitors by the name that the server gives a page, beneath one folder that goes when the server ends."""

    def __init__(self, root: Path):
        self.root = root
        self._here: dict[str, Visitor] = {}
        self._lock = threading.Lock()

    def get(self, name: str) -> Visitor:
        with self._lock:
            visitor = self._here.get(name) or self._here.setdefault(name, Visitor(self.root))
            visitor.seen = time.monotonic()
            return visitor

    def is_here(self, visitor: Visitor) -> bool:
        return visitor in list(self._here.values())

    @contextlib.contextmanager
    def at_work(self, visitor: Visitor) -> Iterator[None]:
        """What is written here for a visitor who leaves meanwhile is deleted too."""
        try:
            yield
        finally:
            if not self.is_here(visitor):
                shutil.rmtree(visitor.folder, ignore_errors=True)

    def leave(self, name: str) -> None:
        with self._lock:
            visitor = self._here.pop(name, None)
        if visitor:
            shutil.rmtree(visitor.folder, ignore_errors=True)

    def sweep(self) -> None:
        """Delete what the server itself keeps of uploads for longer than `LINGER`, and send idle visitors away."""
        now = time.monotonic()
        for name in [name for name, visitor in list(self._here.items()) if now - visitor.seen > IDLE]:
            self.leave(name)
        own = {visitor.folder for visitor in list(self._here.values())}
        for folder, _, names in os.walk(self.root):
            if not own & {Path(folder), *Path(folder).parents}:
                for name in names:
                    _delete_old(Path(folder, name))


def _delete_old(path: Path) -> None:
    try:
        if time.time() - path.stat().st_mtime > LINGER:
            path.unlink()
    except FileNotFoundError:  # its visitor has left meanwhile
        pass


def _free(path: Path, names: Collection[str]) -> Path:
    """``path``, or with a number if its name is among ``names``."""
    number, free = 1, path
    while free.name in names:
        number += 1
        free = path.with_name(f"{path.stem} ({number}){path.suffix}")
    return free
