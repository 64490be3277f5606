"""Finished scoring runs side by side: paired differences and their bootstrap intervals, never across protocols."""

import dataclasses
import itertools
import json
import math
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils import columns
from utils.errors import UserError
from utils.evaluation.results import FORMAT, HAZY, VERSION
from utils.files import write_text

RESAMPLES, SEED = 10_000, 0
SAME = 1e-6  # one hazy picture's figures that lie farther apart come from different pixels
FEW = 20  # images: with 20, 10 and 5 (simulated, normal) the interval holds the true mean in 94, 90 and 84 % of cases
WORDING = ("used by", "title", "digits")  # of a protocol or a metric: these change no figure
SIDES = "<>>><"
HEADER = ("method", "mean", "difference", "95 % interval", "")
MEANING = (
    f"difference: mean of paired differences to the reference; interval: percentiles of {RESAMPLES:,} bootstrap "
    "resamples of the images; better, worse: it excludes 0; -: one image or equal differences, nothing to resample",
    "the interval speaks of other images like these, each counted as independent, though those of one scene are not "
    "quite; it does not say how figures move when training is repeated (seeds)",
)


@dataclass(frozen=True)
class Metric:
    """How to print and to judge a figure; ``better`` is higher or lower, ``protocol`` empty where none applies."""

    key: str
    title: str
    unit: str
    better: str
    digits: int
    protocol: str


@dataclass(frozen=True)
class Run:
    """A results.json: ``data`` as read, and what of it was found sound; ``versions`` has the device's name too.

    ``figures[benchmark, method][picture][metric]`` are those that were measured, infinite and undefined ones too.
    """

    name: str
    path: Path
    data: dict[str, Any]
    versions: dict[str, str]
    methods: dict[str, str]
    protocols: dict[str, dict[str, str]]
    metrics: dict[str, Metric]
    figures: dict[tuple[str, str], dict[str, dict[str, float]]]


@dataclass(frozen=True)
class Entry:
    """A method of a run."""

    label: str
    method: str
    run: Run


@dataclass(frozen=True)
class Figure:
    """Mean of an entry; mean and 95 % interval of its difference to the reference; verdict where that excludes 0."""

    label: str
    mean: float
    difference: float | None
    interval: tuple[float, float] | None
    verdict: str


@dataclass(frozen=True)
class Table:
    """One metric on one benchmark over ``pictures``, those finite of the ``common`` to all entries of the ``scored``.

    ``expected`` is how many the whole set has, if known.
    """

    benchmark: str
    metric: Metric
    pictures: int
    common: int
    scored: int
    expected: int | None
    figures: list[Figure]

    def extent(self) -> str:
        """The benchmark, and how many of its images are compared."""
        whole = f" (the whole set: {self.expected})" if self.expected else ""
        return f"{self.benchmark}: {self.common} of {self.scored} images are common to all methods{whole}"

    def title(self) -> str:
        """The metric with its unit, direction and protocol, and how many images it leaves out."""
        metric = self.metric
        terms = [metric.unit, metric.protocol and f"protocol {metric.protocol}", f"{metric.better} is better"]
        out = f" ({self.common - self.pictures} left out: infinite or undefined)" * (self.pictures < self.common)
        return f"{metric.title} ({', '.join(filter(None, terms))}), images: {self.pictures}{out}"

    def cells(self) -> list[tuple[str, ...]]:
        """A row of texts for each entry, under `HEADER`."""
        rows, digits = [], self.metric.digits
        for one in self.figures:
            difference = "" if one.difference is None else _number(one.difference, digits, "+")
            interval = ", ".join(_number(end, digits, "+") for end in one.interval or ())
            interval = f"[{interval}]" if interval else "-" if difference else ""
            rows.append((one.label, _number(one.mean, digits), difference, interval, one.verdict))
        return rows


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; ``methods`` tells by label what was compared, ``protocols`` what those in use mean."""

    methods: dict[str, str]
    tables: list[Table]
    protocols: dict[str, dict[str, str]]
    remarks: list[str]

    def text(self) -> str:
        """Tables and notes for a terminal, at most 120 columns wide."""
        head, *rows = columns.aligned([HEADER, *(row for table in self.tables for row in table.cells())], SIDES, "    ")
        lines, rows = [], iter(rows)
        for _, tables in itertools.groupby(self.tables, lambda table: table.benchmark):
            for first, table in enumerate(tables):
                lines += [] if first else [_wrap(table.extent()), head]
                lines += [_wrap(table.title(), "  "), *itertools.islice(rows, len(table.cells()))]
            lines.append("")
        return "\n".join([*lines, *map(_wrap, self.notes())])

    def markdown(self) -> str:
        """The same as Markdown: a table for each benchmark, methods down and metrics across, and a list of notes."""
        lines = []
        for _, group in itertools.groupby(self.tables, lambda table: table.benchmark):
            tables = list(group)
            cells = [{label: (mean, " ".join(rest)) for label, mean, *rest in table.cells()} for table in tables]
            labels = max(cells, key=len)  # the hazy input may lack a metric
            rows = [["method", *(head for table in tables for head in (table.title(), "difference"))]]
            rows += [[label, *(cell for column in cells for cell in column.get(label, ("", "")))] for label in labels]
            lines += [tables[0].extent(), "", *columns.markdown(rows, numbers=True), ""]
        return "\n".join([*lines, *(f"- {note}" for note in self.notes())]) + "\n"

    def notes(self) -> list[str]:
        """Remarks, what the columns mean, and what the methods and the protocols are."""
        told = {name: [f"{k}: {v}" for k, v in told.items() if k != "name"] for name, told in self.protocols.items()}
        protocols = {f"protocol {name}": "; ".join(parts) for name, parts in told.items()}
        named = (self.methods | protocols).items()
        return [*(f"NOTE {remark}" for remark in self.remarks), *MEANING, *map(": ".join, named)]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        bootstrap = {"resamples": RESAMPLES, "seed": SEED, "level": 0.95, "interval": "percentile"}
        return {"format": "nedr-dehaze comparison", "version": 1, "bootstrap": bootstrap, **dataclasses.asdict(self)}


def load(run: str | Path) -> Run:
    """Read a results.json, that in a folder, or that in results/ of an experiment's folder.

    Raises `UserError` if there is none, or if it is damaged, of another format or of a newer version.
    """
    try:
        path = _find(Path(run))
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise UserError(f"{path} is not a results.json of this version's test.py; score again or name another file")
        if data["version"] > VERSION:
            raise UserError(f"{path} was written by a newer version of this project; update it to read this file")
        versions = {name: str(version) for name, version in (data["versions"] | {"device": data["device"]}).items()}
        methods = {name: _method(name, told) for name, told in data["methods"].items()}
        protocols = {name: {key: str(text) for key, text in told.items()} for name, told in data["protocols"].items()}
        metrics = {key: _metric(key, told, protocols) for key, told in data["metrics"].items()}
        figures = _figures(data["rows"], metrics)
    except OSError as error:
        raise UserError(f"cannot read {run}: {error.strerror}; change the rights or name another run") from None
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        raise UserError(f"{path} is damaged: cut short, or parts make no sense; score that run again") from None
    return Run(_name(path, []), path, data, versions, methods, protocols, metrics, figures)


def compare(runs: Sequence[str | Path]) -> Comparison:
    """Put the methods of ``runs`` side by side; differences are to the first method of the first run.

    A benchmark counts with the images that all its methods have, a metric if all runs have it. Raises `UserError` for
    runs that cannot be read, are the same, were scored under different protocols or share nothing.
    """
    loaded = [load(run) for run in runs]
    paths = [run.path for run in loaded]
    files = [os.path.realpath(path) for path in paths]
    if twice := [str(given) for given, file in zip(runs, files, strict=True) if files.count(file) > 1]:
        raise UserError(f"the same run is given twice ({', '.join(twice)}); name different runs")
    loaded = [dataclasses.replace(run, name=_name(run.path, paths)) for run in loaded]
    entries = _entries(loaded)
    if len(entries) < 2:
        held = ", ".join(entry.label for entry in entries) or "none"
        raise UserError(f"a comparison needs at least two methods, here is {held}; name a further run")
    keys, remarks = _common(loaded)
    tables, alone = [], []
    for benchmark in dict.fromkeys(benchmark for run in loaded for benchmark, _ in run.figures):
        present = [entry for entry in entries if (benchmark, entry.method) in entry.run.figures]
        if len(present) < 2:
            alone.append(f"{benchmark} ({', '.join(entry.label for entry in present) or HAZY})")
            continue
        found, said = _benchmark(benchmark, present, keys)
        tables, remarks = tables + found, remarks + said
    if alone:
        remarks.append(f"left out, since one method alone was scored on them: {', '.join(alone)}")
    if not tables:
        raise UserError(f"nothing to compare: {'; '.join(remarks)}; score the same images and metrics in all runs")
    used = {table.metric.protocol for table in tables}
    protocols = {name: told for name, told in loaded[0].protocols.items() if name in used}
    return Comparison(
        {entry.label: entry.run.methods.get(entry.method, entry.method) for entry in entries},
        tables,
        protocols,
        remarks,
    )


def write(comparison: Comparison, folder: Path) -> None:
    """Write comparison.json and comparison.md into ``folder``, each whole or not at all; `UserError` if it cannot."""
    data = json.dumps(comparison.to_dict(), indent=2, allow_nan=False) + "\n"
    for name, text in (("comparison.json", data), ("comparison.md", comparison.markdown())):
        write_text(folder / name, text)


def bootstrap(differences: np.ndarray) -> np.ndarray:
    """95 % percentile intervals (columns, 2) of the means of ``differences`` (images, columns), in their unit.

    Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13. A resample draws the same images for
    all columns, the seed is fixed, and memory does not grow with the images.
    """
    generator, count, means = np.random.default_rng(SEED), len(differences), []
    chunk = max(1, 2**20 // count)
    for start in range(0, RESAMPLES, chunk):
        size = min(chunk, RESAMPLES - start)
        drawn = generator.integers(count, size=(size, count)) + count * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count)
        means.append(times @ differences / count)
    return np.quantile(np.concatenate(means), (0.025, 0.975), axis=0).T


def _find(run: Path) -> Path:
    for path in (run, run / "results.json", run / "results" / "results.json"):
        if path.is_file():
            return path
    if not run.is_dir():
        raise UserError(f"no run {run}; name a results.json, its folder or a scored experiment's folder")
    raise UserError(f"{run} holds no results.json, so this run may not be finished; score it to the end with test.py")


def _method(name: str, told: dict[str, Any]) -> str:
    weights, digest = told.get("weights"), told.get("sha256")
    return name + (f", {weights}" if weights else "") + (f" (sha256 {digest[:12]})" if digest else "")


def _metric(key: str, told: dict[str, Any], protocols: dict[str, Any]) -> Metric:
    better, digits, protocol = told["better"], int(told["digits"]), key.partition(".")[0]
    if better not in ("higher", "lower") or not 0 <= digits <= 9:
        raise ValueError(key)
    return Metric(key, str(told["title"]), str(told["unit"]), better, digits, protocol if protocol in protocols else "")


def _figures(rows: list[dict], metrics: dict[str, Metric]) -> dict[tuple[str, str], dict[str, dict[str, float]]]:
    figures = {}
    for row in rows:
        pictures = {
            _clean(one["name"]): {key: float(one[key]) for key in metrics if one.get(key) is not None}
            for one in row["per_image"]
        }
        key = _clean(row["benchmark"]), _clean(row["method"])
        if len(pictures) < len(row["per_image"]) or key in figures:
            raise ValueError("the same twice")
        figures[key] = pictures
    return figures


def _name(path: Path, others: Sequence[Path]) -> str:
    """The experiment's folder, after as many of the folders above it as tell it from ``others``."""
    own, *rest = (
        [part for part in one.absolute().parts if part not in ("results", "results.json")] for one in (path, *others)
    )
    size = 1
    while size < len(own) and any(other[-size:] == own[-size:] for other in rest if other != own):
        size += 1
    return _clean("/".join(own[-size:]))


def _entries(runs: Sequence[Run]) -> list[Entry]:
    """The methods of all runs, under labels that differ and that leave room for figures beside them."""
    entries = {}
    for run in runs:
        methods = list(dict.fromkeys(method for _, method in run.figures if method != HAZY))
        for method in methods:
            label = method if len(runs) == 1 else run.name if len(methods) == 1 else f"{run.name}:{method}"
            label = label if len(label) <= 40 else f"{label[:18]}...{label[-18:]}"
            while label in {*entries, HAZY}:
                label += "#"
            entries[label] = Entry(label, method, run)
    return list(entries.values())


def _common(runs: Sequence[Run]) -> tuple[list[str], list[str]]:
    """Metrics that all runs have, and a remark on the others; `UserError` if there are none or protocols disagree."""
    first, *others = runs
    protocols = [name for name in first.protocols if all(name in run.protocols for run in others)]
    keys = [key for key in first.metrics if all(key in run.metrics for run in others)]
    shared = [("protocols", name) for name in protocols] + [("metrics", key) for key in keys]
    for run, (kind, name) in itertools.product(others, shared):
        one, other = first.data[kind][name], run.data[kind][name]
        for key in dict.fromkeys([*one, *other]):
            if key not in WORDING and one.get(key) != other.get(key):
                raise UserError(
                    f"{kind[:-1]} {name} differs, so figures cannot be compared: {key} is '{one.get(key)}' in "
                    f"{first.name} and '{other.get(key)}' in {run.name}; score both with one version of this project"
                )
    if not keys or (not protocols and all(run.protocols for run in runs)):
        have = "; ".join(f"{run.name} has {', '.join(run.protocols or run.metrics) or 'none'}" for run in runs)
        wanted = " ".join(first.protocols) or "ours"
        raise UserError(f"runs of different protocols cannot be compared: {have}; score both with --protocols {wanted}")
    remarks = []
    for run in runs:
        if lacking := [key for key in run.metrics if key not in keys]:
            remarks.append(f"left out, since not all runs have them: {', '.join(lacking)} of {run.name}")
    return keys, remarks


def _benchmark(benchmark: str, present: list[Entry], keys: list[str]) -> tuple[list[Table], list[str]]:
    """Tables of one benchmark, a metric each, and remarks; the hazy input comes first, once."""
    runs = list({entry.run.path: entry.run for entry in present}.values())
    hazy = [run for run in runs if run.figures.get((benchmark, HAZY))]
    remarks = [text for run in hazy[1:] if (text := _inputs(benchmark, hazy[0], run, keys))]
    lines = [*(Entry(HAZY, HAZY, run) for run in hazy[:1]), *present]
    pictures = [entry.run.figures[benchmark, entry.method] for entry in lines]
    common, scored = sorted(set.intersection(*map(set, pictures))), len(set().union(*pictures))
    if not common:
        return [], [*remarks, f"{benchmark} left out: no image is common to {', '.join(e.label for e in lines)}"]
    row = next((row for row in runs[0].data["rows"] if row["benchmark"] == benchmark), {})
    about = [f"{benchmark}: {remark}" for remark in row.get("remarks", ())]  # as that its pairs are not aligned
    if 1 < len(common) < FEW:
        about.append(f"{benchmark}: with {len(common)} images, fewer than {FEW}, intervals come out too narrow")
    tables = []
    for key in keys:
        values = np.array([[figures[name].get(key, math.nan) for figures in pictures] for name in common])
        blank = np.isnan(values).all(axis=0)
        if blank[-len(present) :].all():
            continue  # it does not apply, as PSNR to images without ground truth
        first = int(len(lines) > len(present) and blank[0])  # 1: it was not measured on the hazy input
        finite = values[:, first:][np.isfinite(values[:, first:]).all(axis=1)]
        if not len(finite):
            remarks.append(f"{benchmark}: {key} left out, on no image is it finite for all methods")
            continue
        metric = runs[0].metrics[key]
        figures = _compared([entry.label for entry in lines[first:]], finite, len(lines) - len(present) - first, metric)
        tables.append(Table(benchmark, metric, len(finite), len(common), scored, row.get("expected"), figures))
    return tables, remarks + (about if tables else [])


def _compared(labels: list[str], values: np.ndarray, reference: int, metric: Metric) -> list[Figure]:
    """A line for each column of ``values`` (images, entries), its differences to column ``reference``."""
    differences, means = values - values[:, [reference]], values.mean(axis=0)
    real = np.ptp(differences, axis=0) > 1e-9  # less is rounding or one image: no spread, no interval to speak of
    figures = []
    for k, (low, high) in enumerate(bootstrap(differences).tolist()):
        up, down = ("better", "worse") if metric.better == "higher" else ("worse", "better")
        verdict = "" if not real[k] else up if low > 0 else down if high < 0 else ""
        paired = (float(differences[:, k].mean()), (low, high) if real[k] else None, verdict)
        figures.append(Figure(labels[k], float(means[k]), *((None, None, "reference") if k == reference else paired)))
    return figures


def _inputs(benchmark: str, a: Run, b: Run, keys: list[str]) -> str:
    """What to say if the hazy input measures differently in two runs: they saw different pixels."""
    one, other = a.figures[benchmark, HAZY], b.figures[benchmark, HAZY]
    shared, moved = sorted(one.keys() & other.keys()), {}
    for name, key in itertools.product(shared, keys):
        pair = one[name].get(key), other[name].get(key)
        if None not in pair and not np.isclose(*pair, rtol=0, atol=SAME, equal_nan=True):
            moved.setdefault(name, f"{key} of {name} is {pair[0]:.8g} and {pair[1]:.8g}")
    if not moved:
        return ""
    versions = {key: (a.versions.get(key), b.versions.get(key)) for key in a.versions | b.versions}
    changed = ", ".join(f"{key} {old} and {new}" for key, (old, new) in versions.items() if old != new)
    return (
        f"{benchmark}: the hazy input itself differs between {a.name} and {b.name} on {len(moved)} of {len(shared)} "
        f"images ({next(iter(moved.values()))}): other files, decoders or ground truth, so differences are not the "
        f"methods' alone; {changed or 'devices and library versions are the same'}"
    )


def _number(value: float, digits: int, sign: str = "") -> str:
    return f"{value:{sign}z.{digits}f}" if abs(value) < 1e7 else f"{value:{sign}.3e}"


def _wrap(text: str, indent: str = "") -> str:
    further = indent + "  "
    return textwrap.fill(text, 120, initial_indent=indent, subsequent_indent=further, break_on_hyphens=False)


def _clean(name: str) -> str:
    """``name`` as it can be printed everywhere: file names may hold line breaks and bytes that are no text."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)
