"""The harness of the fuzzers sees what it must see."""

import mmap
import os
import subprocess
import time
from pathlib import Path

import bounds
import pytest
import torch

from utils.errors import UserError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs os.fork")


class TwoLinesError(UserError):
    """What a `UserError` itself cannot be."""

    def __str__(self) -> str:
        return "a\nb"


def refuse(message: str, kind: type[UserError] = UserError) -> None:
    raise kind(message)


def test_success_and_one_line_errors_are_no_faults(tmp_path):
    assert bounds.run(lambda: (tmp_path / "a").write_text("x"), tmp_path) == ("", "")
    assert bounds.run(lambda: refuse("a.pt is bad; fetch it again"), tmp_path) == ("a.pt is bad; fetch it again", "")


FAULTS = {
    "another error": (lambda: {}["x"], "KeyError"),
    "two lines": (lambda: refuse("a\nb", TwoLinesError), "not one line"),
    "an end": (lambda: os._exit(0), "ended without a word"),
    "an exit": (lambda: exit(0), "SystemExit"),
    "a crash": (lambda: os.abort(), "died of SIGABRT"),
    "a hang": (lambda: time.sleep(30), "not done after 0.5 s"),
    "memory": (lambda: torch.frombuffer(mmap.mmap(-1, 2**28), dtype=torch.uint8).fill_(1), "took 2"),
    "a program": (lambda: subprocess.run(["true"]), "did subprocess.Popen"),
    "a file elsewhere": (lambda: Path(__file__).with_suffix(".trace").touch(), "did open"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_are_detected(tmp_path, case):
    work, fault = FAULTS[case]
    try:
        found = bounds.run(work, tmp_path, seconds=0.5 if case == "a hang" else 20, most=2**27)
    finally:
        Path(__file__).with_suffix(".trace").unlink(missing_ok=True)
    assert fault in found.fault
