"""What a run tells while it goes: lines on the screen and in log.txt, figures in log.jsonl, TensorBoard."""

import contextlib
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid
from tqdm import tqdm

from utils import files
from utils.errors import UserError


class _Screen(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # of a terminal that was closed; the training does not end of it
            tqdm.write(self.format(record), file=sys.stderr)  # above the progress bar, not through it


class _File(logging.Handler):
    """Adds whole lines to a file. That one could not be written is told once, and the training goes on."""

    def __init__(self, path: Path, tell: Callable[[str], None]):
        super().__init__()
        self.path, self.tell = path, tell

    def emit(self, record: logging.LogRecord) -> None:
        try:
            files.append_line(self.path, self.format(record))
        except UserError as error:
            self.tell(str(error))


class Speed:
    """How fast a stage goes from ``step`` on, ``images`` images a step; ``waiting`` as of `data.loading.Waiting`."""

    def __init__(self, step: int, images: int, waiting: Any):
        self.images, self.waiting = images, waiting
        self.since = step, waiting.seconds, time.perf_counter()

    def figures(self, step: int) -> dict[str, float]:
        """Steps and images a second, and the share of the time spent in waiting for images, since the last call."""
        before, self.since = self.since, (step, self.waiting.seconds, time.perf_counter())
        steps, waited, seconds = (now - then for now, then in zip(self.since, before, strict=True))
        rate = steps / seconds
        return {"steps_per_second": rate, "images_per_second": rate * self.images, "waiting": waited / seconds}


class NullLog:
    """The log of a process that is not the first of several: the first one tells everything."""

    def say(self, *_, **__) -> None:
        """Nothing, as of all others."""

    warn_once = figures = pictures = flush = say

    def __enter__(self) -> "NullLog":
        return self

    def __exit__(self, *_) -> None: ...


class RunLog:
    """The log of one experiment folder, and its progress bar. A resumed run goes on from global step ``start``."""

    def __init__(self, folder: Path, start: int = 0):
        self.figures_file, self._seen = folder / "log.jsonl", set()
        with files.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            damaged = self._forget_after(start)
            # TensorBoard forgets the points from this step on.
            self.board = SummaryWriter(folder / "tensorboard", purge_step=start + 1)
        self.log = logging.getLogger(f"nedr-dehaze.{folder}")
        self.log.setLevel(logging.DEBUG)
        self.log.propagate = False
        screen, file = _Screen(), _File(folder / "log.txt", self._lost)
        if sys.stderr.isatty():
            screen.setLevel(logging.INFO)  # the progress bar tells the rest
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self.log.handlers = [screen, file]
        if damaged:
            self.warn_once(f"{self.figures_file}: damaged lines are left out: {', '.join(map(str, damaged))}")

    def say(self, message: str) -> None:
        self.log.info(message)

    def warn_once(self, message: str) -> None:
        """Warn, unless the same was said before."""
        if message not in self._seen:
            self._seen.add(message)
            self.log.warning(message)

    def figures(self, stage: str, step: int, **groups: dict[str, float]) -> None:
        """One line of log.jsonl and TensorBoard scalars, at global step ``step``: loss={...}, speed={...}."""
        figures = {f"{group}/{name}": value for group, items in groups.items() for name, value in items.items()}
        if "loss" in groups:
            told = ", ".join(f"{name} {value:.4g}" for name, value in groups["loss"].items())
            self.log.debug(f"{stage}, step {step}: {told}")
        with self._kept_going():
            files.append_line(self.figures_file, json.dumps({"stage": stage, "step": step, **figures}))
        with self._kept_going():
            for name, value in figures.items():
                self.board.add_scalar(name, value, step)

    def pictures(self, step: int, pictures: dict[str, Tensor], columns: int = 4) -> None:
        """TensorBoard grids of (N,1 or 3,H,W) images in [0,1], the first ``columns`` of each."""
        for name, batch in pictures.items():
            shown = batch[:columns].detach().float().cpu().clamp(0, 1)
            with self._kept_going():
                self.board.add_image(f"pictures/{name}", make_grid(shown, nrow=columns), step)

    def flush(self) -> None:
        """What was logged so far is in the files: TensorBoard's otherwise comes there up to two minutes later."""
        with self._kept_going():
            self.board.flush()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_) -> None:
        with self._kept_going():
            self.board.close()
        for handler in self.log.handlers:
            handler.close()
        self.log.handlers = []

    @contextlib.contextmanager
    def _kept_going(self) -> Iterator[None]:
        """What cannot be logged inside is told once, and does not end the training: whether it can be saved will."""
        try:
            yield
        except (OSError, UserError) as error:
            self._lost(str(error) if isinstance(error, UserError) else f"cannot write TensorBoard's files: {error}")

    def _lost(self, why: str) -> None:
        if why not in self._seen:  # said on the screen alone, since files fail
            self._seen.add(why)
            with contextlib.suppress(OSError):
                tqdm.write(f"warning: {why}; the training goes on, and the log lacks lines", file=sys.stderr)

    def _forget_after(self, start: int) -> list[int]:
        """Drop what an interrupted run logged after the checkpoint from which it now goes on; returns damaged lines."""
        records, damaged = files.read_records(self.figures_file)
        kept = [record for record in records if isinstance(step := record.get("step"), int) and step <= start]
        if damaged or len(kept) < len(records):
            files.write_text(self.figures_file, "".join(json.dumps(record) + "\n" for record in kept))
        return damaged
