"""One run a folder: who is refused, and whose lock is taken over."""

import errno
import json
import os
import signal
import subprocess
import sys

import pytest

from utils import lock, processes
from utils.errors import UserError

OWN = {"host": processes.host(), "process": os.getpid(), "started": processes.started(os.getpid())}


def put(folder, **changes):
    (folder / lock.NAME).write_text(json.dumps(OWN | changes))


def test_a_folder_is_locked_by_one_run(tmp_path):
    with lock.held(tmp_path) as warning:
        assert warning == ""
        with (
            pytest.raises(UserError, match=rf"in use by process {os.getpid()} on .*: wait for it, end it \(kill"),
            lock.held(tmp_path),
        ):
            pass
        assert json.loads((tmp_path / lock.NAME).read_text()) == OWN
    assert not list(tmp_path.iterdir())
    with lock.held(tmp_path) as warning:
        assert warning == ""


def test_an_error_releases_the_lock(tmp_path):
    with pytest.raises(ValueError, match="inside"), lock.held(tmp_path):
        raise ValueError("inside")
    assert not list(tmp_path.iterdir())


def killed(collected: bool) -> int:
    child = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    child.send_signal(signal.SIGKILL)
    if collected:
        child.wait()
    else:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    return child.pid


@pytest.mark.parametrize("collected", [True, False])
def test_the_lock_of_a_dead_process_is_taken_over_and_reported(collected, tmp_path):
    pid = killed(collected)
    put(tmp_path, process=pid, started="boot:1")
    (tmp_path / f".last.pt.{pid}.tmp").touch()
    with lock.held(tmp_path) as warning:
        assert warning == f"the last run in {tmp_path} (process {pid}) did not release its lock; it is taken over"
        assert [path.name for path in tmp_path.iterdir()] == [lock.NAME]
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not processes.started(os.getpid()), reason="needs /proc")
def test_a_reused_process_number_does_not_hold_the_lock(tmp_path):
    put(tmp_path, started="another boot:17")
    with lock.held(tmp_path) as warning:
        assert "did not release its lock" in warning


def test_a_lock_of_another_machine_is_respected(tmp_path):
    put(tmp_path, host="elsewhere", process=1, started="boot:1")
    with (
        pytest.raises(UserError, match=r"process 1 on elsewhere, .*if it no longer runs, remove .*\.lock"),
        lock.held(tmp_path),
    ):
        pass
    assert json.loads((tmp_path / lock.NAME).read_text())["host"] == "elsewhere"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": 1, "process": "x"}'])
def test_a_lock_that_does_not_name_its_owner_is_taken_over(text, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "OWNER_TIMEOUT", 0.01)
    (tmp_path / lock.NAME).write_text(text)
    with lock.held(tmp_path) as warning:
        assert "did not release its lock" in warning


def test_only_one_of_two_processes_takes_over_a_lock(tmp_path):
    """The other was faster: between the look at the old lock and its removal there is a new one."""
    put(tmp_path, process=1, started="new")
    assert not lock._remove(tmp_path / lock.NAME, OWN | {"process": 2})
    assert json.loads((tmp_path / lock.NAME).read_text())["process"] == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_a_lock_removed_meanwhile_is_not_removed_again(tmp_path):
    assert not lock._remove(tmp_path / lock.NAME, OWN)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_no_lock(tmp_path, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device; free some space"), lock.held(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_taken_over_by_another_is_not_released(tmp_path):
    with lock.held(tmp_path):
        put(tmp_path, host="elsewhere")
    assert (tmp_path / lock.NAME).exists()


def test_an_unwritable_folder_is_reported(tmp_path):
    with pytest.raises(UserError, match="cannot write"), lock.held(tmp_path / "absent"):
        pass
