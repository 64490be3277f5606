"""The journal of a scoring run, one line per finished image, so that an interrupted run can be continued."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from utils import files
from utils.evaluation.scoring import Score

NAME = "progress.jsonl"
PART = "progress.{}.jsonl"  # of the other processes of a run
FIELDS = {"row", *(field.name for field in dataclasses.fields(Score))}


class Journal:
    """The file progress.jsonl in a results folder: a digest of the run's identity, then a line per finished image.

    ``identity`` (JSON-able) has everything that the figures depend on. If the file has the same identity, ``resumed``
    is the number of images in it; if it has another one, it is replaced and ``replaced`` is True. Damaged lines, such
    as an incomplete last one, are ignored; ``damaged`` is their number. Raises `UserError` if the file cannot be
    written.

    Of several processes the first merges the files of all processes of an interrupted run into its own; then the
    others, with ``rank`` 1 and so on, start files of their own, and are given the ``known`` scores.
    """

    def __init__(self, folder: Path, identity: Any, rank: int = 0, known: dict | None = None):
        self.path = folder / (PART.format(rank) if rank else NAME)
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        parts = [] if rank else sorted(folder.glob(PART.format("*")))
        contents = [] if rank else [files.read_records(path) for path in (self.path, *parts)]
        self.damaged = sum(len(damaged) for _, damaged in contents)
        journals = [lines for lines, _ in contents if lines]
        same = [lines for lines in journals if lines[0] == {"identity": digest}]
        self.replaced = bool(journals) and not same
        scores = [(line["row"], _score(line)) for lines in same for line in lines[1:] if line.keys() == FIELDS]
        self.scores = {(row, score.name): score for row, score in scores} if known is None else known
        self.resumed = len(self.scores)
        done = [] if rank else [_line(row, score) for (row, _), score in self.scores.items()]
        with files.writing(self.path):
            files.write_text(self.path, "".join(f"{line}\n" for line in (json.dumps({"identity": digest}), *done)))
            for part in parts:
                part.unlink()

    def done(self, row: str, names: Iterable[str]) -> dict[str, Score]:
        """The scores of those of ``names`` that are finished in ``row`` (a method on a set), by name."""
        return {name: self.scores[row, name] for name in names if (row, name) in self.scores}

    def add(self, row: str, score: Score) -> None:
        """Add an image whose figures and files are complete."""
        files.append_line(self.path, _line(row, score))

    def close(self) -> None:
        """Remove the journal, after the report of the complete run is written."""
        with files.writing(self.path):
            self.path.unlink(missing_ok=True)


def _line(row: str, score: Score) -> str:
    return json.dumps({"row": row} | dataclasses.asdict(score))  # Python's JSON has Infinity and NaN


def _score(line: dict) -> Score:
    return Score(**{key: value for key, value in line.items() if key != "row"})
