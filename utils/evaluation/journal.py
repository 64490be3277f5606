"""What a long scoring run has done so far, one line a picture, so that an interrupted one goes on where it stopped."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.evaluation.scoring import Score

NAME = "progress.jsonl"
PART = "progress.{}.jsonl"  # of the other processes of a run
FIELDS = {"row", *(field.name for field in dataclasses.fields(Score))}


class Journal:
    """The file progress.jsonl in a results folder: first what the run is, then every finished picture.

    ``identity`` (JSON-able) says all that the figures depend on. If the file is of the same identity, ``resumed`` is
    the number of pictures in it; if it is of another one, it is begun anew and ``replaced`` is True. A last line that
    was cut short by the interruption does not count. Raises `UserError` if the file cannot be written.

    Of several processes the first takes into its file what all of an interrupted run noted; then the others, of
    ``rank`` 1 and so on, begin files of their own, and are told what is ``known``.
    """

    def __init__(self, folder: Path, identity: Any, rank: int = 0, known: dict | None = None):
        self.path = folder / (PART.format(rank) if rank else NAME)
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        parts = [] if rank else sorted(folder.glob(PART.format("*")))
        files = [] if rank else [lines for lines in map(_read, (self.path, *parts)) if lines]
        same = [lines for lines in files if lines[0] == {"identity": digest}]
        self.replaced = bool(files) and not same
        scores = [(line["row"], _score(line)) for lines in same for line in lines[1:] if line.keys() == FIELDS]
        self.scores = {(row, score.name): score for row, score in scores} if known is None else known
        self.resumed = len(self.scores)
        with self._written():
            folder.mkdir(parents=True, exist_ok=True)
            with open(self.path, "w", encoding="utf-8") as file:  # anew, without what was cut short
                file.write(json.dumps({"identity": digest}) + "\n")
                if not rank:
                    file.writelines(_line(row, score) for (row, _), score in self.scores.items())
            for part in parts:
                part.unlink()

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            why = error.strerror or error
            raise UserError(f"{self.path}: cannot be written ({why}); check rights and space") from None

    def done(self, row: str, names: Iterable[str]) -> dict[str, Score]:
        """The scores of those of ``names`` that are finished in ``row`` (a method on a set), by name."""
        return {name: self.scores[row, name] for name in names if (row, name) in self.scores}

    def add(self, row: str, score: Score) -> None:
        """Note a picture whose figures and files are complete."""
        with self._written(), open(self.path, "a", encoding="utf-8") as file:
            file.write(_line(row, score))

    def close(self) -> None:
        """The run is complete and its report is written: forget the way there."""
        with self._written():
            self.path.unlink(missing_ok=True)


def _read(path: Path) -> list[dict]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    lines = []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except (json.JSONDecodeError, RecursionError):
            break
    return lines if all(isinstance(line, dict) for line in lines) else []


def _line(row: str, score: Score) -> str:
    return json.dumps({"row": row} | dataclasses.asdict(score)) + "\n"  # Python's JSON has Infinity and NaN


def _score(line: dict) -> Score:
    return Score(**{key: value for key, value in line.items() if key != "row"})
