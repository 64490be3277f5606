"""Ablation of NeDR's modules: the same training with and without KAN-CID, IDRM and DREM, scored side by side.

    python -m benchmarks.ablation --checkpoints checkpoints/ablation
    python -m benchmarks.ablation --cases d4 drem nedr data.hazy=ITS/hazy data.clear=ITS/clear train.steps=100_000

The folder's config.yml holds the settings that all cases share: data, budget, and the test images (test.hazy and
test.clear, or test.benchmarks). Each case trains in its own sub-folder and is scored there; ablation.md and
ablation.json hold the table. The same command resumes an interrupted run and repeats nothing that is done.
"""

import argparse
import contextlib
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

import models
import test
import train
from benchmarks import ablation_table
from data.sets import locate, pairing
from utils import config, errors, files
from utils.errors import UserError, nearest, quoted
from utils.evaluation import comparison
from utils.files import write_text

MODULES = ("kan_cid", "idrm", "drem")
CASES = {
    "d4": (),
    **{"+".join(some): some for size in (1, 2) for some in itertools.combinations(MODULES, size)},
    "nedr": MODULES,
}
FREE = ("device", "data.workers", "log.", "test.")  # settings that may change while an ablation goes on


class Case(NamedTuple):
    """One row of the table: its folder, the content of its config.yml, and all settings in force."""

    name: str
    folder: Path
    given: dict[str, Any]
    settings: config.Settings


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns 0, 2 if a case or an image is missing from the table, or the status of a stopped run."""
    options = parse(arguments)
    folder = Path(options.checkpoints)
    cases = [plan(folder, name, options.settings) for name in options.cases]
    check(cases)
    finished: list[Case] = []
    failed: dict[str, str] = {}
    for number, case in enumerate(cases, 1):
        print(f"case {number} of {len(cases)}: {case.name}", file=sys.stderr)
        try:
            if stopped := fit(case):
                return stopped
            score(case)
        except UserError as error:
            print(f"error: {case.name}: {error}", file=sys.stderr)
            failed[case.name] = str(error)
        else:
            finished.append(case)
        if len(finished) > 1:
            table = tabulate(finished, failed)
            ablation_table.write(table, folder)
    if len(finished) < 2:
        raise UserError(f"too few cases were finished to compare them; {'; '.join(map(': '.join, failed.items()))}")
    print(ablation_table.text(table))
    print(f"\nsee {folder / 'ablation.md'} and {folder / 'ablation.json'}")
    return 2 if failed or table["unusable"] else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Options; ``cases`` in the order of `CASES`."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.ablation", description=__doc__, formatter_class=style)
    parser.add_argument("--checkpoints", default="checkpoints/ablation", help="the folder of the shared config.yml")
    parser.add_argument("--cases", nargs="+", metavar="CASE", default=[], help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings over those of config.yml")
    options = parser.parse_intermixed_args(arguments)
    options.settings += [text for text in options.cases if "=" in text]
    named = [text for text in options.cases if "=" not in text] or list(CASES)
    for name in named:
        if name not in CASES:
            raise UserError(f"unknown case '{quoted(name)}'{nearest(name, CASES)}")
    options.cases = [name for name in CASES if name in named]
    if len(options.cases) < 2:
        raise UserError(f"--cases {named[0]}: an ablation compares at least two cases; name another")
    return options


def plan(folder: Path, name: str, overrides: Sequence[str]) -> Case:
    """The case ``name``: config.yml and ``overrides``, with its modules switched on or off. Raises `UserError`."""
    types = models.settings_types()
    given = config.given(types, [folder / "config.yml"], overrides)
    config.check_used(["nedr"], types, overrides)
    method = given.setdefault("nedr", {})
    scoring = given.setdefault("test", {})
    reserved = [f"nedr.{key}" for key in MODULES if key in method]
    reserved += [f"test.{key}" for key in ("weights", "output") if scoring.get(key)]
    if reserved:
        raise UserError(f"{reserved[0]} is set for each case by the ablation; remove it (--cases chooses the modules)")
    method |= {module: module in CASES[name] for module in MODULES}
    scoring["output"] = str(folder / name / "results")
    return Case(name, folder / name, given, config.load("nedr", types, saved=given))


def check(cases: Sequence[Case]) -> None:
    """Raise `UserError`, before anything is trained, for settings that would fail or mix budgets later."""
    scoring = cases[0].settings.test
    if scoring.benchmarks:
        sets = locate.find(scoring.benchmarks, scoring.data_root)
        if not any(each.pictures().truth for each in sets):
            raise UserError("none of test.benchmarks has ground truth, which PSNR and SSIM need; name another")
    elif scoring.hazy and scoring.clear:
        pairing.pairs(scoring.hazy, scoring.clear)
    else:
        raise UserError("nothing to score the cases on; set test.benchmarks, or test.hazy and test.clear")
    for case in cases:
        models.check_training(case.settings)
        if (case.folder / "last.pt").exists():
            _check_unchanged(case)


def _check_unchanged(case: Case) -> None:
    """Refuse a case that was begun with other settings, since its row could not be compared with the others."""
    before = _flat(config.read_yaml(case.folder / "settings.yml"))
    for key, value in shared(case).items():
        if before.get(key, value) != value:
            raise UserError(
                f"{case.folder} was begun with {key}={before[key]}, not {value}, and all cases of a table share one "
                f"budget; give another --checkpoints, or remove the folders of the cases to begin anew"
            )


def shared(case: Case) -> dict[str, Any]:
    """The settings that all cases share, and the modules of this case, by dotted name."""
    return {key: value for key, value in _flat(config.to_dict(case.settings)).items() if not key.startswith(FREE)}


def fit(case: Case) -> int:
    """Train a case, or the rest of it. Returns 0, or the status of a training that a signal ended."""
    write_text(case.folder / "config.yml", yaml.safe_dump(case.given, sort_keys=False, allow_unicode=True))
    return train.main(["--model", "nedr", "--checkpoints", str(case.folder), "--resume"])


def score(case: Case) -> None:
    """Score a case unless these weights were scored with these settings already."""
    if not _scored(case):
        with contextlib.redirect_stdout(sys.stderr):  # only the final table goes to stdout
            test.main(["--model", "nedr", "--checkpoints", str(case.folder)])


def _scored(case: Case) -> bool:
    try:
        results = comparison.load(case.folder).data
    except UserError:
        return False
    recorded = results["methods"].get("nedr", {})
    settings = config.to_dict(case.settings)
    weights = case.folder / str(recorded.get("weights"))
    if not weights.is_file() or recorded["sha256"] != files.sha256(weights):
        return False
    return results["settings"] == {key: settings[key] for key in ("precision", "test")}


def tabulate(finished: Sequence[Case], failed: dict[str, str]) -> dict[str, Any]:
    """The content of ablation.json."""
    settings = shared(finished[0])
    common = {key: value for key, value in settings.items() if key.removeprefix("nedr.") not in MODULES}
    modules = {case.name: CASES[case.name] for case in finished}
    return ablation_table.build({case.name: case.folder for case in finished}, modules, common, failed)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"train": {"steps": 2}}`` -> ``{"train.steps": 2}``."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


if __name__ == "__main__":
    errors.run(main)
