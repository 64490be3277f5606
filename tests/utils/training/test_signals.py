"""Signals: the first asks, a second Ctrl-C ends."""

import os
import signal
import subprocess
import sys

import pytest

from utils.training import signals


@pytest.fixture(autouse=True)
def _as_before():
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_every_signal_requests_a_stop_and_handlers_are_restored(number, capfd):
    before, heard = [signal.getsignal(each) for each in signals.SIGNALS], []
    with signals.handled(heard.append):
        os.kill(os.getpid(), number)
        assert heard == [number]
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # at once, whatever the process is doing
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [number, signal.SIGTERM]  # a scheduler may say it twice
    assert [signal.getsignal(each) for each in signals.SIGNALS] == before
    assert ("second Ctrl-C" in capfd.readouterr().err) == (number == signal.SIGINT)


def test_under_a_launcher_the_same_signal_comes_twice():
    heard = []
    with signals.handled(heard.append, at_once=False):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert heard == [signal.SIGINT] * 2


def test_nohup_is_respected():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with signals.handled(lambda number: None):
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


BUSY = """
import signal, os, sys
sys.path.insert(0, os.getcwd())
from utils.training import signals
with signals.handled(lambda number: print("heard", flush=True)):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    print("alive")
"""


def test_a_second_ctrl_c_ends_the_process():
    done = subprocess.run([sys.executable, "-S", "-c", BUSY], capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT
    assert done.stdout == "heard\n"
