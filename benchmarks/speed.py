"""The speed of NeDR on this machine, compared with the released code and with the machine's peak throughput.

    python -m benchmarks.speed
    python -m benchmarks.speed --sizes 256 --steps 128 --repeats 3 --output results/speed
    python -m benchmarks.speed --into docs/performance.md README.md

Forward passes, training steps (one unpaired step of all five networks), a large image in tiles and the loading of
images for such steps, each in its own process, by this code base in float32 and in reduced precision, and by a
step-by-step copy of the released code (tests/models/nedr_reference.py) with the same networks. Cases of one size are
run in turn, in two rounds (large batches in one). On a GPU also steps of the largest batch that fits. The table is
printed, and written with all figures as speed.json and speed.md to --output; --into writes it between the marks
``<!-- speed -->`` (or, in short, ``<!-- speed in short -->``) and ``<!-- /speed -->`` of files.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.speed_cases import CROP, WORKERS, Case, Run
from utils import columns, errors
from utils import device as devices
from utils.errors import UserError
from utils.files import write_text

ROUNDS = 2
PRECISIONS = ("float32", "bf16", "fp16")
LARGE = (1536, 2048)  # (H, W) of a photograph of three megapixels, in tiles
USUAL = (460, 620)  # (H, W) of the images of RESIDE
FILES = (480, 640)  # (H, W) of the files from which crops are loaded
ROOT = Path(__file__).resolve().parent.parent
MARKS = re.compile(r"(<!-- speed( in short)? -->\n).*?(<!-- /speed -->)", re.DOTALL)
KINDS = {
    "forward": "forward pass",
    "step": "training step",
    "tiled": "large image, tiles of 512",
    "loading": "loading",
}

Results = dict[Case, Run]


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    device = devices.pick(options.device)
    for file in options.into:
        if not MARKS.search(_read(file)):
            raise UserError(f"{file}: has no marks '<!-- speed -->' and '<!-- /speed -->' to write between; add them")
    machine, results = load(options.again) if options.again else run(device, options)
    report = markdown(results, machine)
    print(report)
    if options.output:
        write_text(Path(options.output) / "speed.md", report)
    parts = {None: report, " in short": short(results, machine)} if options.into else {}
    for file in options.into:
        write_text(file, MARKS.sub(lambda mark: mark[1] + parts[mark[2]] + mark[3], _read(file)))
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="benchmarks.speed", description=__doc__, formatter_class=style)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    sides = {"type": int, "nargs": "*", "metavar": "SIDE"}
    parser.add_argument("--sizes", **sides, default=[128, 256, 512, 1024], help="of images to dehaze, pixels a side")
    parser.add_argument("--steps", **sides, default=[128, 256], help="of crops to train on")
    parser.add_argument(
        "--batches",
        type=int,
        nargs="+",
        default=[1, 4],
        metavar="N",
        help="crops a step, the first for all --steps, others (the released is 6) for the largest",
    )
    parser.add_argument(
        "--large",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also images of 620x460, and a large one in tiles",
    )
    parser.add_argument(
        "--compiled", action="store_true", help="also steps by torch.compile, which takes minutes to start"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="the most repeats of each case in each of two rounds; at least 3"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all")
    parser.add_argument("--output", metavar="DIR", help="folder for speed.md and speed.json")
    parser.add_argument(
        "--again", type=Path, metavar="FILE", help="measure nothing; make the tables from an earlier speed.json"
    )
    parser.add_argument(
        "--into", type=Path, nargs="+", default=[], metavar="FILE", help="files to write the table into"
    )
    options = parser.parse_args(arguments)
    for side in (*options.sizes, *options.steps):
        if side < 128 or side % 32:
            raise UserError(
                f"{side} pixels: sides must be multiples of 32, at least 128, since the reference does not pad"
            )
    if min(options.batches) < 1:
        raise UserError(f"--batches {min(options.batches)}: a step takes at least one crop")
    return options


def run(device: torch.device, options: argparse.Namespace) -> tuple[dict, Results]:
    """The machine's peak throughput, and the measurements of every case."""
    machine = worker(None, device, options)
    cases = plan(device, options)
    results: Results = {}
    for number, case in enumerate(cases, 1):
        print(f"{number} of {len(cases)}: {KINDS[case.kind]}, {_size(case)}, {case.label}", file=sys.stderr)
        measured = Run(**worker(case, device, options))
        before = results.get(case)
        results[case] = measured._replace(seconds=before.seconds + measured.seconds) if before else measured
        if options.output:  # after every case, so that an interrupted run keeps its results
            write_text(Path(options.output) / "speed.json", json.dumps(record(results, machine), indent=2))
    return machine, results


def plan(device: torch.device, options: argparse.Namespace) -> list[Case]:
    """All cases in the order in which they run: compared ones next to each other, each `ROUNDS` times.

    Large batches run once, since their steps are long.
    """
    precisions = _precisions(device)
    cases = []
    for side in options.sizes:
        cases += _compared(Case("forward", "reference", "float32", side, side), precisions) * ROUNDS
    first, *batches = options.batches
    for side in options.steps:
        group = _compared(Case("step", "reference", "float32", side, side, first), precisions)
        step = group[0]._replace(of="ours")
        group += [step._replace(precision=precision, checkpointing=True) for precision in precisions[:2]]
        group += [step._replace(precision=precision, compiled=True) for precision in precisions[1:] if options.compiled]
        cases += group * ROUNDS
    if options.steps:
        side = max(options.steps)
        for batch in batches:
            cases += _compared(Case("step", "reference", "float32", side, side, batch), precisions)
        if device.type == "cuda":
            cases += [Case("step", "ours", precision, side, side, 0) for precision in precisions]
        cases.append(Case("loading", "ours", "float32", *FILES, max(options.batches)))
    if options.large:
        for kind, size in (("forward", USUAL), ("tiled", LARGE)):
            cases += [Case(kind, "ours", precision, *size) for precision in precisions]
    return cases


def _precisions(device: torch.device) -> list[str]:
    return list(PRECISIONS[: 2 if device.type == "cpu" else 3])


def _compared(reference: Case, precisions: list[str]) -> list[Case]:
    return [reference, *(reference._replace(of="ours", precision=precision) for precision in precisions)]


def worker(case: Case | None, device: torch.device, options: argparse.Namespace) -> dict:
    """The result of `benchmarks.speed_cases` for a case (None: the machine). Raises `UserError` if it fails."""
    task = json.dumps([case, str(device), options.repeats, options.threads])
    command = [sys.executable, "-m", "benchmarks.speed_cases", task]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        subject = f"{KINDS[case.kind]}, {_size(case)}, {case.label}" if case else "the machine's ceiling"
        raise UserError(f"{subject} could not be measured: {last}; leave that size out, or free memory")
    return json.loads(done.stdout.splitlines()[-1])


def markdown(results: Results, machine: dict) -> str:
    """The table with its notes."""
    heads = ["", "size", "", "seconds (median, range)", "against reference", "peak memory", "TFLOP/s", "of the ceiling"]
    rows = [heads]
    for case, run in results.items():
        if case.kind == "loading":
            continue
        speed = run.flops / run.median
        limit = machine[case.precision]
        cells = [KINDS[case.kind], _size(case, run.batch), case.label]
        cells += [f"{run.median:.3g} ({min(run.seconds):.3g}-{max(run.seconds):.3g})", _against(case, results)]
        cells += [f"{run.memory / 2**20:,.0f} MiB", f"{speed / 1e12:.3g}", f"{speed / limit:.0%}"]
        rows.append(cells)
    limits = ", ".join(f"{machine[kind] / 1e12:.3g} in {kind}" for kind in PRECISIONS if kind in machine)
    notes = [
        f"- {_machine(machine)}.",
        "- Peak memory is what is held beyond weights and optimisers.",
        f"- The ceiling is the better of a large matrix product and a 5x5 convolution, in TFLOP/s: {limits}.",
    ]
    return "\n".join([*columns.markdown(rows), "", *notes, *_notes(results)]) + "\n"


def _notes(results: Results) -> list[str]:
    """Notes on the cases: operations, images a second, the cost of reduced precision."""
    forward = {case: run for case, run in results.items() if (case.kind, case.of) == ("forward", "ours")}
    macs = [f"{run.flops / 2e9:.1f} GMACs at {_size(case)}" for case, run in forward.items() if case.label == "float32"]
    notes = ["- " + ", ".join(macs) + " (forward)."] if macs else []
    rates = [f"{1 / run.median:.3g} in {case.label}" for case, run in forward.items() if case[3:5] == USUAL]
    if rates:
        notes.append(f"- Images of {USUAL[1]}x{USUAL[0]} a second: {', '.join(rates)}.")
    for case, run in results.items():
        if case.kind == "loading":
            rate = f"{run.batch / run.median:.3g} pairs of hazy and clear crops of {CROP}x{CROP} a second"
            notes.append(f"- Loading gives {rate}, of {case.width}x{case.height} once decoded, by {WORKERS} processes.")
    quality = {case.precision: run.psnr for case, run in results.items() if run.psnr is not None}
    return notes + [f"- {kind} against float32 output: {value:.1f} dB PSNR." for kind, value in quality.items()]


def short(results: Results, machine: dict) -> str:
    """Medians and ratios of the forward pass and the steps at 256 pixels, or at the largest size measured."""
    rows = [["", "reference", "float32", "bf16"]]
    references = [case for case in results if case.of == "reference"]
    for kind in ("forward", "step"):
        sides = {case.width for case in references if case.kind == kind}
        side = 256 if 256 in sides else max(sides, default=0)
        for case in (case for case in references if (case.kind, case.width) == (kind, side)):
            compared = [each for each in _compared(case, list(PRECISIONS[:2])) if each in results]
            cells = [f"{results[each].median:.3g} s{_ratio(each, results)}" for each in compared]
            cells += [""] * (3 - len(compared))  # of an interrupted run
            rows.append([f"{KINDS[kind]}, {_size(case)}", *cells])
    return "\n".join([*columns.markdown(rows), "", f"{_machine(machine)}."]) + "\n"


def _machine(machine: dict) -> str:
    return f"{machine['device']}, {machine['threads']} threads, PyTorch {machine['torch']}"


def record(results: Results, machine: dict) -> dict:
    """All measurements, for speed.json."""
    cases = [case._asdict() | run._asdict() | {"median": run.median} for case, run in results.items()]
    return {"machine": machine, "cases": cases}


def load(file: Path) -> tuple[dict, Results]:
    """The machine and the results that `record` wrote. Raises `UserError` for any other file."""
    try:
        content = json.loads(_read(file))
        take = lambda kind, case: kind(**{name: case[name] for name in kind._fields})  # noqa: E731
        return content["machine"], {take(Case, case): take(Run, case) for case in content["cases"]}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file}: not a speed.json of benchmarks.speed; name one written by --output") from None


def _reference(case: Case, results: Results) -> Run | None:
    """The reference's run of the same kind, size and batch; None if it was not measured."""
    same = (case.kind, case.height, case.width, case.batch)
    runs = (run for each, run in results.items() if each.of == "reference" and (each.kind, *each[3:6]) == same)
    return None if case.of == "reference" else next(runs, None)


def _against(case: Case, results: Results) -> str:
    """The ratios of medians and of peak memory to the reference's."""
    reference = _reference(case, results)
    run = results[case]
    if reference is None:
        return ""
    memory = f", memory {run.memory / reference.memory:.0%}" if reference.memory else ""  # known on Unix only
    return f"{reference.median / run.median:.2f}x{memory}"


def _ratio(case: Case, results: Results) -> str:
    reference = _reference(case, results)
    return f" ({reference.median / results[case].median:.1f}x)" if reference else ""


def _size(case: Case, batch: int = 0) -> str:
    batch = batch or case.batch
    return f"{batch} x " * (batch > 1) + f"{case.width}x{case.height}"


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); check the path") from None


if __name__ == "__main__":
    errors.run(main)
