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
An interrupted run, given the same command again, goes on where it stopped.
torchrun --nproc_per_node N test.py ... shares the images out among N processes, on several machines too.

Exit status: 0, all was done; 2, an error that one line tells, or some images could not be used; 130, interrupted.
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
from utils.evaluation.runner import Candidate, Evaluation, Pictures
from utils.files import home

RESULTS = ("pictures", "panels")  # sub-folders of the output
FORM = ("format", "quality", "suffix", "strength", "show")  # of the images
TRAINING = ("data", "haze", "degradations", "train", "warm_start", "log")  # sections of configs.yml


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
    """All but what leaves at once. Each of several processes does its share, and the first one tells of all."""
    memory.keep_memory()
    folder, files, overrides = layers(args)
    types = models.settings_types()
    settings = config.load((args.model or models.names())[0], types, files, overrides, used=types)
    check_read(args.settings)
    place = ranks.pick(settings.device)
    device.autocast(place, settings.precision)  # refuses here what it would refuse at every image
    device.prepare(place, settings.precision)
    output = home(settings.test.output or (folder or Path()) / "results")
    say = partial(tqdm.write, file=sys.stderr) if ranks.first else lambda line: None
    for remark in device.remarks(place, settings.precision):
        say(f"warning: {remark}")
    run = Evaluation(settings, place, output, images.write, say, ranks)
    if named := [paths.resolve(each) for each in settings.test.hazy if video.is_clip(each)]:
        others = [Path(each) for each in settings.test.hazy if not video.is_clip(each)]
        clips.check([*named, *others], settings.test)
        tested = candidates.prepare(args.model or [], folder, settings.test, files, overrides, run.say)
        return ranks.all_max(clips.run(named[ranks.rank :: ranks.world], tested, settings, place, output))[0]
    sets = find(settings.test, output)
    tested = candidates.prepare(args.model or [], folder, settings.test, files, overrides, run.say)
    return score(run, sets, tested)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Options, and settings as key=value before, between or after them."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style, allow_abbrev=False)
    several = partial(parser.add_argument, nargs="+", metavar="NAME")
    several("--model", help="may be left out where the weights tell it; methods without weights may stand beside")
    parser.add_argument("--checkpoints", metavar="DIR", help="the experiment's folder: its config.yml and weights")
    several("--weights", help="files in place of DIR's, of any methods, to be scored side by side; official ones too")
    several("--benchmarks", help="sets by name; O-HAZE:test is a split, SOTS and HSTS are groups")
    parser.add_argument("--data-root", metavar="DIR", help="where the benchmarks are")
    paths = partial(parser.add_argument, nargs="+", metavar="PATH")
    paths("--hazy", help="folders, .flists, images or sample:test/hazy, and then ...")
    paths("--clear", help="... the ground truth; without it images only, no figures")
    several("--protocols", help="how PSNR and SSIM are taken: ours (default), d4, dehazeformer, ffa, ...")
    several("--metrics", help="beside PSNR and SSIM: ciede2000, lpips, fade, niqe, brisque, musiq")
    parser.add_argument("--output", metavar="DIR", help="where to; by default results/ in the experiment's folder")
    one = partial(parser.add_argument, metavar="VALUE")
    one(
        "--format",
        help="png, jpg or webp; by default that of the input, and PNG where figures are taken",
    )
    one("--quality", help="of JPEG and WebP, 1 to 100 (95)")
    one("--suffix", help="put at the end of the pictures' names, as _dehazed")
    one("--strength", help="how much of the haze is taken away: 0 none, 1 what is found (default), up to 4 more")
    one("--show", help="what is in the images: dehazed, side_by_side (hazy, dehazed) or transmission")
    parser.add_argument("--overwrite", action="store_true", help="make images anew that are there already")
    several("--compare", metavar="RUN", help="put the results of finished runs side by side, and leave")
    parser.add_argument("--list-models", action="store_true", help="print size and paper of every model and leave")
    parser.add_argument("--list-benchmarks", action="store_true", help="print what is known of every set and leave")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="any setting of configs.yml")
    args = parser.parse_intermixed_args(argv)
    # These take settings for values too, if no file has such a name.
    for option in ("model", "weights", "benchmarks", "hazy", "clear", "protocols", "metrics", "compare"):
        values = getattr(args, option)
        if values:
            args.settings += [v for v in values if re.match(r"[a-z_0-9.]+=", v) and not os.path.exists(v)]
            setattr(args, option, [value for value in values if value not in args.settings])
    for option in ("hazy", "clear"):
        for value in (getattr(args, option) or [])[1:]:
            if not value.startswith("sample:") and not os.path.lexists(os.path.expanduser(value)):
                raise UserError(f"--{option} {quoted(value)}: neither a path that is there nor key=value; check it")
    return args


def check_read(given: list[str]) -> None:
    """Refuse key=value of a section that test.py does not read: it would do nothing. Raises `UserError`."""
    known = {field.name for field in dataclasses.fields(config.Test)}
    for text in given:
        key = text.partition("=")[0].strip()
        part, _, rest = key.partition(".")
        if part in TRAINING and key != "data.workers":
            own = {"root": "data_root", "pairs": "benchmarks"}.get(rest, rest.removeprefix("validation_"))
            remedy = f"write test.{own}" if own in known else "take it out"
            raise UserError(f"'{quoted(text)}': {part} is for training, and test.py does not use {key}; {remedy}")


def layers(args: argparse.Namespace) -> tuple[Path | None, list[Path], list[Override]]:
    """The experiment's folder, its settings file if it has one, and what the command line sets over it."""
    folder = paths.resolve(args.checkpoints) if args.checkpoints else None
    if folder and not folder.is_dir():
        raise UserError(f"{folder}: is a file; --checkpoints names an experiment's folder, --weights a file")
    files = [folder / "config.yml"] if folder and (folder / "config.yml").is_file() else []
    names = ("weights", "benchmarks", "data_root", "hazy", "clear", "protocols", "metrics", "output")
    given = [(f"test.{name}", getattr(args, name)) for name in names if getattr(args, name)]
    given += [f"test.{name}={getattr(args, name)}" for name in FORM if getattr(args, name) is not None]
    given += ["test.overwrite=true"] if args.overwrite else []
    others = ["test.clear=", "test.benchmarks=[]"] if args.hazy else ["test.hazy="] if args.benchmarks else []
    return folder, files, [*others, *args.settings, *given]  # what config.yml names beside is of other images


def find(test: config.Test, output: Path) -> list[Pictures]:
    """The sets to score, or the images to dehaze. Results never become inputs."""
    if test.benchmarks and test.hazy:
        raise UserError("benchmarks and hazy images are two things to score; give one of them")
    if test.benchmarks:
        return [found.pictures() for found in locate.find(test.benchmarks, test.data_root)]
    if not test.hazy:
        raise UserError("nothing to dehaze; give --benchmarks NAME, or --hazy PATH, or set test.hazy in config.yml")
    if not test.clear and not test.pictures and not test.metrics:
        raise UserError("test.pictures=false and no ground truth leave nothing to do; give --clear PATH")
    absent = None if test.clear else list[str]()  # pairs are all wanted, or lines would pair wrongly
    named = paths.find(test.hazy, absent=absent)
    hazy = list(dict.fromkeys(named))
    results = [os.path.realpath(output / part) for part in RESULTS]
    if any(Path(os.path.realpath(path)).is_relative_to(folder) for path in hazy for folder in results):
        raise UserError(f"{output} holds earlier results, which are among the hazy images; give another --output")
    remarks = [f"{tables.pictures(len(named) - len(hazy))} named twice, taken once"] if len(hazy) < len(named) else []
    remarks += dict.fromkeys([*paths.passed_over(test.hazy), *paths.passed_over(test.clear or [])])
    root = paths.folder_of(test.hazy)
    if not test.clear:
        return [Pictures("pictures", Folder(hazy, root), truth=False, remarks=remarks, absent=absent)]
    pairs, told = pairing.pairs(test.hazy, test.clear)
    items = Paired(list(dict.fromkeys(pairs)), root)
    return [Pictures("pictures", items, truth=True, remarks=[*remarks, *told, *doubts(items)])]


def score(run: Evaluation, sets: list[Pictures], tested: list[candidates.Tested]) -> int:
    """Every method on every set, beneath the hazy input; the report; the exit status."""
    facts = {each.name: each.facts() for each in tested}
    run.begin(sets, facts)
    if run.ranks.first:
        paths.mark_results(run.output, RESULTS)
    for pictures in sets:
        measured = run.measures(pictures)
        for remark in pictures.remarks:
            run.say(f"{pictures.name}: {remark}")
        if measured:
            run.row(pictures, Candidate(HAZY, lambda hazy: hazy))
        for each in tested:
            folder = each.folder if len(tested) > 1 else ""
            if guess := each.guess(pictures):
                run.say(f"warning: {pictures.name}: {guess}")
            run.row(pictures, each.candidate(run.settings, run.device, pictures, folder))

    def methods() -> dict[str, dict]:
        return {each.name: facts[each.name] | each.cost(run.device) for each in tested}

    found = run.finish(methods, device.describe(run.device))
    if not run.ranks.first:
        return 2 if run.unusable else 0
    if found:
        print(tables.text(run.rows, found))
    done = sum(len(row.outcome.scores) for row in run.rows if row.method != HAZY)
    left = f"; {tables.pictures(run.kept)} there already and left so (--overwrite makes them anew)" if run.kept else ""
    print(f"{tables.pictures(done)} done{tables.pace(run.rows)}{left}; see {quoted(run.output)}")
    if run.unusable:
        listed = quoted(run.output / report.SKIPPED)
        print(
            f"error: {tables.pictures(run.unusable)} could not be used, as said above and in {listed}", file=sys.stderr
        )
    return 2 if run.unusable else 0


def compare(runs: list[str], output: str | None) -> int:
    """Print the comparison; with ``output`` write it there too."""
    compared = comparison.compare(runs)
    print(compared.text())
    if output:
        comparison.write(compared, home(output))
        print(f"see {quoted(output)}")
    return 0


if __name__ == "__main__":
    errors.run(main)
