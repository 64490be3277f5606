"""The rows of a scoring run, methods on sets of images, and all that is known of them as plain values."""

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
    """A method on a set of images: what was in force, and what came out.

    ``expected`` is the number of images that the whole set has, None where no one can know; ``remarks`` are about
    the set. ``resumed`` of the scores are from an earlier, interrupted run, and are not in the times.
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
        """``60 of 500``, or ``24`` where that is all."""
        done = len(self.outcome.scores)
        return f"{done} of {self.expected}" if self.expected not in (None, done) else f"{done}"

    @property
    def per_second(self) -> float:
        """Images a second, from the disk to the disk."""
        fresh, wall = len(self.outcome.scores) - self.resumed, self.outcome.seconds["wall"]
        return fresh / wall if fresh and wall else math.nan


def build(rows: Sequence[Row], settings: Settings, methods: Mapping[str, dict], device: str) -> dict[str, Any]:
    """Everything about a run as plain values, ready for JSON: the content of results.json.

    ``settings`` are those in force, ``methods`` says of every method its weights and cost.
    """
    in_force, found = config.to_dict(settings), keys(rows)
    named = [name for name in settings.test.protocols if any(key.startswith(f"{name}.") for key in found)]
    return {
        "format": FORMAT,
        "version": VERSION,
        "protocols": {name: metrics.protocol(name).describe() for name in named},
        "metrics": {key: describe(key) for key in found},
        "versions": metrics.versions(),
        "device": device,
        "settings": {key: in_force[key] for key in ("precision", "test")},
        "methods": dict(methods),
        "rows": [_row(row) for row in rows],
    }


def describe(key: str) -> dict[str, Any]:
    """Title, unit, direction and digits of a figure by its name, such as ours.psnr or ciede2000."""
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
    """The figures that these rows have, in the order in which they first appear."""
    return list(dict.fromkeys(key for row in rows for score in row.outcome.scores for key in score.figures))


def flat(score: Score) -> dict[str, Any]:
    """A picture's score as one flat mapping: name, width, height, seconds and the figures."""
    values = dataclasses.asdict(score)
    return values | values.pop("figures")


def _row(row: Row) -> dict[str, Any]:
    scores, seconds = row.outcome.scores, row.outcome.seconds
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
        "seconds": seconds,
        "peak_memory_bytes": row.peak_memory,
        "per_image": [flat(score) for score in scores],
    }
