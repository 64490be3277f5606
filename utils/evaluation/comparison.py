"""Comparison of finished scoring runs: paired differences and bootstrap intervals, within one protocol only."""

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

RESAMPLES = 10_000
SEED = 0
TOLERANCE = 1e-6  # figures of a hazy image that differ by more come from different pixels
MIN_IMAGES = 20  # with 20, 10 and 5 (simulated, normal) the interval has the true mean in 94, 90 and 84 % of cases
TEXT_FIELDS = ("used by", "title", "digits")  # of a protocol or a metric: they do not affect figures
SIDES = "<>>><"
HEADER = ("method", "mean", "difference", "95 % interval", "")
EXPLANATION = (
    f"difference: mean of paired differences to the reference; interval: percentiles of {RESAMPLES:,} bootstrap "
    "resamples of the images; better, worse: it excludes 0; -: one image or equal differences, nothing to resample",
    "the interval is for similar images, which are treated as independent, although those of one scene are not quite; "
    "it does not include the variation between repeated trainings (seeds)",
)


@dataclass(frozen=True)
class Metric:
    """How to print and compare a figure; ``better`` is higher or lower, ``protocol`` is empty where none applies."""

    key: str
    title: str
    unit: str
    better: str
    digits: int
    protocol: str


@dataclass(frozen=True)
class Run:
    """A results.json: ``data`` as read, and its checked parts; ``versions`` also has the device's name.

    ``figures[benchmark, method][image][metric]`` are the measured ones, including infinite and undefined ones.
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
    """Mean of an entry; mean and 95 % interval of its difference to the reference; verdict if that excludes 0."""

    label: str
    mean: float
    difference: float | None
    interval: tuple[float, float] | None
    verdict: str


@dataclass(frozen=True)
class Table:
    """One metric on one benchmark.

    Of ``scored`` images, ``common`` are those of all entries, and ``pictures`` are those of them with finite figures.
    ``expected`` is the number of images in the whole set, if known.
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
        """A row of texts for each entry, in the columns of `HEADER`."""
        rows = []
        digits = self.metric.digits
        for figure in self.figures:
            difference = "" if figure.difference is None else _number(figure.difference, digits, "+")
            interval = ", ".join(_number(end, digits, "+") for end in figure.interval or ())
            interval = f"[{interval}]" if interval else "-" if difference else ""
            rows.append((figure.label, _number(figure.mean, digits), difference, interval, figure.verdict))
        return rows


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`; ``methods`` describes by label what was compared, ``protocols`` those in use."""

    methods: dict[str, str]
    tables: list[Table]
    protocols: dict[str, dict[str, str]]
    remarks: list[str]

    def text(self) -> str:
        """Tables and notes for a terminal, at most 120 columns wide."""
        head, *rows = columns.aligned([HEADER, *(row for table in self.tables for row in table.cells())], SIDES, "    ")
        lines = []
        rows = iter(rows)
        for _, tables in itertools.groupby(self.tables, lambda table: table.benchmark):
            for first, table in enumerate(tables):
                lines += [] if first else [_wrapped(table.extent()), head]
                lines += [_wrapped(table.title(), "  "), *itertools.islice(rows, len(table.cells()))]
            lines.append("")
        return "\n".join([*lines, *map(_wrapped, self.notes())])

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
        """Remarks, an explanation of the columns, and descriptions of the methods and protocols."""
        protocols = {
            f"protocol {name}": "; ".join(f"{key}: {text}" for key, text in protocol.items() if key != "name")
            for name, protocol in self.protocols.items()
        }
        descriptions = (self.methods | protocols).items()
        return [*(f"NOTE {remark}" for remark in self.remarks), *EXPLANATION, *map(": ".join, descriptions)]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        bootstrap = {"resamples": RESAMPLES, "seed": SEED, "level": 0.95, "interval": "percentile"}
        return {"format": "nedr-dehaze comparison", "version": 1, "bootstrap": bootstrap, **dataclasses.asdict(self)}


def load(run: str | Path) -> Run:
    """Read a results.json, that in a folder, or that in results/ of an experiment's folder.

    Raises `UserError` if there is none, or if it is damaged, of another format or of a newer version.
    """
    try:
        path = _results_path(Path(run))
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise UserError(f"{path} is not a results.json of this version's test.py; score again or name another file")
        if data["version"] > VERSION:
            raise UserError(f"{path} was written by a newer version of this project; update it to read this file")
        versions = {name: str(version) for name, version in (data["versions"] | {"device": data["device"]}).items()}
        methods = {name: _method(name, facts) for name, facts in data["methods"].items()}
        protocols = {name: {key: str(text) for key, text in each.items()} for name, each in data["protocols"].items()}
        metrics = {key: _metric(key, fields, protocols) for key, fields in data["metrics"].items()}
        figures = _figures(data["rows"], metrics)
    except OSError as error:
        raise UserError(f"cannot read {run}: {error.strerror}; change the rights or name another run") from None
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        raise UserError(f"{path} is damaged: incomplete, or with invalid values; score that run again") from None
    return Run(_name(path, []), path, data, versions, methods, protocols, metrics, figures)


def compare(runs: Sequence[str | Path]) -> Comparison:
    """Put the methods of ``runs`` side by side; differences are to the first method of the first run.

    A benchmark is compared on the images that all its methods have, a metric if all runs have it. Raises `UserError`
    for runs that cannot be read, are the same, were scored under different protocols or have nothing in common.
    """
    loaded = [load(run) for run in runs]
    paths = [run.path for run in loaded]
    files = [os.path.realpath(path) for path in paths]
    if duplicates := [str(run) for run, file in zip(runs, files, strict=True) if files.count(file) > 1]:
        raise UserError(f"the same run is given twice ({', '.join(duplicates)}); name different runs")
    loaded = [dataclasses.replace(run, name=_name(run.path, paths)) for run in loaded]
    entries = _entries(loaded)
    if len(entries) < 2:
        labels = ", ".join(entry.label for entry in entries) or "none"
        raise UserError(f"a comparison needs at least two methods, here is {labels}; name a further run")
    keys, remarks = _common_metrics(loaded)
    tables = []
    alone = []
    for benchmark in dict.fromkeys(benchmark for run in loaded for benchmark, _ in run.figures):
        present = [entry for entry in entries if (benchmark, entry.method) in entry.run.figures]
        if len(present) < 2:
            alone.append(f"{benchmark} ({', '.join(entry.label for entry in present) or HAZY})")
            continue
        new_tables, new_remarks = _benchmark_tables(benchmark, present, keys)
        tables += new_tables
        remarks += new_remarks
    if alone:
        remarks.append(f"left out, since only one method was scored on them: {', '.join(alone)}")
    if not tables:
        raise UserError(f"nothing to compare: {'; '.join(remarks)}; score the same images and metrics in all runs")
    used = {table.metric.protocol for table in tables}
    protocols = {name: protocol for name, protocol in loaded[0].protocols.items() if name in used}
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

    Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13. A resample has the same images for all
    columns, the seed is fixed, and memory does not grow with the number of images.
    """
    generator = np.random.default_rng(SEED)
    count = len(differences)
    means = []
    chunk = max(1, 2**20 // count)
    for start in range(0, RESAMPLES, chunk):
        size = min(chunk, RESAMPLES - start)
        drawn = generator.integers(count, size=(size, count)) + count * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count)
        means.append(times @ differences / count)
    return np.quantile(np.concatenate(means), (0.025, 0.975), axis=0).T


def _results_path(run: Path) -> Path:
    for path in (run, run / "results.json", run / "results" / "results.json"):
        if path.is_file():
            return path
    if not run.is_dir():
        raise UserError(f"no run {run}; name a results.json, its folder or a scored experiment's folder")
    raise UserError(f"{run} holds no results.json, so this run may not be finished; score it to the end with test.py")


def _method(name: str, facts: dict[str, Any]) -> str:
    weights = facts.get("weights")
    digest = facts.get("sha256")
    return name + (f", {weights}" if weights else "") + (f" (sha256 {digest[:12]})" if digest else "")


def _metric(key: str, fields: dict[str, Any], protocols: dict[str, Any]) -> Metric:
    better = fields["better"]
    digits = int(fields["digits"])
    if better not in ("higher", "lower") or not 0 <= digits <= 9:
        raise ValueError(key)
    protocol = key.partition(".")[0]
    protocol = protocol if protocol in protocols else ""
    return Metric(key, str(fields["title"]), str(fields["unit"]), better, digits, protocol)


def _figures(rows: list[dict], metrics: dict[str, Metric]) -> dict[tuple[str, str], dict[str, dict[str, float]]]:
    figures = {}
    for row in rows:
        images = {
            _printable(image["name"]): {key: float(image[key]) for key in metrics if image.get(key) is not None}
            for image in row["per_image"]
        }
        key = _printable(row["benchmark"]), _printable(row["method"])
        if len(images) < len(row["per_image"]) or key in figures:
            raise ValueError("a duplicate image or row")
        figures[key] = images
    return figures


def _name(path: Path, others: Sequence[Path]) -> str:
    """The experiment's folder, with as many of its parent folders as distinguish it from ``others``."""
    parts, *rest = (
        [part for part in each.absolute().parts if part not in ("results", "results.json")] for each in (path, *others)
    )
    size = 1
    while size < len(parts) and any(other[-size:] == parts[-size:] for other in rest if other != parts):
        size += 1
    return _printable("/".join(parts[-size:]))


def _entries(runs: Sequence[Run]) -> list[Entry]:
    """The methods of all runs, under unique labels of at most about 40 characters."""
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


def _common_metrics(runs: Sequence[Run]) -> tuple[list[str], list[str]]:
    """Metrics that all runs have, and a remark on the others; `UserError` if there are none or protocols disagree."""
    first, *others = runs
    protocols = [name for name in first.protocols if all(name in run.protocols for run in others)]
    keys = [key for key in first.metrics if all(key in run.metrics for run in others)]
    shared = [("protocols", name) for name in protocols] + [("metrics", key) for key in keys]
    for run, (kind, name) in itertools.product(others, shared):
        one, other = first.data[kind][name], run.data[kind][name]
        for key in dict.fromkeys([*one, *other]):
            if key not in TEXT_FIELDS and one.get(key) != other.get(key):
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
        if extra := [key for key in run.metrics if key not in keys]:
            remarks.append(f"left out, since not all runs have them: {', '.join(extra)} of {run.name}")
    return keys, remarks


def _benchmark_tables(benchmark: str, present: list[Entry], keys: list[str]) -> tuple[list[Table], list[str]]:
    """Tables of one benchmark, one per metric, and remarks; the hazy input is the first entry."""
    runs = list({entry.run.path: entry.run for entry in present}.values())
    hazy = [run for run in runs if run.figures.get((benchmark, HAZY))]
    remarks = [text for run in hazy[1:] if (text := _input_difference(benchmark, hazy[0], run, keys))]
    lines = [*(Entry(HAZY, HAZY, run) for run in hazy[:1]), *present]
    measured = [entry.run.figures[benchmark, entry.method] for entry in lines]
    common = sorted(set.intersection(*map(set, measured)))
    scored = len(set().union(*measured))
    if not common:
        return [], [*remarks, f"{benchmark} left out: no image is common to {', '.join(e.label for e in lines)}"]
    row = next((row for row in runs[0].data["rows"] if row["benchmark"] == benchmark), {})
    notes = [f"{benchmark}: {remark}" for remark in row.get("remarks", ())]  # for example that pairs are not aligned
    if 1 < len(common) < MIN_IMAGES:
        notes.append(f"{benchmark}: with {len(common)} images, fewer than {MIN_IMAGES}, intervals come out too narrow")
    tables = []
    for key in keys:
        values = np.array([[figures[name].get(key, math.nan) for figures in measured] for name in common])
        undefined = np.isnan(values).all(axis=0)
        if undefined[-len(present) :].all():
            continue  # it does not apply, as PSNR without ground truth
        first = int(len(lines) > len(present) and undefined[0])  # 1: it was not measured on the hazy input
        finite = values[:, first:][np.isfinite(values[:, first:]).all(axis=1)]
        if not len(finite):
            remarks.append(f"{benchmark}: {key} left out, on no image is it finite for all methods")
            continue
        metric = runs[0].metrics[key]
        figures = _figures_of(
            [entry.label for entry in lines[first:]], finite, len(lines) - len(present) - first, metric
        )
        tables.append(Table(benchmark, metric, len(finite), len(common), scored, row.get("expected"), figures))
    return tables, remarks + (notes if tables else [])


def _figures_of(labels: list[str], values: np.ndarray, reference: int, metric: Metric) -> list[Figure]:
    """A `Figure` for each column of ``values`` (images, entries), with its differences to column ``reference``."""
    differences = values - values[:, [reference]]
    means = values.mean(axis=0)
    varied = np.ptp(differences, axis=0) > 1e-9  # less is rounding, or a single image: there is no interval
    figures = []
    for k, (low, high) in enumerate(bootstrap(differences).tolist()):
        up, down = ("better", "worse") if metric.better == "higher" else ("worse", "better")
        verdict = "" if not varied[k] else up if low > 0 else down if high < 0 else ""
        paired = (float(differences[:, k].mean()), (low, high) if varied[k] else None, verdict)
        figures.append(Figure(labels[k], float(means[k]), *((None, None, "reference") if k == reference else paired)))
    return figures


def _input_difference(benchmark: str, a: Run, b: Run, keys: list[str]) -> str:
    """A remark if the figures of the hazy input differ between two runs, which then had different pixels; or ""."""
    one = a.figures[benchmark, HAZY]
    other = b.figures[benchmark, HAZY]
    shared = sorted(one.keys() & other.keys())
    differing = {}
    for name, key in itertools.product(shared, keys):
        pair = one[name].get(key), other[name].get(key)
        if None not in pair and not np.isclose(*pair, rtol=0, atol=TOLERANCE, equal_nan=True):
            differing.setdefault(name, f"{key} of {name} is {pair[0]:.8g} and {pair[1]:.8g}")
    if not differing:
        return ""
    versions = {key: (a.versions.get(key), b.versions.get(key)) for key in a.versions | b.versions}
    changed = ", ".join(f"{key} {old} and {new}" for key, (old, new) in versions.items() if old != new)
    return (
        f"{benchmark}: the hazy input itself differs between {a.name} and {b.name} on {len(differing)} of "
        f"{len(shared)} images ({next(iter(differing.values()))}): other files, decoders or ground truth, so "
        f"differences are not due to the methods alone; {changed or 'devices and library versions are the same'}"
    )


def _number(value: float, digits: int, sign: str = "") -> str:
    return f"{value:{sign}z.{digits}f}" if abs(value) < 1e7 else f"{value:{sign}.3e}"


def _wrapped(text: str, indent: str = "") -> str:
    next_indent = indent + "  "
    return textwrap.fill(text, 120, initial_indent=indent, subsequent_indent=next_indent, break_on_hyphens=False)


def _printable(name: str) -> str:
    """``name`` with ? for unprintable characters: file names may have line breaks and undecodable bytes."""
    return "".join(character if character.isprintable() else "?" for character in name)
