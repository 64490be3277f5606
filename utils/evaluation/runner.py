"""The evaluation of methods on sets of images: a row of the report for each pair, with its images and panels."""

import functools
import math
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils import memory, output, tiling
from utils.config import Settings
from utils.distributed import Ranks
from utils.errors import UserError
from utils.evaluation import extra_metrics, metrics, panels, report, results, scoring, selection
from utils.evaluation.journal import Journal
from utils.evaluation.results import HAZY, Row

NO_REFERENCE = ("fade", "niqe", "brisque", "musiq")  # metrics without ground truth, used where installed


@dataclass
class ImageSet:
    """A set to score: ``items`` as in `scoring.run`, with ``names`` and ``files``; ``truth``: each has a ``clear``.

    Each item also has the ``path`` of its hazy image. ``expected`` is the number of images in the whole set, None if
    unknown; ``preset`` has the test-time settings that the released methods use for this set; ``folder`` is the
    results' sub-folder, empty for the user's own images; ``absent`` has a message for each listed image that does not
    exist.
    """

    name: str
    items: Any  # a sequence of dicts with ``names`` and ``files``
    truth: bool
    expected: int | None = None
    remarks: list[str] = field(default_factory=list)
    preset: dict[str, Any] = field(default_factory=dict)
    folder: str = ""
    absent: list[str] = field(default_factory=list)

    @property
    def benchmark(self) -> bool:
        """Whether it is a named benchmark, not the user's own images."""
        return bool(self.folder)


@dataclass
class Candidate:
    """A method under test: ``dehaze``, ``estimate`` of its maps (None: no panels), and its settings in force.

    ``chosen_on`` as of `selection.chosen_on`; ``tile``: the side of tiles whose results differ from the whole image's.
    """

    name: str
    dehaze: scoring.Dehaze
    estimate: Callable[[Tensor], dict[str, Tensor]] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    folder: str = ""
    chosen_on: dict[str, Any] | None = None
    tile: int | None = None


class Evaluation:
    """One run of test.py: its output files, its metrics, and the results of the interrupted run that it continues.

    ``write`` writes an image (3,H,W) to a file, with the metadata of the input ``like``; ``say`` prints a line.
    """

    def __init__(
        self,
        settings: Settings,
        device: torch.device,
        output: Path,
        write: Callable,
        say: Callable[[str], None],
        ranks: Ranks | None = None,
    ):
        self.ranks = ranks or Ranks()
        self.settings = settings
        self.device = device
        self.output = output
        self.write = write
        self.say = say
        self.metrics = extra_metrics.load(settings.test.metrics, device)
        self.rows: list[Row] = []
        self.truths: dict[str, dict[str, str]] = defaultdict(dict)  # fingerprints of ground truths by set and image
        self.messages: dict[str, None] = {}  # about skipped images, in their order
        self.existing = 0  # output images that existed already and were kept
        for name in settings.test.protocols:
            metrics.protocol(name)
        tiling.choose(1, 1, device, settings.test.tile)  # raises for an invalid setting

    def begin(self, sets: Sequence[ImageSet], identity: Mapping[str, Any]) -> None:
        """Open the journal, with the results of an interrupted run of the same ``identity``, sets and settings."""
        states = [[each.name, [_file_state(path) for path in each.items.files]] for each in sets]
        inputs = {"sets": states, "settings": repr(self.settings)}
        versions = {"versions": metrics.versions(), "device": self.device.type}
        identity = dict(identity) | inputs | versions
        ranks = self.ranks
        if self.settings.test.temporal and ranks.world > 1:
            raise UserError(
                "test.temporal=true: frames depend on each other, so one process does them; start without torchrun"
            )
        if ranks.first:
            self.journal = Journal(self.output, identity)
        known = ranks.all_gather(self.journal.scores if ranks.first else None)[0]
        if not ranks.first:
            self.journal = Journal(self.output, identity, ranks.rank, known)
        if self.journal.resumed:
            self.say(f"continuing an interrupted run: {self.journal.resumed} images are done")
        elif self.journal.replaced:
            self.say("the interrupted run in this folder had other settings or files; starting again")
        if count := self.journal.damaged:
            self.say(f"{self.journal.path}: {count} damaged lines are ignored; their images are done again")

    def evaluate(self, image_set: ImageSet, candidate: Candidate) -> Row:
        """Dehaze, measure and save the images of a set, except those that an earlier run did."""
        names = image_set.items.names
        key = f"{image_set.name}/{candidate.name}"
        folder = self.output / "pictures" / image_set.folder / candidate.folder
        test = self.settings.test
        scored = self._scored(image_set)
        output.check_measurable(test, scored)
        files = {name: folder / file for name, file in output.names(names, test, scored).items()}
        keep = test.pictures and candidate.name != HAZY
        done = {n: s for n, s in self.journal.done(key, names).items() if not keep or os.path.isfile(files[n])}
        existing = set()
        if not (scored or test.overwrite):
            existing = {name for name in names if name not in done and os.path.exists(files[name])}
        if test.temporal and (existing or done):  # every frame is needed for the following ones
            if existing:
                raise UserError(
                    f"{folder}: {len(existing)} of {len(names)} exist already, and test.temporal=true needs all; "
                    f"give --overwrite or another --output"
                )
            done = {}
        done, existing = self.ranks.all_gather((done, existing))[0]  # before any process writes a file
        self.existing += len(existing)
        todo = [k for k, name in enumerate(names) if name not in done and name not in existing]
        memory.reset_peak(self.device)
        outcome = scoring.run(
            candidate.dehaze,
            image_set.items,
            self._measure(image_set),
            (lambda item, dehazed: self._save(files[item["name"]], item, dehazed)) if keep else None,
            device=self.device,
            workers=self.settings.data.workers,
            indices=todo[self.ranks.rank :: self.ranks.world],
            on_score=lambda score: self.journal.add(key, score),
            on_error=self._skip,
            bar=f"{image_set.name}, {candidate.name}" if self.ranks.first else None,
            remedies=self._remedies,
        )
        peak = self._gather(image_set, outcome)
        scores = done | {score.name: score for score in outcome.scores}
        outcome.scores = [scores[name] for name in names if name in scores]
        for message in image_set.absent:
            self._skip(message)
        outcome.skipped = [*image_set.absent, *outcome.skipped]
        self._warn_of_selection(image_set, candidate, outcome.scores)
        settings = _settings_in_force(candidate, outcome.scores)
        about = (settings, image_set.remarks, peak, len(done))
        row = Row(image_set.name, candidate.name, image_set.expected, outcome, *about)
        self.rows.append(row)
        if candidate.name == HAZY:
            self._warn_of_equal_images(image_set, outcome.scores)
        elif (
            self.ranks.first
            and candidate.estimate
            and self.settings.test.panels
            and (image_set.benchmark or image_set.truth)
        ):
            self._panels(image_set, candidate, outcome.scores)
        return row

    def _gather(self, image_set: ImageSet, outcome: scoring.Outcome) -> int:
        """Merge the results of all processes into ``outcome``, in place; returns the largest peak of their memory."""
        result = (outcome, self.truths[image_set.name], memory.peak_memory(self.device))
        gathered = self.ranks.all_gather(result)
        others = [each for rank, (each, _, _) in enumerate(gathered) if rank != self.ranks.rank]
        for _, truths, _ in gathered:
            self.truths[image_set.name] |= truths
        for each in others:
            outcome.scores = outcome.scores + each.scores
            outcome.skipped = outcome.skipped + each.skipped
            for stage, seconds in each.seconds.items():
                combine = max if stage in ("wall", "waiting") else sum
                outcome.seconds[stage] = combine((outcome.seconds[stage], seconds))
            for message in each.skipped:
                self._skip(message)
        return max(peak for _, _, peak in gathered)

    def _save(self, file: Path, item: dict, dehazed: Tensor) -> None:
        test = self.settings.test
        self.write(file, output.shown(item["hazy"], dehazed, test), like=item["path"], quality=test.quality)

    def _scored(self, image_set: ImageSet) -> bool:
        """Whether any figure is measured on the images of this set, or it is a benchmark."""
        return image_set.truth or image_set.benchmark or bool(self._no_reference_metrics(image_set))

    @property
    def unusable(self) -> int:
        """How many images were left out: for each set, by the method that left out the most."""
        most: dict[str, int] = defaultdict(int)
        for row in self.rows:
            most[row.benchmark] = max(most[row.benchmark], len(row.outcome.skipped))
        return sum(most.values())

    def finish(self, methods: Callable[[], Mapping[str, dict]], device: str) -> dict[str, Any] | None:
        """Write the results of all rows and remove the journal; None where images were dehazed without any figure.

        ``methods`` returns the facts and costs of each method; it is called only for a report.
        """
        summary = None
        figures = any(row.method == HAZY for row in self.rows) or self.settings.test.benchmarks
        if figures and self.ranks.first:
            summary = results.build(self.rows, self.settings, methods(), device)
            report.write(self.output, self.rows, summary)
        if self.ranks.first:
            report.write_skipped(self.output, list(self.messages))
        self.ranks.all_gather(None)  # the journals are needed until the report is written
        self.journal.close()
        return summary

    def measures(self, image_set: ImageSet) -> bool:
        """Whether there is any figure for this set; for a benchmark without one, a remark is added that says why."""
        if image_set.truth or self._no_reference_metrics(image_set):
            return True
        if image_set.benchmark:
            packages = defaultdict(list)
            for name in NO_REFERENCE:
                packages[extra_metrics.METRICS[name].package].append(name)
            needed = " or ".join(f"{package} (for {', '.join(names)})" for package, names in packages.items())
            image_set.remarks.append(f"no ground truth: images and times only; for figures, pip install {needed}")
        return False

    def _measure(self, image_set: ImageSet) -> scoring.Measure:
        protocols = self.settings.test.protocols
        extra = self.metrics if image_set.truth else self._no_reference_metrics(image_set)

        def measure(item: dict, dehazed: Tensor) -> dict[str, float]:
            clear = item["clear"] if image_set.truth else None
            figures = metrics.figures(dehazed, clear, protocols) if image_set.truth else {}
            if image_set.truth and item["name"] not in self.truths[image_set.name]:
                self.truths[image_set.name][item["name"]] = selection.fingerprint(clear)
            return figures | {name: metric(dehazed, clear) for name, metric in extra.items()}

        return measure

    def _no_reference_metrics(self, image_set: ImageSet) -> dict[str, Callable]:
        """Metrics without ground truth: those in the settings; or, for benchmarks, all that are installed and load."""
        chosen = {name: metric for name, metric in self.metrics.items() if not extra_metrics.METRICS[name].needs_clear}
        if chosen or self.settings.test.metrics:
            return chosen
        if not image_set.benchmark:
            return {}
        return self._installed_metrics

    @functools.cached_property
    def _remedies(self) -> scoring.Remedies:
        """Settings that may help: smaller tiles, if there are any, and float32 in place of another precision."""
        tile = self.settings.test.tile
        smaller = tiling.SMALLEST  # auto may already use tiles that are nearly as small
        if tile != "auto":
            smaller = max(smaller, min(512, tile // 2)) if tile else 512
        memory = [f"set test.tile={smaller}"] if tile != smaller else ["shrink it"]
        memory += ["set device=cpu"] if self.device.type == "cuda" else []
        numbers = "use other weights"
        if self.settings.precision != "float32":
            numbers = f"set precision=float32 or {numbers}"
        return scoring.Remedies(" or ".join(memory), numbers)

    @functools.cached_property
    def _installed_metrics(self) -> dict[str, Callable]:
        """Those of `NO_REFERENCE` that are installed and load; installed ones that fail to load are reported."""
        loaded = {}
        for name in filter(extra_metrics.installed, NO_REFERENCE):
            try:
                loaded |= extra_metrics.load([name], self.device)
            except UserError as error:
                self.say(f"left out: {error}")
        return loaded

    def _skip(self, error: UserError | str) -> None:
        if str(error) not in self.messages:  # the same for every method
            self.messages[str(error)] = None
            self.say(f"skipped: {error}")

    def _warn_of_equal_images(self, image_set: ImageSet, scores: Sequence[scoring.Score]) -> None:
        key = f"{self.settings.test.protocols[0]}.psnr"
        equal = [score.name for score in scores if score.figures.get(key) == math.inf]
        if equal:
            count = f"{len(equal)} of {len(scores)}" if len(equal) > 1 else "one"
            image_set.remarks.append(
                f"{count} hazy images equal their ground truth (the first: {equal[0]}); are the folders mixed up?"
            )
            self.say(f"warning: {image_set.name}: {image_set.remarks[-1]}")

    def _warn_of_selection(self, image_set: ImageSet, candidate: Candidate, scores: Sequence[scoring.Score]) -> None:
        """Warn where the weights were chosen on the images that they are scored on."""
        if candidate.chosen_on is None or not image_set.truth:
            return
        known = self.truths[image_set.name]
        for score in scores:
            if score.name not in known:  # scored by the interrupted run that this one continues
                item = image_set.items[image_set.items.names.index(score.name)]
                known[score.name] = selection.fingerprint(item["clear"])
        if warning := selection.warning(candidate.chosen_on, [known[score.name] for score in scores]):
            image_set.remarks.append(f"{candidate.name}: {warning}")
            self.say(f"warning: {image_set.name}: {image_set.remarks[-1]}")

    def _panels(self, image_set: ImageSet, candidate: Candidate, scores: Sequence[scoring.Score]) -> None:
        key = next(iter(scores[0].figures), None) if scores else None
        better = results.describe(key)["better"] if key else "higher"
        folder = self.output / "panels" / image_set.folder / candidate.folder
        for old in (old for rank in panels.RANKS for old in folder.glob(f"{rank}_*.png")):
            old.unlink()  # of an earlier run
        for rank, score in panels.choose(scores, key, better).items():
            try:
                item = image_set.items[image_set.items.names.index(score.name)]
                with scoring.enough_memory(item, self.device, self._remedies):
                    outputs = candidate.estimate(item["hazy"][None].to(self.device))
                maps = {name: value[0].float().cpu() for name, value in outputs.items()}
                shown = panels.parts(item["hazy"], maps, item.get("clear"), score)
                self.write(folder / f"{rank}_{Path(score.name).stem}.png", panels.panel(shown))
            except UserError as error:  # a missing panel must not cost the figures
                self.say(f"no panel: {error}")


def _settings_in_force(candidate: Candidate, scores: Sequence[scoring.Score]) -> dict[str, Any]:
    """The settings that the figures depend on; with the tile side if tiles are not exact and any image needed them."""
    tiled = candidate.tile and any(max(score.width, score.height) > candidate.tile for score in scores)
    return candidate.settings | ({"tile": candidate.tile} if tiled else {})


def _file_state(path: Path) -> list:
    """The path, size and modification time of a file, to detect changes; of an absent file only the path."""
    try:
        stat = path.stat()
    except OSError:
        return [str(path)]
    return [str(path), stat.st_size, stat.st_mtime_ns]
