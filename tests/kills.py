"""Kill real trainings again and again, at random moments and in the middle of writing a file, and look at what is left.

    python tests/kills.py 50            # so many kills of a tiny NeDR, with and without workers
    python tests/kills.py 2 --large     # of a D4 at full width, whose last.pt has 400 MB, as it is being written

After every kill last.pt, the weights, the settings and the logs must be whole, and the next run goes on from them; one
that was killed often must at last be, bit for bit, the one that was never killed. Linux only: trainings are forked from
this process, which has PyTorch loaded already.
"""

import argparse
import contextlib
import itertools
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import models
import train
from utils import checkpoint, errors, files

ROOT = Path(train.__file__).parent
TINY = ["warm_start.steps=5", "train.steps=5", "train.ema=0.5", "log.save_every=4", "log.validate_every=2"]
TINY += ["nedr.gan_weight=0", "train.recalibrate=0", "log.pictures_every=3"]
LARGE = ["warm_start.steps=0", "train.steps=3", "train.ema=0.5", "d4.base_channels=64", "d4.encoder_weights=none"]
LARGE += ["log.save_every=1", "log.validate_every=0", "data.validation_hazy=", "data.validation_clear="]
LARGE += ["data.crop_size=128", "train.recalibrate=0"]


class Case(NamedTuple):
    """What is trained: a method with settings over those of checkpoints/tiny, shrunk or not."""

    model: str
    given: list[str]
    shallow: bool = True


def shallow(method: models.Method) -> models.Method:
    """The same with 7 of its encoders' 24 blocks, for speed."""
    for network in (method.removal, method.depth):
        network.pyramid.encoder.blocks = nn.Sequential(*(blocks[:1] for blocks in network.pyramid.encoder.blocks))
    return method


def start(case: Case, folder: Path, workers: int = 0, prepare: Callable[[], None] = lambda: None) -> int:
    """Train in ``folder``, in a process of its own and a group of its own; returns its number."""
    child = os.fork()
    if child:
        return child
    os.setsid()
    said = os.open(folder.with_suffix(".said"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    if case.shallow:
        build = models.build
        models.build = lambda settings: shallow(build(settings))
    given = ["--model", case.model, "--checkpoints", str(folder), "--resume", *case.given, f"data.workers={workers}"]
    status = 1
    with contextlib.suppress(BaseException):
        prepare()
        try:
            status = train.main(given)
        except BaseException:
            traceback.print_exc()
    sys.stdout.flush()
    os._exit(status)


def ended(child: int) -> int | None:
    """The exit status of a process that has ended, negative for a signal; None while it runs."""
    pid, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_in_write(number: int, share: float) -> None:
    """The write of that ``number``, from 0, will be the last of this process, which dies with ``share`` of it done."""
    numbers = itertools.count()
    fsync, replace, write = os.fsync, os.replace, os.write

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def os_fsync(file: int) -> None:  # every whole file: last.pt, weights, settings, the lock
        fsync(file)
        if next(numbers) == number:
            os.ftruncate(file, int(share * os.fstat(file).st_size))
            die()

    def os_replace(source: Path, target: Path) -> None:
        doomed = next(numbers) == number
        if not doomed or share > 0.5:
            replace(source, target)
        if doomed:
            die()

    def os_write(file: int, data: bytes) -> int:  # every line of a log, and the lock
        if next(numbers) == number:
            write(file, data[: int(share * len(data))])
            die()
        return write(file, data)

    os.fsync, os.replace, os.write = os_fsync, os_replace, os_write


def losses(folder: Path) -> dict[int, list[float]]:
    """The points of one loss in TensorBoard, by step; none if the run was killed before it made the folder."""
    if not (folder / "tensorboard").exists():
        return {}
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    found: dict[int, list[float]] = {}
    if "loss/generators" in board.Tags()["scalars"]:
        for event in board.Scalars("loss/generators"):
            found.setdefault(event.step, []).append(event.value)
    return found


def saved_step(case: Case, folder: Path) -> int:
    """The step of last.pt over both stages, 0 without one. Raises `UserError` if it is damaged."""
    if not (folder / "last.pt").exists():
        return 0
    state = checkpoint.read(folder / "last.pt")
    both = state["settings"]["warm_start"]["steps"] if state["stage"] == "train" else 0
    return both + state["step"]


def check_state(case: Case, folder: Path, before: int) -> int:
    """Everything that a killed run leaves is whole, and nothing is lost that was saved; returns the step saved."""
    step = saved_step(case, folder)
    assert step >= before, f"last.pt is of step {step}, and was of {before}"
    for path in folder.glob("*.safetensors"):
        checkpoint.read_safetensors(path)
    if (folder / "settings.yml").exists():
        assert yaml.safe_load((folder / "settings.yml").read_text())["model"] == case.model
    records, damaged = files.read_records(folder / "log.jsonl")
    assert len(damaged) <= 1, f"log.jsonl: lines {damaged} are damaged"
    logged = Counter(record["step"] for record in records if "loss/generators" in record and record["step"] <= step)
    assert logged == Counter(range(1, step + 1)), f"log.jsonl: of {step} steps there are {logged}"
    points = losses(folder)
    lost = [k for k in range(1, step + 1) if k not in points]
    assert not lost, f"TensorBoard has lost the points of steps {lost} of {step}"
    return step


def same(one: Path, other: Path) -> None:
    """Two finished runs are the same, bit for bit, and the folders hold the same files."""
    a, b = (checkpoint.read(folder / "last.pt") for folder in (one, other))
    differ = [key for key in flat(a) | flat(b) if not equal(flat(a).get(key), flat(b).get(key))]
    differ = [key for key in differ if not key.startswith("settings/data/workers")]
    assert not differ, f"last.pt differs in {differ[:5]}"
    for name in ("weights.safetensors", "warm_start.safetensors"):
        if (one / name).exists():
            a, b = (checkpoint.read_safetensors(folder / name) for folder in (one, other))
            assert (a[1]["stage"], a[1]["step"]) == (b[1]["stage"], b[1]["step"]), name
            assert all(equal(value, b[0][key]) for key, value in a[0].items()), name
    figures = [files.read_records(folder / "log.jsonl") for folder in (one, other)]
    a, b = ([{k: v for k, v in line.items() if "speed" not in k} for line in lines] for lines, _ in figures)
    assert a == b, "log.jsonl differs"
    assert losses(one) == losses(other), f"TensorBoard differs: {losses(other)}"
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}


def flat(tree: dict, prefix: str = "") -> dict:
    found = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def equal(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return a == b


def unfinished(folder: Path) -> list[Path]:
    """The temporary files of processes that were killed, or still write."""
    return [path for path in folder.iterdir() if files.TEMPORARY.fullmatch(path.name)]


def new_folder(parent: Path, name: str) -> Path:
    folder = parent / name
    folder.mkdir()
    shutil.copy(ROOT / "checkpoints" / "tiny" / "config.yml", folder)
    return folder


def train_whole(case: Case, folder: Path) -> float:
    """Train to the end, unkilled; returns the seconds it took."""
    begun = time.monotonic()
    if status := wait(start(case, folder)):
        raise SystemExit(f"a training failed ({status}):\n{folder.with_suffix('.said').read_text()}")
    return time.monotonic() - begun


def at_random(case: Case, folder: Path, seconds: float, dice: random.Random) -> int:
    """Start a training and kill it at a random moment, alone or with its workers; its exit status."""
    child = start(case, folder, workers=dice.choice([0, 0, 1]))
    until = time.monotonic() + dice.uniform(0, seconds)
    status = None
    while status is None and time.monotonic() < until:
        time.sleep(0.01)
        status = ended(child)
    if status is None:
        dice.choice([os.kill, os.killpg])(child, signal.SIGKILL)
        status = wait(child)
    return status


def in_a_write(case: Case, folder: Path, dice: random.Random) -> int:
    """Start a training that dies in one of its next writes; its exit status."""
    number, share = dice.randrange(25), dice.random()
    return wait(start(case, folder, prepare=lambda: die_in_write(number, share)))


def in_a_large_write(case: Case, folder: Path, dice: random.Random) -> int:
    """Start a training and kill it when its new last.pt has grown to a random size."""
    child, size, status = start(case, folder), dice.uniform(0, 2.5e8), None
    while (status := ended(child)) is None:
        with contextlib.suppress(FileNotFoundError):  # it has just replaced the old one
            if any("last_pt" in path.name and path.stat().st_size > size for path in unfinished(folder)):
                os.kill(child, signal.SIGKILL)
                return wait(child)
        time.sleep(0.002)
    return status


def kill_repeatedly(case: Case, kills: int, dice: random.Random, ways: list[Callable], parent: Path) -> Counter:
    """So many kills of trainings, one folder after the other; what happened, by name."""
    whole, counts, step = new_folder(parent, "whole"), Counter(), 0
    seconds = train_whole(case, whole)
    folder = new_folder(parent, "run 0")
    while counts["kills"] < kills:
        way = ways[counts["runs"] % len(ways)]
        given = {"seconds": seconds} if way is at_random else {}
        status = way(case, folder, dice=dice, **given)
        counts["runs"] += 1
        if status not in (0, -signal.SIGKILL):
            raise SystemExit(f"a training failed ({status}):\n{folder.with_suffix('.said').read_text()}")
        if status:
            counts["kills"] += 1
            counts[way.__name__.replace("_", " ")] += 1
            counts["with a file half written"] += bool(unfinished(folder))
            step = check_state(case, folder, step)
        else:
            same(whole, folder)
            counts["finished, the same as unkilled"] += 1
            shutil.rmtree(folder)
            folder, step = new_folder(parent, f"run {counts['runs']}"), 0
        assert counts["runs"] < 20 or counts["kills"], "runs are never killed: in what they write nothing is found"
    train_whole(case, folder)
    same(whole, folder)
    assert not [*folder.glob(".*")], "temporary files or a lock are left"
    counts["finished, the same as unkilled"] += 1
    return counts


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, nargs="?", default=50, help="how many kills")
    parser.add_argument("--large", action="store_true", help="of a large state, while it is being written")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every point that it purges
    case = Case("d4", LARGE, shallow=False) if options.large else Case("nedr", TINY)
    ways = [in_a_large_write] if options.large else [at_random, in_a_write]
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as parent:
        counts = kill_repeatedly(case, options.count, random.Random(options.seed), ways, Path(parent))
    print(json.dumps(counts | {"seconds": round(time.monotonic() - begun)}))
    return 0


if __name__ == "__main__":
    errors.run(main)
