"""Damaged and hostile checkpoints: each is loaded, or refused in one line, within bounds of time and memory.

Feed n is the same in every run: `spoilt` draws it from a generator with that seed.
"""

import io
import json
import os
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bounds
import pytest
import torch
from test_training_command import OTHERS, TINY

import models
import train
from models.kanet import official
from utils import checkpoint, config
from utils.distributed import Ranks

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs os.fork")

FEEDS, FEW = 500, 30
FILES = ("last.pt", "weights.safetensors", "official.pth", "weights.safetensors")
HOW = [*OTHERS["aknet"], "warm_start.steps=0", "train.steps=9", "train.ema=0.5", "data.validation_hazy="]
HOW += ["data.validation_clear=", "device=cpu"]


class Evil:
    """Unpickled as a call that would start a program."""

    def __reduce__(self):
        return os.system, ("true",)


def settings_of(folder: Path) -> config.Settings:
    return config.load("aknet", models.settings_types(), [folder / "config.yml"], HOW)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder with a whole file of each kind: last.pt of a run, its weights, and an official file."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copy(TINY, folder)
    run = train.Run(settings_of(folder), folder, False, Ranks())
    run.terms = run.updater.step(lambda batch: run.method.losses(batch, "train"), [next(iter(stage_batches(run)))])
    run.progress.advance()
    run.ema.update()
    run.save()
    run.export(run.method)
    run.log.__exit__()
    kanet = models.build(config.load("kanet", models.settings_types(), overrides=["kanet.width=8"]))
    weights = kanet.network.state_dict()
    released = {theirs: weights[own] for own, theirs in official.names(weights).items()}
    released |= {key: torch.zeros(shape) for key, shape in official._unused(8).items()}
    torch.save({"model": {f"module.{key}": value for key, value in released.items()}}, folder / "official.pth")
    return folder


def stage_batches(run: train.Run):
    return run.loader(run.progress.stage, 0, 1)


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def endless() -> dict:
    value: dict = {"weight": torch.ones(2)}
    value["module"] = value
    return value


ODD: dict[str, Callable[[Any], Any]] = {
    "none": lambda old: None,
    "text": lambda old: "text\n\033[31m",
    "long text": lambda old: "x" * 50_000,
    "number": lambda old: -1,
    "large number": lambda old: 2**70,
    "huge number": lambda old: 10**5000,
    "NaN": lambda old: float("nan"),
    "list": lambda old: [],
    "mapping": lambda old: {},
    "tuple": lambda old: (1, "x"),
    "bytes": lambda old: b"x",
    "nested": lambda old: nested(90),
    "endless": lambda old: endless(),
    "keys": lambda old: {(1, 2): torch.ones(2), None: 3, 1.5: {}},
    "names": lambda old: {".".join("a" * 400): torch.ones(2), "weight\n": torch.ones(2)},
    "whole numbers": lambda old: torch.ones(shape_of(old), dtype=torch.int64),
    "complex": lambda old: torch.ones(shape_of(old), dtype=torch.complex64),
    "float8": lambda old: torch.ones(shape_of(old)).to(torch.float8_e4m3fn),
    "zeros": lambda old: torch.zeros(shape_of(old)),
    "no numbers": lambda old: torch.full(shape_of(old), torch.nan),
    "another shape": lambda old: torch.ones(3, 1, 7),
    "one number": lambda old: torch.tensor(3.0),
    "empty": lambda old: torch.empty(0),
    "wide": lambda old: torch.ones(2**19, 1, 1, 1).half(),
    "expanded": lambda old: torch.ones(1).half().expand(2**20, 2**14),
    "sparse": lambda old: torch.eye(3).to_sparse(),
    "meta": lambda old: torch.ones(shape_of(old), device="meta"),
    "quantized": lambda old: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
    "code": lambda old: Evil(),
}


def shape_of(old: Any) -> tuple[int, ...]:
    return tuple(old.shape) if isinstance(old, torch.Tensor) else (2, 2)


def entries(tree: Any, depth: int = 0) -> list[tuple[Any, Any]]:
    """Every place of a tree: a container, and the key of something in it; those near the root several times."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    found = []
    for key, value in list(items):
        found += [(tree, key)] * max(1, 40 >> (2 * depth)) + entries(value, depth + 1)
    return found


def change(tree: Any, chance: random.Random) -> str:
    """Change one thing in ``tree``; returns what."""
    container, key = chance.choice(entries(tree))
    how = chance.choice(["gone", "renamed", "all", *ODD])
    if how == "gone":
        del container[key]
    elif how == "renamed" and isinstance(container, dict):
        container[f"{key}x"] = container.pop(key)
    elif how == "all" and isinstance(container, dict):
        odd = chance.choice(list(ODD))
        container.update({each: ODD[odd](value) for each, value in container.items()})
        how = f"all {odd}"
    elif how in ODD:
        container[key] = ODD[how](container[key])
    return f"{key}: {how}"


def damage(data: bytes, chance: random.Random) -> tuple[str, bytes]:
    how, place, spoilt = chance.choice(["flip", "cut", "zeros", "more"]), chance.randrange(len(data)), bytearray(data)
    if chance.random() < 0.5:  # where the header or the pickle is
        place = min(place, chance.randrange(4_000))
    if how == "flip":
        for _ in range(chance.choice([1, 1, 8])):
            spoilt[min(len(data) - 1, place + chance.randrange(64))] ^= 1 << chance.randrange(8)
    elif how == "cut":
        del spoilt[place:]
    elif how == "zeros":
        spoilt[place : place + 200] = bytes(200)
    else:
        spoilt[place:place] = chance.randbytes(chance.randrange(1, 64))
    return f"{how} at {place}", bytes(spoilt)


def saved(state: Any) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def packed(data: bytes, chance: random.Random) -> tuple[str, bytes]:
    """The archive with its members compressed, one of them an endless row of zeros, or claimed several times."""
    how, file = chance.choice(["compressed", "bomb", "twice"]), io.BytesIO()
    kind = zipfile.ZIP_STORED if how == "twice" else zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w", kind) as new:
        for member in old.infolist():
            bomb = how == "bomb" and member.filename.endswith("data/0")
            new.writestr(member.filename, bytes(2**26) if bomb else old.read(member))
        if how == "twice":
            new.filelist += 9 * new.filelist
    return how, file.getvalue()


def json_of(tree: Any) -> str:
    try:
        return json.dumps(tree, default=str)
    except (TypeError, ValueError):  # no JSON
        return "{"


def rewritten(data: bytes, chance: random.Random) -> tuple[str, bytes]:
    """A .safetensors file with one thing in its header, or in what its metadata say, changed."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    notes = header["__metadata__"]
    notes.pop("checksum")
    how = chance.choice(["notes", "notes", "deep", "list", "header", "entry"])
    if how == "notes":
        tree = json.loads(notes["metadata"])
        how = change(tree, chance)
        notes["metadata"] = json_of(tree)
    elif how in ("deep", "list"):
        notes["metadata"] = "[" * 1000 + "]" * 1000 if how == "deep" else '["model"]'
    elif how == "header":
        how = change(notes, chance)
    else:
        entry = header[chance.choice([key for key in header if key != "__metadata__"])]
        wrong = {"dtype": "I32", "shape": [2**40], "data_offsets": [0, 2**40]}
        key = chance.choice(list(wrong))
        entry[key], how = wrong[key], f"entry {key}"
    text = json_of(header).encode()
    return how, struct.pack("<Q", len(text)) + text + data[8 + size :]


def damaged_file(whole: Path, number: int) -> tuple[str, str, bytes]:
    """Feed ``number``: the name of its file, what was done to it, and its bytes."""
    chance = random.Random(number)
    name = FILES[number % len(FILES)]
    data = (whole / name).read_bytes()
    if chance.random() < 0.3:
        return name, *damage(data, chance)
    if name == "weights.safetensors":
        return name, *rewritten(data, chance)
    if chance.random() < 0.1:
        return name, *packed(data, chance)
    state = torch.load(io.BytesIO(data), weights_only=True)
    state.pop("checksum", None)  # as in files of before: what is changed must be seen for itself
    how = change(state, chance)
    return name, how, saved(state)


def use(path: Path, number: int) -> None:
    """What the commands do with a file: a run goes on from it, or it is loaded."""
    if path.name == "last.pt" and number % (2 * len(FILES)):
        train.Run(settings_of(path.parent), path.parent, True, Ranks())
        return
    method = models.load(path)
    assert method.dehaze(torch.rand(1, 3, 8, 8)).isfinite().all()
    if path.suffix == ".safetensors":
        checkpoint.read_metadata(path)


def faults(whole: Path, folder: Path, numbers: range) -> list[str]:
    """What is wrong with the answers to these feeds."""
    found, refused = [], 0
    shutil.copy(whole / "config.yml", folder)
    for number in numbers:
        name, how, data = damaged_file(whole, number)
        (folder / name).write_bytes(data)
        verdict = bounds.run(lambda number=number, name=name: use(folder / name, number), folder)
        found += [f"feed {number}, {name}, {how}: {verdict.fault}"] if verdict.fault else []
        refused += bool(verdict.refused)
        (folder / name).unlink()
    assert refused > len(numbers) / 2  # else the feeds are hardly spoilt
    return found


def test_a_few_damaged_files_end_in_one_line(whole, tmp_path):
    assert not faults(whole, tmp_path, range(FEW))


@pytest.mark.slow
def test_many_damaged_files_end_in_one_line(whole, tmp_path):
    found = faults(whole, tmp_path, range(FEW, FEEDS))
    assert not found, "\n\n".join(found)


def test_whole_files_are_used(whole, tmp_path):
    """The harness does not refuse for reasons of its own."""
    for number, name in ((0, "last.pt"), (4, "last.pt"), (1, "weights.safetensors"), (2, "official.pth")):
        for file in ("config.yml", name):
            shutil.copy(whole / file, tmp_path)
        found = bounds.run(lambda number=number, name=name: use(tmp_path / name, number), tmp_path)
        assert found == ("", ""), name
        (tmp_path / name).unlink()
