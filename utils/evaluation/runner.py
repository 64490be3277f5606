"""Methods on sets of images: each pair of them becomes a row of the report, with its images and panels."""

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

FREE = ("fade", "niqe", "brisque", "musiq")  # metrics for images without ground truth, used where they are installed


@dataclass
class ImageSet:
    """A set to be scored: ``items`` as of `scoring.run`, with ``names`` and ``files``; ``truth``: each has a ``clear``.

    Each item has the ``path`` of its hazy image, too. ``expected`` is the number that the whole set has, None where
    no one can know; ``preset`` the test-time settings with which the released methods treat this set; ``folder`` the
    results' sub-folder, empty for a set of one's own; ``absent`` tells, a line each, of images that are named and not
    there.
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
        """Is it a set with a name, not just some images?"""
        return bool(self.folder)


@dataclass
class Candidate:
    """What is tested: how it dehazes, what maps it finds (None: no panels), and its settings in force.

    ``chosen_on`` as of `selection.chosen_on`; ``tile``: the side of tiles whose numbers are not those of the whole.
    """

    name: str
    dehaze: scoring.Dehaze
    estimate: Callable[[Tensor], dict[str, Tensor]] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    folder: str = ""
    chosen_on: dict[str, Any] | None = None
    tile: int | None = None


class Evaluation:
    """One run of test.py: where its files go, what is measured, and what an interrupted one had done already.

    ``write`` puts an image (3,H,W) into a file, ``like`` that which it was made from; ``say`` tells the user a line.
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
        self.settings, self.device, self.output, self.write, self.say = settings, device, output, write, say
        self.further = extra_metrics.load(settings.test.metrics, device)
        self.rows: list[Row] = []
        self.truths: dict[str, dict[str, str]] = defaultdict(dict)  # by set and image: its truth's fingerprint
        self.told: dict[str, None] = {}  # in the order of the images
        self.kept = 0  # images that were there already, and were left as they are
        for name in settings.test.protocols:
            metrics.protocol(name)
        tiling.choose(1, 1, device, settings.test.tile)  # refuses a setting that cannot be

    def begin(self, sets: Sequence[ImageSet], identity: Mapping[str, Any]) -> None:
        """Look for what an interrupted run of the same ``identity``, sets and settings has done."""
        states = [[each.name, [_state(path) for path in each.items.files]] for each in sets]
        own = {"sets": states, "settings": repr(self.settings)}
        versions = {"versions": metrics.versions(), "device": self.device.type}
        identity, ranks = dict(identity) | own | versions, self.ranks
        if self.settings.test.temporal and ranks.world > 1:
            raise UserError(
                "test.temporal=true: frames follow each other, so one process does them; start without torchrun"
            )
        if ranks.first:
            self.journal = Journal(self.output, identity)
        known = ranks.all_gather(self.journal.scores if ranks.first else None)[0]
        if not ranks.first:
            self.journal = Journal(self.output, identity, ranks.rank, known)
        if self.journal.resumed:
            self.say(f"going on where an interrupted run stopped: {self.journal.resumed} images are done")
        elif self.journal.replaced:
            self.say("an interrupted run with other settings or files was here; beginning anew")
        if self.journal.damaged:
            told = f"{self.journal.damaged} damaged lines are left out; their images are done anew"
            self.say(f"{self.journal.path}: {told}")

    def row(self, pictures: ImageSet, candidate: Candidate) -> Row:
        """Dehaze, measure and save all of a set; images that an earlier run did are not done again."""
        names, key = pictures.items.names, f"{pictures.name}/{candidate.name}"
        folder = self.output / "pictures" / pictures.folder / candidate.folder
        test, scored = self.settings.test, self._scored(pictures)
        output.refuse_hidden(test, scored)
        files = {name: folder / file for name, file in output.names(names, test, scored).items()}
        keep = test.pictures and candidate.name != HAZY
        done = {n: s for n, s in self.journal.done(key, names).items() if not keep or os.path.isfile(files[n])}
        there = set() if scored or test.overwrite else {n for n in names if n not in done and os.path.exists(files[n])}
        if test.temporal and (there or done):  # every frame is needed for those after it
            if there:
                raise UserError(
                    f"{folder}: {len(there)} of {len(names)} are there already, and test.temporal=true needs all; "
                    f"give --overwrite or another --output"
                )
            done = {}
        done, there = self.ranks.all_gather((done, there))[0]  # before any process writes a file
        self.kept += len(there)
        todo = [k for k, name in enumerate(names) if name not in done and name not in there]
        memory.reset_peak(self.device)
        outcome = scoring.run(
            candidate.dehaze,
            pictures.items,
            self._measure(pictures),
            (lambda item, made: self._save(files[item["name"]], item, made)) if keep else None,
            device=self.device,
            workers=self.settings.data.workers,
            indices=todo[self.ranks.rank :: self.ranks.world],
            on_score=lambda score: self.journal.add(key, score),
            on_error=self._skip,
            bar=f"{pictures.name}, {candidate.name}" if self.ranks.first else None,
            remedies=self._remedies,
        )
        peak = self._gather(pictures, outcome)
        scores = done | {score.name: score for score in outcome.scores}
        outcome.scores = [scores[name] for name in names if name in scores]
        for told in pictures.absent:
            self._skip(told)
        outcome.skipped = [*pictures.absent, *outcome.skipped]
        self._look_for_choice(pictures, candidate, outcome.scores)
        about = (_in_force(candidate, outcome.scores), pictures.remarks, peak, len(done))
        row = Row(pictures.name, candidate.name, pictures.expected, outcome, *about)
        self.rows.append(row)
        if candidate.name == HAZY:
            self._look_for_equal(pictures, outcome.scores)
        elif (
            self.ranks.first
            and candidate.estimate
            and self.settings.test.panels
            and (pictures.benchmark or pictures.truth)
        ):
            self._panels(pictures, candidate, outcome.scores)
        return row

    def _gather(self, pictures: ImageSet, outcome: scoring.Outcome) -> int:
        """Put into ``outcome`` what all processes did, in place; -> the largest peak of their memory."""
        own = (outcome, self.truths[pictures.name], memory.peak_memory(self.device))
        every = self.ranks.all_gather(own)
        others = [each for rank, (each, _, _) in enumerate(every) if rank != self.ranks.rank]
        for _, truths, _ in every:
            self.truths[pictures.name] |= truths
        for each in others:
            outcome.scores, outcome.skipped = outcome.scores + each.scores, outcome.skipped + each.skipped
            for stage, seconds in each.seconds.items():
                join = max if stage in ("wall", "waiting") else sum
                outcome.seconds[stage] = join((outcome.seconds[stage], seconds))
            for told in each.skipped:
                self._skip(told)
        return max(peak for _, _, peak in every)

    def _save(self, file: Path, item: dict, made: Tensor) -> None:
        test = self.settings.test
        self.write(file, output.shown(item["hazy"], made, test), like=item["path"], quality=test.quality)

    def _scored(self, pictures: ImageSet) -> bool:
        """Are the images there for the sake of figures?"""
        return pictures.truth or pictures.benchmark or bool(self._free(pictures))

    @property
    def unusable(self) -> int:
        """How many images were left out, of every set by the method that left out the most."""
        most: dict[str, int] = defaultdict(int)
        for row in self.rows:
            most[row.benchmark] = max(most[row.benchmark], len(row.outcome.skipped))
        return sum(most.values())

    def finish(self, methods: Callable[[], Mapping[str, dict]], device: str) -> dict[str, Any] | None:
        """Write the results of all rows and forget the journal; None where a folder was dehazed without any figure.

        ``methods`` is asked, for a report only, what each method is and costs.
        """
        found = None
        figures = any(row.method == HAZY for row in self.rows) or self.settings.test.benchmarks
        if figures and self.ranks.first:
            found = results.build(self.rows, self.settings, methods(), device)
            report.write(self.output, self.rows, found)
        if self.ranks.first:
            report.write_skipped(self.output, list(self.told))
        self.ranks.all_gather(None)  # what is noted is wanted until the report is there
        self.journal.close()
        return found

    def measures(self, pictures: ImageSet) -> bool:
        """Is there any figure for this set? For a benchmark without one, why not is among its remarks."""
        if pictures.truth or self._free(pictures):
            return True
        if pictures.benchmark:
            packages = defaultdict(list)
            for name in FREE:
                packages[extra_metrics.METRICS[name].package].append(name)
            wanted = " or ".join(f"{package} (for {', '.join(names)})" for package, names in packages.items())
            pictures.remarks.append(f"no ground truth: images and times only; for figures, pip install {wanted}")
        return False

    def _measure(self, pictures: ImageSet) -> scoring.Measure:
        protocols, further = self.settings.test.protocols, self.further if pictures.truth else self._free(pictures)

        def measure(item: dict, dehazed: Tensor) -> dict[str, float]:
            clear = item["clear"] if pictures.truth else None
            figures = metrics.figures(dehazed, clear, protocols) if pictures.truth else {}
            if pictures.truth and item["name"] not in self.truths[pictures.name]:
                self.truths[pictures.name][item["name"]] = selection.fingerprint(clear)
            return figures | {name: metric(dehazed, clear) for name, metric in further.items()}

        return measure

    def _free(self, pictures: ImageSet) -> dict[str, Callable]:
        """Metrics without ground truth: those asked for; else, for benchmarks, all that are installed and loadable."""
        asked = {name: metric for name, metric in self.further.items() if not extra_metrics.METRICS[name].needs_clear}
        if asked or self.settings.test.metrics:
            return asked
        if not pictures.benchmark:
            return {}
        return self._installed

    @functools.cached_property
    def _remedies(self) -> scoring.Remedies:
        """What would change something: smaller tiles than now, if there are any, and float32 where it is not."""
        tile, precise = self.settings.test.tile, self.settings.precision == "float32"
        smaller = tiling.SMALLEST  # auto may have gone down nearly as far already
        if tile != "auto":
            smaller = max(smaller, min(512, tile // 2)) if tile else 512
        memory = [f"set test.tile={smaller}"] if tile != smaller else ["shrink it"]
        memory += ["set device=cpu"] if self.device.type == "cuda" else []
        numbers = "use other weights" if precise else "set precision=float32 or use other weights"
        return scoring.Remedies(" or ".join(memory), numbers)

    @functools.cached_property
    def _installed(self) -> dict[str, Callable]:
        """Those of `FREE` that are installed and whose weights are there; of the other installed ones it is said."""
        found = {}
        for name in filter(extra_metrics.installed, FREE):
            try:
                found |= extra_metrics.load([name], self.device)
            except UserError as error:
                self.say(f"left out: {error}")
        return found

    def _skip(self, error: UserError | str) -> None:
        if str(error) not in self.told:  # every method meets it again
            self.told[str(error)] = None
            self.say(f"skipped: {error}")

    def _look_for_equal(self, pictures: ImageSet, scores: Sequence[scoring.Score]) -> None:
        key = f"{self.settings.test.protocols[0]}.psnr"
        equal = [score.name for score in scores if score.figures.get(key) == math.inf]
        if equal:
            count = f"{len(equal)} of {len(scores)}" if len(equal) > 1 else "one"
            pictures.remarks.append(
                f"{count} hazy images equal their ground truth (the first: {equal[0]}); are the folders mixed up?"
            )
            self.say(f"warning: {pictures.name}: {pictures.remarks[-1]}")

    def _look_for_choice(self, pictures: ImageSet, candidate: Candidate, scores: Sequence[scoring.Score]) -> None:
        """Say it where the weights were chosen on what they are scored on."""
        if candidate.chosen_on is None or not pictures.truth:
            return
        known = self.truths[pictures.name]
        for score in scores:
            if score.name not in known:  # measured by the interrupted run that this one continues
                item = pictures.items[pictures.items.names.index(score.name)]
                known[score.name] = selection.fingerprint(item["clear"])
        if told := selection.remark(candidate.chosen_on, [known[score.name] for score in scores]):
            pictures.remarks.append(f"{candidate.name}: {told}")
            self.say(f"warning: {pictures.name}: {pictures.remarks[-1]}")

    def _panels(self, pictures: ImageSet, candidate: Candidate, scores: Sequence[scoring.Score]) -> None:
        key = next(iter(scores[0].figures), None) if scores else None
        better = results.describe(key)["better"] if key else "higher"
        folder = self.output / "panels" / pictures.folder / candidate.folder
        for old in (old for place in panels.PLACES for old in folder.glob(f"{place}_*.png")):
            old.unlink()  # an earlier run's best need not be this one's
        for place, score in panels.choose(scores, key, better).items():
            try:
                item = pictures.items[pictures.items.names.index(score.name)]
                with scoring.enough_memory(item, self.device, self._remedies):
                    found = candidate.estimate(item["hazy"][None].to(self.device))
            except UserError as error:  # the figures are there; an image less is no reason to lose them
                self.say(f"no panel: {error}")
                continue
            maps = {name: value[0].float().cpu() for name, value in found.items()}
            shown = panels.parts(item["hazy"], maps, item.get("clear"), score)
            self.write(folder / f"{place}_{Path(score.name).stem}.png", panels.panel(shown))


def _in_force(candidate: Candidate, scores: Sequence[scoring.Score]) -> dict[str, Any]:
    """The settings that the figures depend on, with the tiles where these are not exact and any image needed them."""
    tiled = candidate.tile and any(max(score.width, score.height) > candidate.tile for score in scores)
    return candidate.settings | ({"tile": candidate.tile} if tiled else {})


def _state(path: Path) -> list:
    """What of a file changes when its content does; of one that is gone the name alone: to read it will tell."""
    try:
        stat = path.stat()
    except OSError:
        return [str(path)]
    return [str(path), stat.st_size, stat.st_mtime_ns]
