"""Faults are put into the numeric code, one at a time, and the tests that should notice are run.

    python tests/mutations.py 60             # that many faults, by a seed; the score, and each fault that lived
    python tests/mutations.py 60 --seed 1    # others

A fault is one operator, comparison or number of a function changed (+ for -, * for /, < for <=, 1 for 2, ...). It lives
where all tests of its module still pass: some faults change nothing that anybody could see, most of the others tell of
a missing test. Every fault has a process of its own; no file is changed. Not on Windows, which cannot fork.
"""

import argparse
import ast
import importlib.machinery
import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy  # noqa: F401 - what is slow to import is there before the first fork
import pytest
import skimage.metrics  # noqa: F401
import timm  # noqa: F401
import torch

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 240  # of the tests of one fault, on a machine that is busy; a fault may make them endless
MODULES = {  # and the tests that should notice
    "utils/physics.py": ["tests/utils/test_physics.py"],
    "utils/tiling.py": ["tests/utils/test_tiling.py"],
    "utils/rounding.py": ["tests/utils/evaluation/test_metrics.py", "tests/data/test_images.py"],
    "utils/batchnorm.py": ["tests/utils/training/test_ema.py"],
    "utils/evaluation/metrics.py": ["tests/utils/evaluation/test_metrics.py"],
    "utils/training/ema.py": ["tests/utils/training/test_ema.py"],
    "utils/training/schedules.py": ["tests/utils/training/test_updater.py"],
    "data/synthesis.py": ["tests/data/test_haze.py"],
    "data/degradations.py": ["tests/data/test_haze.py"],
    "losses/adversarial.py": ["tests/losses/test_adversarial.py"],
    "losses/frequency.py": ["tests/losses/test_frequency.py"],
    "losses/priors.py": ["tests/losses/test_priors.py"],
    "losses/sample_weights.py": ["tests/losses/test_sample_weights.py"],
    "models/layers.py": ["tests/models/test_layers.py", "tests/models/test_nedr_modules.py"],
    "models/nedr/kan.py": ["tests/models/test_nedr_modules.py", "tests/models/test_nedr_parity.py"],
    "models/nedr/implicit.py": ["tests/models/test_nedr_modules.py", "tests/models/test_nedr_parity.py"],
    "models/nedr/airlight.py": ["tests/models/test_airlight.py"],
}
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult}
OPERATORS |= {ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE}
OPERATORS |= {ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.And: ast.Or, ast.Or: ast.And}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, nargs="?", default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.chdir(ROOT)
    torch.set_num_threads(1)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    sys.dont_write_bytecode = True
    places = [(file, k) for file in MODULES for k in range(len(list(faults(ast.parse(Path(file).read_text())))))]
    chosen = random.Random(options.seed).sample(places, options.count)
    lived = 0
    for file, k in chosen:
        tree = ast.parse(Path(file).read_text())
        said = list(faults(tree))[k]()
        noticed = is_noticed(file, tree)
        lived += not noticed
        print(f"{'noticed' if noticed else 'LIVED  '}  {file}:{said}", flush=True)
    print(f"{options.count - lived} of {options.count} faults were noticed")
    return 0


def faults(tree: ast.Module) -> Iterator:
    """What can be broken in the functions of a module: functions that change ``tree`` and say what they did."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    seen = set()
    for function in functions:
        for statement in function.body:
            for node in ast.walk(statement):
                if id(node) in seen:
                    continue
                seen.add(id(node))
                if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in OPERATORS:
                    yield lambda node=node: _exchange(node)
                elif isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
                    yield lambda node=node: _compare(node)
                elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
                    yield lambda node=node: _number(node)


def _exchange(node: ast.BinOp | ast.BoolOp) -> str:
    before = ast.unparse(node)
    node.op = OPERATORS[type(node.op)]()
    return f"{node.lineno}: {before} -> {ast.unparse(node)}"


def _compare(node: ast.Compare) -> str:
    before = ast.unparse(node)
    node.ops[0] = OPERATORS[type(node.ops[0])]()
    return f"{node.lineno}: {before} -> {ast.unparse(node)}"


def _number(node: ast.Constant) -> str:
    before = node.value
    node.value = before + 1 if isinstance(before, int) else before * 1.5 + 0.1
    return f"{node.lineno}: {before} -> {node.value}"


def is_noticed(file: str, tree: ast.Module) -> bool:
    """Does a test of ``file`` fail, or not end, with ``tree`` in its place?"""
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        _replace(file, tree)
        os._exit(pytest.main(["-x", "-q", "-n", "0", "-m", "not slow", "-p", "no:cacheprovider", *MODULES[file]]))
    _, status = os.waitpid(child, 0)
    return status != 0


def _replace(file: str, tree: ast.Module) -> None:
    """Whoever imports ``file`` from now on gets ``tree``."""
    original = importlib.machinery.SourceFileLoader.get_code
    path = str(ROOT / file)

    def get_code(self, name):
        if os.path.realpath(self.get_filename(name)) == path:
            return compile(ast.fix_missing_locations(tree), path, "exec")
        return original(self, name)

    importlib.machinery.SourceFileLoader.get_code = get_code


if __name__ == "__main__":
    sys.exit(main())
