"""How fast NeDR is here, beside the released code and beside what the machine could do.

    python -m benchmarks.speed
    python -m benchmarks.speed --sizes 256 --steps 128 --repeats 3 --output results/speed
    python -m benchmarks.speed --into docs/performance.md README.md

Forward passes, training steps (one unpaired step of all five networks), a large image in tiles and the loading of
images for such steps, each in a process of its own, by this code base in float32 and in reduced precision, and by a
step-by-step copy of the released code (tests/models/nedr_reference.py) with the same networks. Cases of one size are
taken in turn, in two rounds (large batches in one). On a GPU also steps of the largest batch that fits. The table goes
to the screen, and with all figures as speed.json and speed.md to --output; --into writes it between the marks
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
from utils import columns, device, errors
from utils.errors import UserError
from utils.files import write_text

ROUNDS = 2
PRECISIONS = ("float32", "bf16", "fp16")
LARGE = (1536, 2048)  # of a photograph of three megapixels, in tiles
USUAL = (460, 620)  # of the images of RESIDE
FILES = (480, 640)  # of the files from which crops are loaded
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
    place = device.pick(options.device)
    for file in options.into:
        if not MARKS.search(_read(file)):
            raise UserError(f"{file}: holds no '<!-- speed -->' and '<!-- /speed -->' to write between; put them there")
    machine, results = recall(options.again) if options.again else run(place, options)
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
        "--large", action=argparse.BooleanOptionalAction, default=True, help="images of 620x460, and in tiles, too"
    )
    parser.add_argument("--compiled", action="store_true", help="steps by torch.compile too; minutes to begin with")
    parser.add_argument(
        "--repeats", type=int, default=5, help="at most, of each case in each of two rounds; at least 3"
    )
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 0: all")
    parser.add_argument("--output", metavar="DIR", help="folder for speed.md and speed.json")
    parser.add_argument("--again", type=Path, metavar="FILE", help="measure nothing; tables of an earlier speed.json")
    parser.add_argument("--into", type=Path, nargs="+", default=[], metavar="FILE", help="to write the table into")
    options = parser.parse_args(arguments)
    for side in (*options.sizes, *options.steps):
        if side < 128 or side % 32:
            raise UserError(f"{side} pixels: sides are multiples of 32, at least 128, for the reference pads nothing")
    if min(options.batches) < 1:
        raise UserError(f"--batches {min(options.batches)}: a step takes at least one crop")
    return options


def run(place: torch.device, options: argparse.Namespace) -> tuple[dict, Results]:
    """The machine's limits, and what every case took."""
    machine, results, cases = worker(None, place, options), {}, plan(place, options)
    for number, case in enumerate(cases, 1):
        print(f"{number} of {len(cases)}: {KINDS[case.kind]}, {_size(case)}, {case.label}", file=sys.stderr)
        found = Run(**worker(case, place, options))
        before = results.get(case)
        results[case] = found._replace(seconds=before.seconds + found.seconds) if before else found
        if options.output:  # so that what is broken off is not lost
            write_text(Path(options.output) / "speed.json", json.dumps(record(results, machine), indent=2))
    return machine, results


def plan(place: torch.device, options: argparse.Namespace) -> list[Case]:
    """Every case in the order in which it is run: those that are compared next to each other, and twice.

    Large batches once: a step of them is long.
    """
    kinds, cases = _precisions(place), []
    for side in options.sizes:
        cases += _compared(Case("forward", "reference", "float32", side, side), kinds) * ROUNDS
    first, *batches = options.batches
    for side in options.steps:
        group = _compared(Case("step", "reference", "float32", side, side, first), kinds)
        step = group[0]._replace(of="ours")
        group += [step._replace(precision=kind, checkpointing=True) for kind in kinds[:2]]
        group += [step._replace(precision=kind, compiled=True) for kind in kinds[1:] if options.compiled]
        cases += group * ROUNDS
    if options.steps:
        side = max(options.steps)
        for batch in batches:
            cases += _compared(Case("step", "reference", "float32", side, side, batch), kinds)
        if place.type == "cuda":
            cases += [Case("step", "ours", kind, side, side, 0) for kind in kinds]
        cases.append(Case("loading", "ours", "float32", *FILES, max(options.batches)))
    if options.large:
        cases += [Case(kind, "ours", p, *size) for kind, size in (("forward", USUAL), ("tiled", LARGE)) for p in kinds]
    return cases


def _precisions(place: torch.device) -> list[str]:
    return list(PRECISIONS[: 2 if place.type == "cpu" else 3])


def _compared(reference: Case, kinds: list[str]) -> list[Case]:
    return [reference, *(reference._replace(of="ours", precision=kind) for kind in kinds)]


def worker(case: Case | None, place: torch.device, options: argparse.Namespace) -> dict:
    """What `benchmarks.speed_cases` says of a case (None: of the machine). Raises `UserError` where it fails."""
    task = json.dumps([case, str(place), options.repeats, options.threads])
    command = [sys.executable, "-m", "benchmarks.speed_cases", task]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        what = f"{KINDS[case.kind]}, {_size(case)}, {case.label}" if case else "the machine's ceiling"
        raise UserError(f"{what} could not be measured: {last}; leave that size out, or free memory")
    return json.loads(done.stdout.splitlines()[-1])


def markdown(results: Results, machine: dict) -> str:
    """The table, with all that is needed to read it."""
    heads = ["", "size", "", "seconds (median, range)", "against reference", "peak memory", "TFLOP/s", "of the ceiling"]
    rows = [heads]
    for case, run in results.items():
        if case.kind == "loading":
            continue
        speed, limit = run.flops / run.median, machine[case.precision]
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
    return "\n".join([*columns.markdown(rows), "", *notes, *_remarks(results)]) + "\n"


def _remarks(results: Results) -> list[str]:
    """Of the cases: operations, images a second, what reduced precision costs."""
    forward = {case: run for case, run in results.items() if (case.kind, case.of) == ("forward", "ours")}
    macs = [f"{run.flops / 2e9:.1f} GMACs at {_size(case)}" for case, run in forward.items() if case.label == "float32"]
    notes = ["- " + ", ".join(macs) + " (forward)."] if macs else []
    rates = [f"{1 / run.median:.3g} in {case.label}" for case, run in forward.items() if case[3:5] == USUAL]
    if rates:
        notes.append(f"- Images of {USUAL[1]}x{USUAL[0]} a second: {', '.join(rates)}.")
    for case, run in results.items():
        if case.kind == "loading":
            made = f"{run.batch / run.median:.3g} pairs of hazy and clear crops of {CROP}x{CROP} a second"
            notes.append(f"- Loading gives {made}, of {case.width}x{case.height} once decoded, by {WORKERS} processes.")
    quality = {case.precision: run.psnr for case, run in results.items() if run.psnr is not None}
    return notes + [f"- {kind} against float32 output: {value:.1f} dB PSNR." for kind, value in quality.items()]


def short(results: Results, machine: dict) -> str:
    """Medians and ratios of the forward pass and the steps at 256 pixels, or at the largest size that there is."""
    rows = [["", "reference", "float32", "bf16"]]
    asked = [case for case in results if case.of == "reference"]
    for kind in ("forward", "step"):
        sides = {case.width for case in asked if case.kind == kind}
        side = 256 if 256 in sides else max(sides, default=0)
        for case in (case for case in asked if (case.kind, case.width) == (kind, side)):
            found = [each for each in _compared(case, list(PRECISIONS[:2])) if each in results]
            cells = [f"{results[each].median:.3g} s{_ratio(each, results)}" for each in found]
            cells += [""] * (3 - len(found))  # of a run that was broken off
            rows.append([f"{KINDS[kind]}, {_size(case)}", *cells])
    return "\n".join([*columns.markdown(rows), "", f"{_machine(machine)}."]) + "\n"


def _machine(machine: dict) -> str:
    return f"{machine['device']}, {machine['threads']} threads, PyTorch {machine['torch']}"


def record(results: Results, machine: dict) -> dict:
    """Everything that was measured, for speed.json."""
    cases = [case._asdict() | run._asdict() | {"median": run.median} for case, run in results.items()]
    return {"machine": machine, "cases": cases}


def recall(file: Path) -> tuple[dict, Results]:
    """What `record` wrote. Raises `UserError` for another file."""
    try:
        told = json.loads(_read(file))
        take = lambda kind, case: kind(**{name: case[name] for name in kind._fields})  # noqa: E731
        return told["machine"], {take(Case, case): take(Run, case) for case in told["cases"]}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file}: is no speed.json of benchmarks.speed; name one that --output wrote") from None


def _reference(case: Case, results: Results) -> Run | None:
    """What the reference took for the same; None where it was not asked."""
    same = (case.kind, case.height, case.width, case.batch)
    found = (run for each, run in results.items() if each.of == "reference" and (each.kind, *each[3:6]) == same)
    return None if case.of == "reference" else next(found, None)


def _against(case: Case, results: Results) -> str:
    """Ratio of medians, and of peak memory."""
    reference, run = _reference(case, results), results[case]
    if reference is None:
        return ""
    memory = f", memory {run.memory / reference.memory:.0%}" if reference.memory else ""  # no system but Unix tells it
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
