"""The rows of a scoring run (methods on sets of images), and the content of results.json."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from utils import config
from utils.config import Settings
from utils.evaluation import extra_metrics, metrics, scoring
from utils.evaluation.scoring import Outcome, Score

FORMAT, VERSION = "nedr-dehaze results", 1
HAZY = "hazy input"  # the method that does nothing, which every other must beat


@dataclass
class Row:
    """A method on a set of images: its settings and its outcome.

    ``expected`` is the number of images in the whole set, None if unknown; ``remarks`` are about the set. ``resumed``
    of the scores are from an earlier, interrupted run, and are not included in the times.
    """

    benchmark: str
    method: str
    expected: int | None
    outcome: Outcome
    settings: dict[str, Any] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    peak_memory: int = 0
    resumed: int = 0

    @property
    def count(self) -> str:
        """The number of images: ``60 of 500``, or ``24`` for a whole set."""
        done = len(self.outcome.scores)
        return f"{done} of {self.expected}" if self.expected not in (None, done) else f"{done}"

    @property
    def per_second(self) -> float:
        """Images a second, with reading and saving."""
        count = len(self.outcome.scores) - self.resumed
        wall = self.outcome.seconds["wall"]
        return count / wall if count and wall else math.nan


def build(rows: Sequence[Row], settings: Settings, methods: Mapping[str, dict], device: str) -> dict[str, Any]:
    """All results of a run as plain values, ready for JSON: the content of results.json.

    ``settings`` are those in force, ``methods`` has the weights and cost of every method.
    """
    in_force = config.to_dict(settings)
    figures = keys(rows)
    used = [name for name in settings.test.protocols if any(key.startswith(f"{name}.") for key in figures)]
    return {
        "format": FORMAT,
        "version": VERSION,
        "protocols": {name: metrics.protocol(name).describe() for name in used},
        "metrics": {key: describe(key) for key in figures},
        "versions": metrics.versions(),
        "device": device,
        "settings": {key: in_force[key] for key in ("precision", "test")},
        "methods": dict(methods),
        "rows": [_row(row) for row in rows],
    }


def describe(key: str) -> dict[str, Any]:
    """Title, unit, direction and digits of the figure ``key``, such as ours.psnr or ciede2000."""
    kind = key.rpartition(".")[2]
    if kind == "psnr":
        return {"title": "PSNR", "unit": "dB", "better": "higher", "digits": 2}
    if kind == "ssim":
        return {"title": "SSIM", "unit": "", "better": "higher", "digits": 4}
    metric = extra_metrics.METRICS[key]
    return {
        "title": metric.title,
        "unit": "",
        "better": metric.better,
        "digits": metric.digits,
        "source": metric.source,
    }


def keys(rows: Sequence[Row]) -> list[str]:
    """The names of all figures of these rows, in the order of their first appearance."""
    return list(dict.fromkeys(key for row in rows for score in row.outcome.scores for key in score.figures))


def flat(score: Score) -> dict[str, Any]:
    """An image's score as one flat mapping: name, width, height, seconds and the figures."""
    values = dataclasses.asdict(score)
    return values | values.pop("figures")


def _row(row: Row) -> dict[str, Any]:
    scores = row.outcome.scores
    return {
        "benchmark": row.benchmark,
        "method": row.method,
        "settings": row.settings,
        "images": len(scores),
        "expected": row.expected,
        "remarks": row.remarks,
        "skipped": row.outcome.skipped,
        "mean": scoring.mean(scores),
        "left_out_of_mean": scoring.left_out(scores),
        "median_seconds": scoring.median_seconds(scores),
        "images_per_second": row.per_second,
        "resumed": row.resumed,
        "seconds": row.outcome.seconds,
        "peak_memory_bytes": row.peak_memory,
        "per_image": [flat(score) for score in scores],
    }
