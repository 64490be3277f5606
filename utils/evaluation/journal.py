"""What a long scoring run has done so far, one line a picture, so that an interrupted one goes on where it stopped."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.evaluation.scoring import Score

NAME = "progress.jsonl"
FIELDS = {"row", *(field.name for field in dataclasses.fields(Score))}


class Journal:
    """The file progress.jsonl in a results folder: first what the run is, then every finished picture.

    ``identity`` (JSON-able) says all that the figures depend on. If the file is of the same identity, ``resumed`` is
    the number of pictures in it; if it is of another one, it is begun anew and ``replaced`` is True. A last line that
    was cut short by the interruption does not count. Raises `UserError` if the file cannot be written.
    """

    def __init__(self, folder: Path, identity: Any):
        self.path = folder / NAME
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        lines = self._read()
        same = bool(lines) and lines[0] == {"identity": digest}
        self.replaced = bool(lines) and not same
        scores = [(line["row"], _score(line)) for line in lines[1:] if same and line.keys() == FIELDS]
        self.scores = {(row, score.name): score for row, score in scores}
        self.resumed = len(self.scores)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(self.path, "w", encoding="utf-8") as file:  # anew, without what was cut short
                file.write(json.dumps({"identity": digest}) + "\n")
                file.writelines(_line(row, score) for (row, _), score in self.scores.items())
        except OSError as error:
            why = error.strerror or error
            raise UserError(f"{self.path}: cannot be written ({why}); check rights and space") from None

    def done(self, row: str, names: Iterable[str]) -> dict[str, Score]:
        """The scores of those of ``names`` that are finished in ``row`` (a method on a set), by name."""
        return {name: self.scores[row, name] for name in names if (row, name) in self.scores}

    def add(self, row: str, score: Score) -> None:
        """Note a picture whose figures and files are complete."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(_line(row, score))

    def close(self) -> None:
        """The run is complete and its report is written: forget the way there."""
        self.path.unlink(missing_ok=True)

    def _read(self) -> list[dict]:
        try:
            text = self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return []
        lines = []
        for line in text.splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return lines if all(isinstance(line, dict) for line in lines) else []


def _line(row: str, score: Score) -> str:
    return json.dumps({"row": row} | dataclasses.asdict(score)) + "\n"  # Python's JSON has Infinity and NaN


def _score(line: dict) -> Score:
    return Score(**{key: value for key, value in line.items() if key != "row"})
