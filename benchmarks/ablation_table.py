"""The table of an ablation: one row a case, with its modules, size, figures and differences to the full model."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils import columns
from utils.evaluation import comparison, tables
from utils.evaluation.comparison import Figure, Table
from utils.evaluation.results import HAZY
from utils.files import write_text

MODULES = {"kan_cid": "KAN-CID", "idrm": "IDRM", "drem": "DREM"}
DIGITS = {"psnr": 2, "ssim": 4}
DIFFERENCE = ("diff.", "95 % interval")
HEAD = ("case", *MODULES.values(), "params", "PSNR (dB)", *DIFFERENCE, "SSIM", *DIFFERENCE)
ALIKE = (
    "all cases see the same images, crops and synthetic haze in the same order. Initial weights and the random "
    "density of adversarial training come from one generator with the same seed; modules draw from it too, so these "
    "differ between cases",
    "one training each: a small difference may be due to the seed; repeat with another (seed=11, in another folder)",
    "params: parameters of the network that dehazes",
)


def build(
    folders: Mapping[str, Path], modules: Mapping[str, Sequence[str]], settings: Mapping[str, Any], failed: Mapping
) -> dict[str, Any]:
    """The content of ablation.json, from the scored cases in ``folders``; differences are to the last of them.

    ``modules`` are those of each case, ``settings`` those that all share, by dotted name, ``failed`` the errors of
    missing cases. Raises `UserError` for results that cannot be compared.
    """
    *others, reference = folders
    compared = comparison.compare([folders[name] for name in (reference, *others)])
    results = {name: comparison.load(folder).data for name, folder in folders.items()}
    cases: dict[str, dict[str, Any]] = {HAZY: {"case": HAZY, "modules": None, "parameters": None}}
    for name, data in results.items():
        cases[name] = {
            "case": name,
            "modules": list(modules[name]),
            "parameters": data["methods"]["nedr"]["parameters"],
        }
    sets: dict[tuple[str, str], dict[str, Table]] = {}
    for table in compared.tables:
        if table.metric.protocol:
            sets.setdefault((table.benchmark, table.metric.protocol), {})[table.metric.key.rpartition(".")[2]] = table
    return {
        "format": "nedr-dehaze ablation",
        "version": 1,
        "reference": reference,
        "settings": dict(settings),
        "device": results[reference]["device"],
        "versions": results[reference]["versions"],
        "tables": [_table(*key, pair, cases) for key, pair in sets.items()],
        "missing": dict(failed),
        "unusable": sorted({each for data in results.values() for row in data["rows"] for each in row["skipped"]}),
        "notes": [_budget(settings), *ALIKE, *compared.notes()],
    }


def write(content: Mapping[str, Any], folder: Path) -> None:
    """Write ablation.json and ablation.md to ``folder``, each atomically. Raises `UserError` if that fails."""
    data = json.dumps(content, indent=2, allow_nan=False) + "\n"
    for name, text in (("ablation.json", data), ("ablation.md", markdown(content))):
        write_text(folder / name, text)


def text(content: Mapping[str, Any]) -> str:
    """The tables and notes for a terminal, at most 120 columns wide."""
    lines = []
    for table in content["tables"]:
        rows = [HEAD, *map(_cells, table["rows"])]
        lines += [_title(table, content["reference"]), *columns.aligned(rows), ""]
    return "\n".join([*lines, *(textwrap.fill(note, 120, subsequent_indent="  ") for note in _notes(content))])


def markdown(content: Mapping[str, Any]) -> str:
    """The tables and notes as Markdown."""
    lines = []
    for table in content["tables"]:
        rows = [HEAD, *map(_cells, table["rows"])]
        lines += [_title(table, content["reference"]), "", *columns.markdown(rows, numbers=True), ""]
    return "\n".join([*lines, *(f"- {note}" for note in _notes(content))]) + "\n"


def _table(benchmark: str, protocol: str, pair: Mapping[str, Table], cases: Mapping[str, dict]) -> dict[str, Any]:
    """One set under one protocol: the hazy input, then the cases in order, with PSNR and SSIM of each."""
    rows = [dict(case) for case in cases.values()]
    for kind, table in pair.items():
        figures = {figure.label: figure for figure in table.figures}
        for row in rows:
            row[kind] = _figure(figures[row["case"]])
    first = next(iter(pair.values()))
    return {"benchmark": benchmark, "protocol": protocol, "pictures": first.common, "of": first.expected, "rows": rows}


def _figure(figure: Figure) -> dict[str, Any]:
    return {"mean": figure.mean, "difference": figure.difference, "interval": figure.interval}


def _title(table: Mapping[str, Any], reference: str) -> str:
    total = f" of {table['of']}" if table["of"] not in (None, table["pictures"]) else ""
    return (
        f"{table['benchmark']} ({table['pictures']}{total}), protocol {table['protocol']}; "
        f"differences and intervals: to {reference}"
    )


def _cells(row: Mapping[str, Any]) -> list[str]:
    modules, size = row["modules"], row["parameters"]
    marks = ["" if modules is None else "x" if module in modules else "-" for module in MODULES]
    cells = [row["case"], *marks, "" if size is None else f"{size / 1e6:.2f} M"]
    for kind, digits in DIGITS.items():
        figure = row[kind]
        difference, interval = figure["difference"], figure["interval"]
        cells.append(f"{figure['mean']:.{digits}f}")
        cells.append("" if difference is None else f"{difference:+z.{digits}f}")
        cells.append(f"[{', '.join(f'{end:+z.{digits}f}' for end in interval)}]" if interval else "")
    return cells


def _notes(content: Mapping[str, Any]) -> list[str]:
    missing = [f"MISSING {name}: {why}" for name, why in content["missing"].items()]
    return missing + [f"NOTE left out: {why}" for why in content["unusable"]] + content["notes"]


def _budget(settings: Mapping[str, Any]) -> str:
    """The training budget of every case, in one line."""
    parts = []
    for stage, kind in (("warm_start", "supervised"), ("train", "unpaired")):
        if steps := settings[f"{stage}.steps"]:
            batch = settings[f"{stage}.batch"] * settings.get(f"{stage}.accumulate", 1)
            parts.append(f"{kind} steps: {steps:,} of {tables.image_count(batch)}")
    validated = settings["data.validation_hazy"] or settings.get("data.validation_pairs")
    weights = "the best on the validation images" if validated else "the last"
    crop = f"{settings['data.crop_size']} pixels ({settings['data.crop']})"
    return f"every case: {', then '.join(parts)}; crops of {crop}; seed {settings['seed']}; weights: {weights}"
