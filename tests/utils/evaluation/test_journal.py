import json
import math

import pytest

from utils.errors import UserError
from utils.evaluation.journal import NAME, Journal
from utils.evaluation.scoring import Score

IDENTITY = {"weights": "abc", "sets": [["O-HAZE", ["1.jpg"]]]}


def score(name, psnr=20.0):
    return Score(name, 4, 3, 0.1, {"ours.psnr": psnr, "ours.ssim": 0.5})


def test_a_new_journal_is_empty(tmp_path):
    journal = Journal(tmp_path / "results", IDENTITY)
    assert (journal.resumed, journal.replaced) == (0, False)
    assert journal.done("O-HAZE/nedr", ["1.jpg"]) == {}


def test_entries_are_read_by_the_next_run_of_the_same_identity(tmp_path):
    first = Journal(tmp_path, IDENTITY)
    scores = [score("1.jpg"), score("ü 2.jpg", math.inf)]
    for each in scores:
        first.add("O-HAZE/nedr", each)
    first.add("O-HAZE/dcp", score("1.jpg", 7.0))
    second = Journal(tmp_path, dict(reversed(IDENTITY.items())))
    assert second.resumed == 3
    assert list(second.done("O-HAZE/nedr", ["1.jpg", "ü 2.jpg", "3.jpg"]).values()) == scores
    assert second.done("O-HAZE/dcp", ["1.jpg"])["1.jpg"].figures["ours.psnr"] == 7
    assert Journal(tmp_path, IDENTITY).resumed == 3


def test_another_identity_starts_an_empty_journal(tmp_path):
    Journal(tmp_path, IDENTITY).add("row", score("1.jpg"))
    other = Journal(tmp_path, IDENTITY | {"weights": "abd"})
    assert (other.resumed, other.replaced) == (0, True)
    assert Journal(tmp_path, IDENTITY).resumed == 0


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_truncated_line_is_ignored_and_the_next_is_whole(tmp_path, cut):
    first = Journal(tmp_path, IDENTITY)
    first.add("row", score("1.jpg"))
    first.add("row", score("2.jpg"))
    path = tmp_path / NAME
    path.write_bytes(path.read_bytes()[:-cut])
    second = Journal(tmp_path, IDENTITY)
    assert second.resumed == (2 if cut == 1 else 1)  # without its newline a line is still whole
    second.add("row", score("3.jpg"))
    assert Journal(tmp_path, IDENTITY).done("row", ["3.jpg"])


@pytest.mark.parametrize("text", ["", "not JSON\n", "[1, 2]\n", '{"identity": "x"}\n{"row": 1}\n', "\x00\xff"])
def test_a_foreign_or_damaged_file_is_replaced(tmp_path, text):
    (tmp_path / NAME).write_text(text, encoding="latin-1")
    assert Journal(tmp_path, IDENTITY).resumed == 0


def test_lines_of_another_structure_are_ignored(tmp_path):
    Journal(tmp_path, IDENTITY).add("row", score("1.jpg"))
    with open(tmp_path / NAME, "a", encoding="utf-8") as file:
        file.write(json.dumps({"row": "row", "name": "2.jpg"}) + "\n")
    assert Journal(tmp_path, IDENTITY).resumed == 1


def test_a_finished_run_deletes_its_journal(tmp_path):
    journal = Journal(tmp_path, IDENTITY)
    journal.add("row", score("1.jpg"))
    journal.close()
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"progress\.jsonl"):
        Journal(tmp_path / "file", IDENTITY)


def test_a_full_disk_and_a_journal_that_is_not_a_file_are_refused(tmp_path):
    own = Journal(tmp_path, {})
    own.path.unlink()
    own.path.mkdir()
    for work in (lambda: own.add("row", Score("a", 1, 1, 0.0, {})), own.close):
        with pytest.raises(UserError, match=r"cannot write .*progress\.jsonl: "):
            work()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "progress.jsonl").write_text("[" * 100_000)
    assert Journal(tmp_path / "other", {}).resumed == 0


def test_a_damaged_line_costs_one_image(tmp_path):
    first = Journal(tmp_path, IDENTITY)
    for name in ("1.jpg", "2.jpg", "3.jpg"):
        first.add("row", score(name))
    lines = (tmp_path / NAME).read_bytes().splitlines(keepends=True)
    lines[2] = b"\xff\x00" + lines[2][:9] + b"\n"
    (tmp_path / NAME).write_bytes(b"".join(lines))
    second = Journal(tmp_path, IDENTITY)
    assert (second.resumed, second.damaged) == (2, 1)
    assert Journal(tmp_path, IDENTITY).damaged == 0


def test_a_journal_killed_while_rewritten_loses_nothing(tmp_path, monkeypatch):
    """Killed while it writes the file anew, it has lost nothing."""
    Journal(tmp_path, IDENTITY).add("row", score("1.jpg"))
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        Journal(tmp_path, IDENTITY)
    monkeypatch.undo()
    assert Journal(tmp_path, IDENTITY).resumed == 1


def test_a_full_disk_is_reported_and_the_file_stays_unchanged(tmp_path, monkeypatch):
    journal = Journal(tmp_path, IDENTITY)
    journal.add("row", score("1.jpg"))
    with monkeypatch.context() as patch:
        patch.setattr("os.write", lambda file, data: 1)
        with pytest.raises(UserError, match=r"progress\.jsonl: No space left on device"):
            journal.add("row", score("2.jpg"))
    assert Journal(tmp_path, IDENTITY).resumed == 1
