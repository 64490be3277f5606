"""The files of a scoring run: results.json (complete), results.md (tables), per_image.csv, skipped.txt; image names."""

import contextlib
import csv
import io
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from utils.evaluation import tables
from utils.evaluation.results import Row, flat, keys
from utils.files import write_text

SKIPPED = "skipped.txt"


def write(folder: Path, rows: Sequence[Row], results: Mapping) -> None:
    """Write results.json, results.md and per_image.csv into ``folder``, each whole or not at all.

    Infinite and undefined figures are the strings "inf" and "nan" in JSON, which has no numbers for them. Raises
    `UserError` if it cannot write.
    """
    write_text(folder / "results.json", json.dumps(_plain(results), indent=2, allow_nan=False) + "\n")
    write_text(folder / "results.md", tables.markdown(rows, results))
    write_text(folder / "per_image.csv", _csv(rows))


def write_skipped(folder: Path, messages: Sequence[str]) -> None:
    """Write skipped.txt, a line for each image that could not be used; remove it if there are none."""
    if messages:
        write_text(folder / SKIPPED, "".join(f"{line}\n" for line in messages))
    else:
        with contextlib.suppress(OSError):
            (folder / SKIPPED).unlink(missing_ok=True)


def image_names(names: Sequence[str], ending: Callable[[str], str] = lambda name: ".png") -> dict[str, str]:
    """The output file of each input: a/b.jpg -> a/b.png, or a/b.jpg.png if two inputs in a would become b.png.

    ``ending`` returns the end of the new name for an old name.
    """
    folders = defaultdict(list)
    for name in map(PurePosixPath, dict.fromkeys(names)):
        folders[name.parent].append(name)
    outputs = {}
    for folder, members in folders.items():
        endings = {name: ending(name.name) for name in members}
        counts = Counter((name.stem + endings[name]).casefold() for name in members)
        taken = {name.name.casefold() for name in members}  # b.jpg.png must not get the name that b.jpg may need
        for name in members:
            unique = counts[(name.stem + endings[name]).casefold()] == 1 and name.stem.casefold() not in taken
            outputs[str(name)] = str(folder / f"{name.stem if unique else name.name}{endings[name]}")
    return outputs


def _csv(rows: Sequence[Row]) -> str:
    out = io.StringIO(newline="")
    columns = ["benchmark", "method", "name", "width", "height", "seconds", *keys(rows)]
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        start = {"benchmark": row.benchmark, "method": row.method}
        writer.writerows(start | flat(score) for score in row.outcome.scores)
    return out.getvalue()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
