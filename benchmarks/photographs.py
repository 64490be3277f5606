"""Time and peak memory to dehaze one image, by method and size, each case in its own process.

    python -m benchmarks.photographs nedr dcp FILE nedr@nedr.working_size=0 --sizes 256x256 620x460 4000x3000

A method is a name (with the weights that ship, if any) or a file of weights; after an @ follow settings that may change
after training. Peak memory is that of the whole process, PyTorch included. One thread unless --threads is given.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

import torch

import models
from models import candidates
from models.method import Method
from utils import columns, config, errors, memory
from utils import device as devices
from utils.errors import UserError, quoted

SECONDS = 8.0  # for which a shorter case is repeated


def main(arguments: list[str] | None = None) -> int:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="benchmarks.photographs", description=__doc__, formatter_class=style)
    parser.add_argument("methods", nargs="+", metavar="METHOD", help="name or file, with @key=value,... after it")
    parser.add_argument("--sizes", nargs="+", default=["256x256", "620x460", "4000x3000"], metavar="WxH")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # measure one case in this process
    options = parser.parse_args(arguments)
    sizes = [_size(text) for text in options.sizes]
    if options.one:
        print(json.dumps(measure(options.methods[0], *sizes[0], options.threads)))
        return 0
    for method in options.methods:
        _load(method)  # errors are reported before anything is measured
    rows = [[run(method, size, options.threads) for size in options.sizes] for method in options.methods]
    print(table(options.methods, options.sizes, rows, options.threads))
    return 0


def run(method: str, size: str, threads: int) -> dict:
    """Measure one case in its own process."""
    command = [sys.executable, "-m", "benchmarks.photographs", method, "--sizes", size, "--threads", str(threads)]
    done = subprocess.run([*command, "--one"], capture_output=True, text=True)
    if done.returncode:
        raise UserError(
            f"{method} at {size}: {(done.stderr.strip() or f'ended with status {done.returncode}').splitlines()[-1]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def measure(spec: str, width: int, height: int, threads: int) -> dict[str, float]:
    """Median seconds to dehaze an image, after a warm-up pass, and the process's peak memory in bytes."""
    torch.set_num_threads(threads)
    memory.keep_memory()
    device = torch.device("cpu")
    method = _load(spec)
    hazy = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    tile = method.tile(hazy, "auto")
    seconds = []
    memory.reset_peak(device)
    method.dehaze(hazy, tile)
    while not seconds or (sum(seconds) < SECONDS and len(seconds) < 9):
        start = time.perf_counter()
        method.dehaze(hazy, tile)
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "bytes": memory.peak_memory(device)}


def table(methods: Sequence[str], sizes: Sequence[str], rows: Sequence[Sequence[dict]], threads: int) -> str:
    """Markdown: one row a method, with seconds and MiB for every size."""
    lines = [["method", *sizes]]
    for method, row in zip(methods, rows, strict=True):
        cells = [f"{case['seconds']:.3f} s, {case['bytes'] / 2**20:,.0f} MiB" for case in row]
        lines.append([method, *cells])
    return "\n".join(
        [*columns.markdown(lines), "", f"{devices.describe(torch.device('cpu'))}, of which {threads} used; float32."]
    )


def _load(spec: str) -> Method:
    """The method as test.py loads it, with the same errors for absent files and fixed settings."""
    source, _, settings = (spec, "", "") if os.path.exists(spec) else spec.partition("@")
    names = [source] if source in models.METHODS else []
    test = config.section("test", [] if names else [("weights", [source])])
    [tested] = candidates.prepare(names, None, test, (), [text for text in settings.split(",") if text])
    return tested.method


def _size(text: str) -> tuple[int, int]:
    width, separator, height = text.partition("x")
    if not (separator and width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise UserError(f"--sizes {quoted(text)}: write width x height, as 620x460")
    return int(width), int(height)


if __name__ == "__main__":
    errors.run(main)
