"""Score methods on benchmarks or on your own pairs, dehaze images without ground truth, compare finished runs.

Benchmarks by name (--list-benchmarks), with the dark channel prior beside the model, under two protocols:
    python test.py --model nedr dcp --checkpoints DIR --data-root datasets --benchmarks SOTS HSTS --protocols ours d4
What an experiment's config.yml names (test.hazy, test.clear, test.benchmarks):
    python test.py --model nedr --checkpoints checkpoints/test_example
Several trained methods side by side:
    python test.py --weights a/weights.safetensors b/weights.safetensors --benchmarks SOTS --output results
Folders, .flists or images, by the weights that ship with this project or by your own (--checkpoints, --weights):
    python test.py --hazy photos --output dehazed
    python test.py --hazy photos/*.jpg --output dehazed
A clip, or a folder of frames, steady over time:
    python test.py --hazy clip.mp4 --output dehazed
    python test.py --hazy frames --output dehazed test.temporal=true
A method without weights, on the embedded samples:
    python test.py --model dcp --hazy sample:test/hazy --clear sample:test/clear
Finished runs side by side:
    python test.py --compare checkpoints/a checkpoints/b
The same command continues an interrupted run where it stopped.
torchrun --nproc_per_node N test.py ... distributes the images over N processes, on several machines too.

Exit status: 0, all done; 2, an error (one line on stderr), or some images could not be used; 130, interrupted.
"""

import argparse
import dataclasses
import os
import re
import sys
from functools import partial
from pathlib import Path

from tqdm import tqdm

import models
from data import images, paths, video
from data.pictures import Folder, Paired, doubts
from data.sets import locate, pairing, table
from models import candidates, clips
from utils import config, device, distributed, errors, memory
from utils.config import Override
from utils.errors import UserError, quoted
from utils.evaluation import comparison, report, tables
from utils.evaluation.results import HAZY
from utils.evaluation.runner import Candidate, Evaluation, ImageSet
from utils.files import clear_temporaries, expand_home

RESULTS = ("pictures", "panels")  # sub-folders of the output
OUTPUT_OPTIONS = ("format", "quality", "suffix", "strength", "show")
TRAINING = ("data", "haze", "degradations", "train", "warm_start", "log", "compile")  # of configs.yml


def main(argv: list[str] | None = None) -> int:
    """The command; ``argv`` as on the command line. Returns 0, or 2 if some images could not be used."""
    args = parse(argv)
    if args.list_models or args.list_benchmarks:
        print(table.listing() if args.list_benchmarks else models.listing())
        return 0
    if args.compare:
        return compare(args.compare, args.output)
    with distributed.group() as ranks:
        return evaluate(args, ranks)


def evaluate(args: argparse.Namespace, ranks: distributed.Ranks) -> int:
    """Score or dehaze as the options say; each of several processes does its share, and the first one reports."""
    memory.keep_memory()
    folder, files, overrides = layers(args)
    types = models.settings_types()
    settings = config.load((args.model or models.names())[0], types, files, overrides, used=types)
    check_read(args.settings)
    torch_device = ranks.pick(settings.device)
    device.autocast(torch_device, settings.precision)  # raises here rather than at every image
    device.prepare(torch_device, settings.precision, settings.deterministic)
    output = expand_home(settings.test.output or (folder or Path()) / "results")
    say = partial(tqdm.write, file=sys.stderr) if ranks.first else lambda line: None
    for warning in device.warnings(torch_device, settings.precision, settings.deterministic):
        say(f"warning: {warning}")
    run = Evaluation(settings, torch_device, output, images.write, say, ranks)
    clip_paths = [paths.resolve(each) for each in settings.test.hazy if video.is_clip(each)]
    if clip_paths:
        others = [Path(each) for each in settings.test.hazy if not video.is_clip(each)]
        clips.check([*clip_paths, *others], settings.test)
    sets = [] if clip_paths else find(settings.test, output)
    tested = candidates.prepare(args.model or [], folder, settings.test, files, overrides, run.say)
    if ranks.first:
        clear_temporaries(output, (*RESULTS, clips.FOLDER))
    ranks.all_gather(None)  # before any process writes a file
    with device.deterministic_errors(torch_device):
        if not clip_paths:
            return score(run, sets, tested)
        status = clips.run(clip_paths[ranks.rank :: ranks.world], tested, settings, torch_device, output)
        return ranks.all_max(status)[0]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Options, and settings as key=value before, between or after them."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style, allow_abbrev=False)
    several = partial(parser.add_argument, nargs="+", metavar="NAME")
    several("--model", help="may be left out where the weights name it; methods without weights can be added")
    parser.add_argument("--checkpoints", metavar="DIR", help="the experiment's folder: its config.yml and weights")
    several("--weights", help="files instead of DIR's, of any methods, scored side by side; official ones too")
    several("--benchmarks", help="sets by name; O-HAZE:test is a split, SOTS and HSTS are groups")
    parser.add_argument("--data-root", metavar="DIR", help="the folder of the benchmarks")
    paths = partial(parser.add_argument, nargs="+", metavar="PATH")
    paths("--hazy", help="folders, .flists, images or sample:test/hazy, and then ...")
    paths("--clear", help="... the ground truth; without it images only, no figures")
    several("--protocols", help="how PSNR and SSIM are computed: ours (default), d4, dehazeformer, ffa, ...")
    several("--metrics", help="beside PSNR and SSIM: ciede2000, lpips, fade, niqe, brisque, musiq")
    parser.add_argument("--output", metavar="DIR", help="the output folder; by default results/ in the experiment's")
    one = partial(parser.add_argument, metavar="VALUE")
    one("--format", help="png, jpg or webp; by default that of the input, and PNG where metrics are computed")
    one("--quality", help="of JPEG and WebP, 1 to 100 (95)")
    one("--suffix", help="appended to the names of the images, such as _dehazed")
    one("--strength", help="how much haze is removed: 0 none, 1 as estimated (default), up to 4 more")
    one("--show", help="what the output shows: dehazed, side_by_side (hazy, dehazed) or transmission")
    parser.add_argument("--overwrite", action="store_true", help="make images again that exist already")
    several("--compare", metavar="RUN", help="print the results of finished runs side by side and exit")
    parser.add_argument("--list-models", action="store_true", help="print size and paper of every model and exit")
    parser.add_argument("--list-benchmarks", action="store_true", help="print the facts about every set and exit")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="any setting of configs.yml")
    args = parser.parse_intermixed_args(argv)
    # Options with several values also receive the key=value that follow them: those are settings, unless files.
    for option in ("model", "weights", "benchmarks", "hazy", "clear", "protocols", "metrics", "compare"):
        values = getattr(args, option)
        if values:
            args.settings += [v for v in values if re.match(r"[a-z_0-9.]+=", v) and not os.path.exists(v)]
            setattr(args, option, [value for value in values if value not in args.settings])
    for option in ("hazy", "clear"):
        for value in (getattr(args, option) or [])[1:]:
            if not value.startswith("sample:") and not os.path.lexists(os.path.expanduser(value)):
                raise UserError(f"--{option} {quoted(value)}: neither an existing path nor key=value; check it")
    return args


def check_read(given: list[str]) -> None:
    """Refuse key=value of a section that test.py does not read, since it would have no effect. Raises `UserError`."""
    known = {field.name for field in dataclasses.fields(config.Test)}
    for text in given:
        key = text.partition("=")[0].strip()
        section, _, rest = key.partition(".")
        if section in TRAINING and key != "data.workers":
            counterpart = {"root": "data_root", "pairs": "benchmarks"}.get(rest, rest.removeprefix("validation_"))
            remedy = f"write test.{counterpart}" if counterpart in known else "remove it"
            raise UserError(f"'{quoted(text)}': {section} is for training, and test.py does not use {key}; {remedy}")


def layers(args: argparse.Namespace) -> tuple[Path | None, list[Path], list[Override]]:
    """The experiment's folder, its settings file if it has one, and the overrides from the command line."""
    folder = paths.resolve(args.checkpoints) if args.checkpoints else None
    if folder and not folder.is_dir():
        raise UserError(f"{folder}: is a file; --checkpoints names an experiment's folder, --weights a file")
    files = [folder / "config.yml"] if folder and (folder / "config.yml").is_file() else []
    names = ("weights", "benchmarks", "data_root", "hazy", "clear", "protocols", "metrics", "output")
    options = [(f"test.{name}", getattr(args, name)) for name in names if getattr(args, name)]
    options += [f"test.{name}={getattr(args, name)}" for name in OUTPUT_OPTIONS if getattr(args, name) is not None]
    options += ["test.overwrite=true"] if args.overwrite else []
    # --hazy and --benchmarks replace all images that config.yml names.
    cleared = ["test.clear=", "test.benchmarks=[]"] if args.hazy else ["test.hazy="] if args.benchmarks else []
    return folder, files, [*cleared, *args.settings, *options]


def find(test: config.Test, output: Path) -> list[ImageSet]:
    """The sets to score, or the images to dehaze. Earlier results are refused as inputs."""
    if test.benchmarks and test.hazy:
        raise UserError("both benchmarks and hazy images are given; give one of them")
    if test.benchmarks:
        return [located.pictures() for located in locate.find(test.benchmarks, test.data_root)]
    if not test.hazy:
        raise UserError("nothing to dehaze; give --benchmarks NAME, or --hazy PATH, or set test.hazy in config.yml")
    if not test.clear and not test.pictures and not test.metrics:
        raise UserError("test.pictures=false and no ground truth leave nothing to do; give --clear PATH")
    absent = None if test.clear else list[str]()  # an absent image of a pair is an error: lines would pair wrongly
    listed = paths.find(test.hazy, absent=absent)
    hazy = list(dict.fromkeys(listed))
    if (output.suffix.lower() in paths.EXTENSIONS or video.is_clip(output)) and not output.is_dir():
        raise UserError(f"--output {quoted(output)}: is the name of a file, and images go into a folder; name one")
    results = [os.path.realpath(output / part) for part in RESULTS]
    if any(Path(os.path.realpath(path)).is_relative_to(folder) for path in hazy for folder in results):
        raise UserError(f"{output} holds earlier results, which are among the hazy images; give another --output")
    twice = len(listed) - len(hazy)
    remarks = [f"{tables.image_count(twice)} named twice, taken once"] if twice else []
    remarks += dict.fromkeys([*paths.passed_over(test.hazy), *paths.passed_over(test.clear or [])])
    root = paths.folder_of(test.hazy)
    if not test.clear:
        return [ImageSet("pictures", Folder(hazy, root), truth=False, remarks=remarks, absent=absent)]
    pairs, pairing_remarks = pairing.pairs(test.hazy, test.clear)
    items = Paired(list(dict.fromkeys(pairs)), root)
    return [ImageSet("pictures", items, truth=True, remarks=[*remarks, *pairing_remarks, *doubts(items)])]


def score(run: Evaluation, sets: list[ImageSet], tested: list[candidates.Tested]) -> int:
    """Evaluate the hazy input and every method on every set, and write the report; returns the exit status."""
    facts = {each.name: each.facts() for each in tested}
    run.begin(sets, facts)
    if run.ranks.first:
        paths.mark_results(run.output, RESULTS)
    for image_set in sets:
        measured = run.measures(image_set)
        for remark in image_set.remarks:
            run.say(f"{image_set.name}: {remark}")
        if measured:
            run.evaluate(image_set, Candidate(HAZY, lambda hazy: hazy))
        for each in tested:
            folder = each.folder if len(tested) > 1 else ""
            if warning := each.guess(image_set):
                run.say(f"warning: {image_set.name}: {warning}")
            run.evaluate(image_set, each.candidate(run.settings, run.device, image_set, folder))

    def methods() -> dict[str, dict]:
        return {each.name: facts[each.name] | each.cost(run.device) for each in tested}

    results = run.finish(methods, device.describe(run.device))
    if not run.ranks.first:
        return 2 if run.unusable else 0
    if results:
        print(tables.text(run.rows, results))
    done = sum(len(row.outcome.scores) for row in run.rows if row.method != HAZY)
    existing = ""
    if run.existing:
        existing = f"; {tables.image_count(run.existing)} existed already, perhaps made with other settings "
        existing += "(--overwrite makes them again)"
    print(f"{tables.image_count(done)} done{tables.pace(run.rows)}{existing}; see {quoted(run.output)}")
    if run.unusable:
        listed = quoted(run.output / report.SKIPPED)
        count = tables.image_count(run.unusable)
        print(f"error: {count} could not be used; they are listed above and in {listed}", file=sys.stderr)
    return 2 if run.unusable else 0


def compare(runs: list[str], output: str | None) -> int:
    """Print the comparison; with ``output`` write it there too."""
    compared = comparison.compare(runs)
    print(compared.text())
    if output:
        comparison.write(compared, expand_home(output))
        print(f"see {quoted(output)}")
    return 0


if __name__ == "__main__":
    errors.run(main)
