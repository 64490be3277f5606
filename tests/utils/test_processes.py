import os
import sys

import pytest

from utils import processes


def raising(error):
    def kill(pid, number):
        raise error

    return kill


def test_where_the_system_has_no_list_of_processes_they_count_as_alive(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "PROC", tmp_path)
    assert processes.started(os.getpid()) == ""
    assert processes.started_at(os.getpid()) == -float("inf")
    assert processes.alive(os.getpid())


@pytest.mark.parametrize(("error", "alive"), [(PermissionError(), True), (ProcessLookupError(), False)])
def test_a_process_of_another_user_is_alive(error, alive, monkeypatch):
    monkeypatch.setattr(os, "kill", raising(error))
    assert processes.alive(1) == alive


def test_an_impossible_process_number_is_not_alive():
    assert not processes.alive(2**70)


def test_on_windows_no_signal_is_sent(monkeypatch):
    """There os.kill would end it."""
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(os, "kill", raising(AssertionError("sent")))
    assert processes.alive(2**70)
