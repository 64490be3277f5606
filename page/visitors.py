"""The visitors of the page and their images; uploads are deleted when their visitor leaves."""

import contextlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from data import images
from page import work
from utils.errors import UserError

KEEP = 12  # files of shown images; the browser may still be loading earlier ones
KEEP_RESULTS = 2  # results; the browser may still be loading the one before
LINGER = 600.0  # seconds for which the server's first copy of an upload is kept
IDLE = 6 * 3600.0  # seconds without activity after which a visitor counts as gone


class Visitor:
    """One open page: its images, in a folder of its own, and the image shown."""

    def __init__(self, root: Path):
        self.folder = Path(tempfile.mkdtemp(prefix="visitor-", dir=root))
        self._taken: dict[Path, Path] = {}  # by the server's file of the upload
        self.view: work.View | None = None
        self.strength = 1.0  # of the image shown
        self._shown: list[Path] = []  # folders, and so are these
        self._results: list[Path] = []
        self.seen = time.monotonic()

    def take(self, files: Sequence[str | Path], megapixels: float) -> list[str]:
        """Replace the visitor's images by ``files``; returns one message for every refused file.

        Files that were taken before are kept as they are, since the server's own copies may be deleted by now.
        """
        uploads = self.new_folder()
        before = self._taken
        self.view = None
        self._taken = {}

        def take(source: Path) -> None:
            if source in before:
                self._taken[source] = before[source]
                return
            work.check(source, megapixels)
            # A copy, since another visitor's upload of the same bytes may be the same file.
            self._taken[source] = shutil.copyfile(source, uploads / work.unused(source.name, self.images))

        refused = work.for_each([Path(file) for file in files], take, lambda done: True)
        kept = {path.parent for path in self._taken.values()} | {*self._results}  # one may be in the making
        for folder in self.folder.iterdir():
            if folder not in kept:
                shutil.rmtree(folder, ignore_errors=True)
        return refused

    @property
    def images(self) -> dict[str, Path]:
        """The visitor's images by name."""
        return {path.name: path for path in self._taken.values()}

    def show(self, image: Tensor) -> str:
        """Write an image (1,C,H,W) for the browser, under a new name because of its cache, and delete old ones."""
        path = self._folder_among(self._shown, KEEP) / "shown.jpg"
        images.write(path, image[0])
        return str(path)

    def result_folder(self) -> Path:
        """A new folder for what is downloaded; old ones are deleted. Raises `UserError` if the visitor has left."""
        return self._folder_among(self._results, KEEP_RESULTS)

    def new_folder(self) -> Path:
        """A new folder among the visitor's own. Raises `UserError` if the visitor has left."""
        try:
            return Path(tempfile.mkdtemp(dir=self.folder))
        except FileNotFoundError as error:
            raise UserError("these images were deleted when the page was left; drop them again") from error

    def _folder_among(self, folders: list[Path], keep: int) -> Path:
        """A new folder, the last of ``folders``, of which only the last ``keep`` are kept."""
        folders.append(self.new_folder())
        for old in folders[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
        del folders[:-keep]
        return folders[-1]


class Visitors:
    """All visitors by the session hash of their page, in one folder that is deleted when the server ends."""

    def __init__(self, root: Path):
        self.root = root
        self._here: dict[str, Visitor] = {}
        self._lock = threading.Lock()

    def get(self, session: str) -> Visitor:
        with self._lock:
            visitor = self._here.get(session) or self._here.setdefault(session, Visitor(self.root))
            visitor.seen = time.monotonic()
            return visitor

    def is_here(self, visitor: Visitor) -> bool:
        return visitor in list(self._here.values())

    @contextlib.contextmanager
    def at_work(self, visitor: Visitor) -> Iterator[None]:
        """A context after which the folder is deleted (again) if the visitor has left meanwhile."""
        try:
            yield
        finally:
            if not self.is_here(visitor):
                shutil.rmtree(visitor.folder, ignore_errors=True)

    def leave(self, session: str) -> None:
        with self._lock:
            visitor = self._here.pop(session, None)
        if visitor:
            shutil.rmtree(visitor.folder, ignore_errors=True)

    def sweep(self) -> None:
        """Delete the server's own copies of uploads after `LINGER` seconds, and drop idle visitors."""
        now = time.monotonic()
        for session in [session for session, visitor in list(self._here.items()) if now - visitor.seen > IDLE]:
            self.leave(session)
        folders = {visitor.folder for visitor in list(self._here.values())}
        for folder, _, names in os.walk(self.root):
            if not folders & {Path(folder), *Path(folder).parents}:
                for name in names:
                    _delete_old(Path(folder, name))


def _delete_old(path: Path) -> None:
    try:
        if time.time() - path.stat().st_mtime > LINGER:
            path.unlink()
    except FileNotFoundError:  # the visitor has left meanwhile
        pass
