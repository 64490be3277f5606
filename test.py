"""Score a method on hazy pictures with ground truth, or dehaze pictures without.

What an experiment's config.yml names (test.hazy, test.clear):
    python test.py --model nedr --checkpoints checkpoints/test_example
A folder, a .flist or one picture:
    python test.py --checkpoints checkpoints/test_example --hazy photos --output dehazed
The authors' released weights, with the airlight and the filter that suit the pictures:
    python test.py --weights FILE --hazy HAZY --clear CLEAR nedr.airlight=dark_channel nedr.guided_filter=true
A method without weights, on the embedded samples:
    python test.py --model dcp --hazy sample:test/hazy --clear sample:test/clear
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import models
from data import datasets, images
from utils import config, device, errors, report, scoring
from utils.errors import UserError

WEIGHTS = ("weights.safetensors", "last.pt")  # of an experiment's folder, the first that is there
Items = datasets.Paired | datasets.Folder


def main(argv: list[str] | None = None) -> int:
    """The command; ``argv`` as on the command line. Returns 0, or 2 if some pictures could not be used."""
    args = parse(argv)
    if args.list_models:
        print("\n".join(models.names()))
        return 0
    folder, files, overrides = layers(args)
    settings = config.load(args.model or models.names()[0], models.settings_types(), files, overrides)
    place = device.pick(settings.device)
    device.autocast(place, settings.precision)  # refuses here what it would refuse at every picture
    output = Path(settings.test.output or (folder or Path()) / "results").expanduser()
    items = find(settings.test, output / "pictures")
    method, weights = load(args.model, folder, settings.test.weights, files, overrides)
    method.to(place).eval()
    settings.model, settings.method = models.name_of(method), method.settings  # what is now in force

    scores, skipped = score(method, items, settings, place, output / "pictures")
    if scores:
        report.write(output, scores, settings, weights=weights, device=device.describe(place), skipped=skipped)
        print(report.table(settings.model, scores))
    print(f"{len(items) - len(skipped)} pictures done, see {output}")
    if skipped:
        print(f"error: {len(skipped)} of {len(items)} pictures could not be used, as said above", file=sys.stderr)
    return 2 if skipped else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Options, and settings as key=value before, between or after them."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style, allow_abbrev=False)
    parser.add_argument("--model", help="may be left out where the weights tell it")
    parser.add_argument("--checkpoints", metavar="DIR", help="the experiment's folder: its config.yml and weights")
    parser.add_argument("--weights", metavar="FILE", help="in place of DIR's; official files too")
    parser.add_argument("--hazy", metavar="PATH", help="folder, .flist, picture or sample:test/hazy, and then ...")
    parser.add_argument("--clear", metavar="PATH", help="... the ground truth; without it pictures only, no figures")
    parser.add_argument("--output", metavar="DIR", help="where to; by default results/ in the experiment's folder")
    parser.add_argument("--list-models", action="store_true", help="print the models' names and leave")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="any setting of configs.yml")
    return parser.parse_intermixed_args(argv)


def layers(args: argparse.Namespace) -> tuple[Path | None, list[Path], list[str]]:
    """The experiment's folder, its settings file if it has one, and what the command line sets over it."""
    folder = images.resolve(args.checkpoints) if args.checkpoints else None
    if folder and not folder.is_dir():
        raise UserError(f"{folder}: is a file; --checkpoints names an experiment's folder, --weights a file")
    files = [folder / "config.yml"] if folder and (folder / "config.yml").is_file() else []
    options = {key: getattr(args, key) for key in ("weights", "hazy", "clear", "output")}
    quoted = [f"test.{key}={json.dumps(value, ensure_ascii=False)}" for key, value in options.items() if value]
    alone = ["test.clear="] if args.hazy else []  # the ground truth in config.yml is that of other pictures
    return folder, files, [*alone, *args.settings, *quoted]


def find(test: config.Test, results: Path) -> Items:
    """The pictures to dehaze, with their ground truth where it is named. Results never become inputs."""
    if not test.hazy:
        raise UserError("no hazy pictures named; give --hazy PATH, or set test.hazy in the experiment's config.yml")
    if not test.clear and not test.pictures:
        raise UserError("test.pictures=false and no ground truth leave nothing to do; give --clear PATH")
    hazy = images.find(test.hazy)
    if any(path.resolve().is_relative_to(results.resolve()) for path in hazy):
        raise UserError(f"{results} holds earlier results, which are among the hazy pictures; give another --output")
    if test.clear:
        return datasets.Paired(images.pair(test.hazy, test.clear))
    root = images.resolve(test.hazy)
    return datasets.Folder(hazy, root if root.is_dir() else None)


def load(model: str | None, folder: Path | None, named: str | None, files: list, overrides: list) -> tuple:
    """The method, with the test-time settings that ``files`` and ``overrides`` ask for, and the weights' file."""
    types = models.settings_types()
    if model and not models.METHODS[model].stages:
        return models.build(config.load(model, types, files, overrides)), None
    path = Path(named).expanduser() if named else find_weights(folder)
    method = models.load(path)
    name = models.name_of(method)
    if model not in (None, name):
        raise UserError(f"{path} holds a {name} model, not {model}; give --model {name} or other weights")
    fixed = [key for key in config.given(types, overrides=overrides).get(name, {}) if key not in method.test_time]
    if fixed:
        raise UserError(f"{name}.{fixed[0]} was settled by training; only {', '.join(method.test_time)} can change now")
    asked, values = config.given(types, files, overrides).get(name, {}), config.load(name, types, files, overrides)
    models.change(method, {key: getattr(values.method, key) for key in asked if key in method.test_time})
    return method, path


def find_weights(folder: Path | None) -> Path:
    """The best weights of an experiment's folder."""
    if folder is None:
        free = ", ".join(name for name, kind in models.METHODS.items() if not kind.stages)
        raise UserError(f"no weights named; give --checkpoints DIR, --weights FILE, or a --model without any ({free})")
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder}: no {' or '.join(WEIGHTS)}; train it, or give --weights FILE (official ones too)")


def score(method: models.Method, items: Items, settings: config.Settings, place: torch.device, folder: Path) -> tuple:
    """Dehaze all into ``folder``; the figures of those with ground truth, and what was wrong with those skipped."""
    scores, skipped, outputs = [], [], report.picture_names(items.names)

    def dehaze(hazy: torch.Tensor) -> torch.Tensor:
        with device.autocast(place, settings.precision):
            return method.dehaze(hazy)

    def skip(error: UserError) -> None:
        skipped.append(str(error))
        tqdm.write(f"skipped: {error}", file=sys.stderr)

    results = scoring.each(dehaze, items, device=place, on_error=skip)
    for item, dehazed, seconds in tqdm(results, total=len(items), unit="picture", disable=None):
        if settings.test.pictures:
            images.write(folder / outputs[item["name"]], dehazed)
        if "clear" in item:
            scores.append(scoring.compare(item, dehazed, seconds))
    return scores, skipped


if __name__ == "__main__":
    errors.run(main)
