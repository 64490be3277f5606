"""Files that appear whole or not at all, and lines that do."""

import errno
import os
import time

import pytest

from utils import files, processes
from utils.errors import UserError


def test_lines_are_appended_whole(tmp_path):
    path = tmp_path / "lines"
    for line in ("one", "zwei — ü"):
        files.append_line(path, line)
    assert path.read_bytes() == "one\nzwei — ü\n".encode()


def test_a_truncated_line_does_not_affect_others(tmp_path):
    path = tmp_path / "lines"
    path.write_bytes(b"one\ntw")
    files.append_line(path, "three")
    files.append_line(path, "four")
    assert path.read_bytes() == b"one\ntw\nthree\nfour\n"


@pytest.mark.parametrize("fits", [0, 3])
def test_a_full_disk_is_reported_and_the_file_stays_unchanged(fits, tmp_path, monkeypatch):
    path, write = tmp_path / "lines", os.write
    files.append_line(path, "one")

    def full(file, data):
        if not fits:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data[:fits])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(UserError, match=r"cannot write .*lines: No space left on device; free some space"):
            files.append_line(path, "second")
    assert path.read_bytes() == b"one\n"
    files.append_line(path, "three")
    assert path.read_bytes() == b"one\nthree\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_disk_that_is_really_full(tmp_path):
    (tmp_path / "lines").symlink_to("/dev/full")
    with pytest.raises(UserError, match="No space left"):
        files.append_line(tmp_path / "lines", "one")


def test_a_path_below_a_file_is_reported(tmp_path):
    (tmp_path / "file").touch()
    for write in (files.append_line, files.write_text):
        with pytest.raises(UserError, match=r"cannot write .*file/a"):
            write(tmp_path / "file" / "a", "text")


def test_records_are_read_around_damage(tmp_path):
    path = tmp_path / "lines"
    path.write_bytes(b'{"a": 1}\nno JSON\n\n[1]\n\x00\x00\xff\n' + b"[" * 100_000 + b'\n{"a": 2}\n{"a"')
    assert files.read_records(path) == ([{"a": 1}, {"a": 2}], [2, 4, 5, 6, 8])
    assert files.read_records(tmp_path / "absent") == ([], [])
    with pytest.raises(UserError, match="cannot read"):
        files.read_records(tmp_path)


def dead_process() -> int:
    """The number of a process that ran, and is gone."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


def test_only_fragments_of_dead_processes_are_removed(tmp_path):
    dead = dead_process()
    stray = [f".last.pt.{dead}.tmp", f".a b.png.{dead}.part", f".unfinished.last_pt-0badc0de-{dead}"]
    kept = [f".last.pt.{os.getpid()}.tmp", f"last.pt.{dead}.tmp", ".last.pt.tmp", f".last.pt.{dead}.old", "last.pt"]
    for name in (*stray, *kept):
        (tmp_path / name).touch()
    (tmp_path / f".folder.{dead}.tmp").mkdir()
    files.clear_temporaries(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*kept, f".folder.{dead}.tmp"}
    files.clear_temporaries(tmp_path / "absent", ["pictures"])


def test_temporary_files_are_removed_below_the_parts_named_alone(tmp_path):
    name = f".unfinished.a_png-0badc0de-{dead_process()}"
    places = ["", "pictures", "pictures/SOTS/nedr", "mine"]
    for place in places:
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        (tmp_path / place / name).touch()
    files.clear_temporaries(tmp_path, ["pictures", "panels"])
    assert [place for place in places if (tmp_path / place / name).exists()] == ["mine"]


def test_a_reused_process_number_owns_no_fragment(tmp_path):
    own = tmp_path / f".last.pt.{os.getpid()}.tmp"
    own.touch()
    before = processes.started_at(os.getpid()) - 60
    os.utime(own, (before, before))
    files.clear_temporaries(tmp_path)
    assert not own.exists()
    assert abs(time.time() - processes.started_at(os.getpid())) < 24 * 3600
