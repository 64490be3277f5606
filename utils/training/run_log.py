"""The log of a training run: lines on the screen and in log.txt, figures in log.jsonl and TensorBoard."""

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
        with contextlib.suppress(OSError):  # a closed terminal does not end the training
            tqdm.write(self.format(record), file=sys.stderr)  # above the progress bar, not through it


class _File(logging.Handler):
    """Appends lines to a file; errors are passed to ``on_error`` and do not end the training."""

    def __init__(self, path: Path, on_error: Callable[[str], None]):
        super().__init__()
        self.path = path
        self.on_error = on_error

    def emit(self, record: logging.LogRecord) -> None:
        try:
            files.append_line(self.path, self.format(record))
        except UserError as error:
            self.on_error(str(error))


class Speed:
    """The speed of a stage from ``step`` on, with ``images`` images a step; ``waiting`` is a `data.loading.Waiting`."""

    def __init__(self, step: int, images: int, waiting: Any):
        self.images = images
        self.waiting = waiting
        self.last = step, waiting.seconds, time.perf_counter()

    def figures(self, step: int) -> dict[str, float]:
        """Steps and images a second, and the fraction of the time spent waiting for images, since the last call."""
        previous = self.last
        self.last = step, self.waiting.seconds, time.perf_counter()
        steps, waited, seconds = (now - then for now, then in zip(self.last, previous, strict=True))
        rate = steps / seconds
        return {"steps_per_second": rate, "images_per_second": rate * self.images, "waiting": waited / seconds}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, the time does not count: what is done is not training."""
        start = time.perf_counter()
        yield
        step, waited, seconds = self.last
        self.last = step, waited, seconds + time.perf_counter() - start


class NullLog:
    """The log of a process that is not the first of several: only the first one logs."""

    def say(self, *_, **__) -> None:
        """Does nothing, as the other methods."""

    warn_once = figures = pictures = flush = say

    def __enter__(self) -> "NullLog":
        return self

    def __exit__(self, *_) -> None: ...


class RunLog:
    """The log of one experiment folder. A resumed run continues from global step ``start``."""

    def __init__(self, folder: Path, start: int = 0):
        self.figures_file = folder / "log.jsonl"
        self._warned = set()
        with files.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            damaged = self._drop_after(start)
            # TensorBoard discards the points from ``purge_step`` on.
            self.tensorboard = SummaryWriter(folder / "tensorboard", purge_step=start + 1)
        self.log = logging.getLogger(f"nedr-dehaze.{folder}")
        self.log.setLevel(logging.DEBUG)
        self.log.propagate = False
        screen = _Screen()
        file = _File(folder / "log.txt", self._report_error)
        if sys.stderr.isatty():
            screen.setLevel(logging.INFO)  # the progress bar shows the rest
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self.log.handlers = [screen, file]
        if damaged:
            self.warn_once(f"{self.figures_file}: damaged lines are left out: {', '.join(map(str, damaged))}")

    def say(self, message: str) -> None:
        self.log.info(message)

    def warn_once(self, message: str) -> None:
        """Log a warning, unless the same one was logged before."""
        if message not in self._warned:
            self._warned.add(message)
            self.log.warning(message)

    def figures(self, stage: str, step: int, **groups: dict[str, float]) -> None:
        """One line of log.jsonl and TensorBoard scalars, at global step ``step``: loss={...}, speed={...}."""
        figures = {f"{group}/{name}": value for group, items in groups.items() for name, value in items.items()}
        if "loss" in groups:
            losses = ", ".join(f"{name} {value:.4g}" for name, value in groups["loss"].items())
            self.log.debug(f"{stage}, step {step}: {losses}")
        with self._errors_reported():
            files.append_line(self.figures_file, json.dumps({"stage": stage, "step": step, **figures}))
        with self._errors_reported():
            for name, value in figures.items():
                self.tensorboard.add_scalar(name, value, step)

    def pictures(self, step: int, pictures: dict[str, Tensor], columns: int = 4) -> None:
        """TensorBoard grids of (N,1 or 3,H,W) images in [0,1], the first ``columns`` of each."""
        for name, batch in pictures.items():
            shown = batch[:columns].detach().float().cpu().clamp(0, 1)
            with self._errors_reported():
                self.tensorboard.add_image(f"pictures/{name}", make_grid(shown, nrow=columns), step)

    def flush(self) -> None:
        """Write everything logged so far to the files; TensorBoard otherwise does so up to two minutes later."""
        with self._errors_reported():
            self.tensorboard.flush()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_) -> None:
        with self._errors_reported():
            self.tensorboard.close()
        for handler in self.log.handlers:
            handler.close()
        self.log.handlers = []

    @contextlib.contextmanager
    def _errors_reported(self) -> Iterator[None]:
        """Inside, errors in writing the log are reported once and do not end the training; errors in saving do."""
        try:
            yield
        except (OSError, UserError) as error:
            message = str(error) if isinstance(error, UserError) else f"cannot write TensorBoard's files: {error}"
            self._report_error(message)

    def _report_error(self, message: str) -> None:
        if message not in self._warned:  # on the screen only, since the files fail
            self._warned.add(message)
            with contextlib.suppress(OSError):
                tqdm.write(f"warning: {message}; the training continues, and the log is incomplete", file=sys.stderr)

    def _drop_after(self, start: int) -> list[int]:
        """Remove lines that were logged after the checkpoint that the run resumes from; returns damaged lines."""
        records, damaged = files.read_records(self.figures_file)
        kept = [record for record in records if isinstance(step := record.get("step"), int) and step <= start]
        if damaged or len(kept) < len(records):
            files.write_text(self.figures_file, "".join(json.dumps(record) + "\n" for record in kept))
        return damaged
