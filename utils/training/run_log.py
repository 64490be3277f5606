"""What a run tells while it goes: lines on the screen and in log.txt, figures in log.jsonl, TensorBoard."""

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid
from tqdm import tqdm


class _Screen(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)  # above the progress bar, not through it


class Speed:
    """How fast a stage goes from ``step`` on, ``images`` pictures a step; ``waiting`` as of `data.loading.Waiting`."""

    def __init__(self, step: int, images: int, waiting: Any):
        self.images, self.waiting = images, waiting
        self.since = step, waiting.seconds, time.perf_counter()

    def figures(self, step: int) -> dict[str, float]:
        """Steps and pictures a second, and the share of the time spent in waiting for pictures, since the last call."""
        before, self.since = self.since, (step, self.waiting.seconds, time.perf_counter())
        steps, waited, seconds = (now - then for now, then in zip(self.since, before, strict=True))
        rate = steps / seconds
        return {"steps_per_second": rate, "images_per_second": rate * self.images, "waiting": waited / seconds}


class Silence:
    """The log of a process that is not the first of several: the first one tells everything."""

    def say(self, *_, **__) -> None:
        """Nothing, as of all others."""

    warn_once = figures = pictures = say

    def __enter__(self) -> "Silence":
        return self

    def __exit__(self, *_) -> None: ...


class RunLog:
    """The log of one experiment folder, and its progress bar. A resumed run goes on from global step ``start``."""

    def __init__(self, folder: Path, start: int = 0):
        folder.mkdir(parents=True, exist_ok=True)
        self.figures_file = folder / "log.jsonl"
        self._forget_after(start)
        self.board = SummaryWriter(folder / "tensorboard", purge_step=start or None)
        self.log = logging.getLogger(f"nedr-dehaze.{folder}")
        self.log.setLevel(logging.DEBUG)
        self.log.propagate = False
        screen, file = _Screen(), logging.FileHandler(folder / "log.txt", encoding="utf-8")
        if sys.stderr.isatty():
            screen.setLevel(logging.INFO)  # the progress bar tells the rest
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self.log.handlers = [screen, file]
        self._seen: set[str] = set()

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
        with self.figures_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": stage, "step": step, **figures}) + "\n")
        for name, value in figures.items():
            self.board.add_scalar(name, value, step)

    def pictures(self, step: int, pictures: dict[str, Tensor], columns: int = 4) -> None:
        """TensorBoard grids of (N,1 or 3,H,W) pictures in [0,1], the first ``columns`` of each."""
        for name, batch in pictures.items():
            shown = batch[:columns].detach().float().cpu().clamp(0, 1)
            self.board.add_image(f"pictures/{name}", make_grid(shown, nrow=columns), step)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_) -> None:
        self.board.close()
        for handler in self.log.handlers:
            handler.close()
        self.log.handlers = []

    def _forget_after(self, start: int) -> None:
        """Drop what an interrupted run logged after the checkpoint from which it now goes on."""
        if not self.figures_file.exists():
            return
        lines = self.figures_file.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if start and line.endswith("}") and json.loads(line)["step"] <= start]
        self.figures_file.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
