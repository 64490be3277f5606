"""Find sets on disk by the layouts of their table, pair their images and check that all is there."""

import contextlib
import functools
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from data import images, paths
from data.pictures import Folder, Paired, doubts
from data.sets import pairing
from data.sets.table import BENCHMARKS, GROUPS, GT, HAZY, ORDER, RULES, TRUTH, WHOLE, Benchmark, unroll
from utils.errors import UserError, nearest, quoted
from utils.evaluation.runner import ImageSet

LEVELS = 5  # of folders below the data root that are looked through
RUNS = 10  # of missing numbers that are named
OTHER = r"(?![^/]*(?:train|val|dehaz|result|output))[a-z][^/]*"  # what * stands for
LOOKED_AT = 1000  # of the pairs to train on: in so many headers, evenly spread, sizes are compared beforehand
SKIPPED = re.compile(r"train(ing)?|val(id|idation)?", re.IGNORECASE)  # folders that hold nothing to be scored
BRACES = re.compile("{([^,}]*),([^,}]*)}")  # of a layout
PART = re.compile(r"part[-_ ]?[0-9]+", re.IGNORECASE)  # sub-folders in which a set's images may lie (OTS)
MANY = 1000  # a folder that shows so many images holds images, and is not listed to its end
ORIENTATION, QUARTER_TURNS = 0x0112, (5, 6, 7, 8)  # of EXIF


@dataclass(frozen=True)
class Found:
    """A set on disk: ``pairs`` of hazy image and ground truth (or None), 2 before 10.

    ``folder`` holds the hazy images; ``remarks`` say what is missing or odd, one line each.
    """

    benchmark: Benchmark
    split: str
    folder: Path
    pairs: list[tuple[Path, Path | None]]
    remarks: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.benchmark.name if self.split == "all" else f"{self.benchmark.name}:{self.split}"

    @property
    def expected(self) -> int | None:
        """How many hazy images the whole split has; None where there is no agreed number."""
        numbers = unroll(self.benchmark.splits[self.split])
        return len(numbers) * self.benchmark.each or self.benchmark.hazy or None

    def items(self) -> Paired | Folder:
        """The images themselves, to score on or, without ground truth, to dehaze."""
        if self.benchmark.truth == "none":
            return Folder([hazy for hazy, _ in self.pairs], self.folder)
        return Paired(self.pairs, self.folder, self.benchmark.border)

    def pictures(self) -> ImageSet:
        """The set as `utils.evaluation` scores it, with the released methods' settings for it."""
        about, items = self.benchmark, self.items()
        truth, preset = about.truth != "none", {"airlight": about.airlight, "guided_filter": about.guided_filter}
        remarks = [*self.remarks, *(doubts(items) if truth and about.degradation == "haze" else [])]
        if about.to_train_on(self.split):
            remarks.append("images to train on: figures on them say little about others")
        return ImageSet(self.name, items, truth, self.expected, remarks, preset, self.name.replace(":", "-"))


def find(names: Sequence[str], root: str | Path) -> list[Found]:
    """Find sets ("o_haze"), splits ("O-HAZE:test") and groups ("SOTS") under ``root``, `LEVELS` deep, or at it.

    One set alone is also taken from a root that holds just its images, whatever the root's name. Of a group, sets
    that are absent are left out with a remark. Raises `UserError` for an unknown name, a set that is not there, a hazy
    image without its one ground truth, and sizes that do not agree. Reads headers only.
    """
    wanted, top = _wanted(names), paths.resolve(root)
    if not top.is_dir():
        raise UserError(f"{top}: a file, not a data root; name the folder that holds the sets")
    places = _look(list(wanted), top)
    absent = [key for key, found in places.items() if not found or not found[0].whole]
    present = {group for key, group in wanted.items() if key not in absent and group}
    missing = [key for key, group in wanted.items() if key in absent and group not in present]
    if missing:
        raise UserError(_missing({key[0]: places[key] for key in missing}, top))
    found, first = [], {}
    for (name, split), group in wanted.items():
        if (name, split) not in absent:
            found.append(_gather(BENCHMARKS[name], split, places[name, split]))
            first.setdefault(group, found[-1])
    for group, head in first.items():
        gone = dict.fromkeys(key[0] for key, by in wanted.items() if by == group and key in absent)
        if gone:
            head.remarks.append(f"of {group}, not under {top} and left out: {', '.join(gone)}")
    return found


def pairs(names: Sequence[str], root: str | Path) -> tuple[list[tuple[Path, Path]], list[str]]:
    """All pairs of the sets that `find` finds, each once, and what is missing or odd. Raises `UserError` as it does."""
    found = find(names, root)
    for each in found:
        if each.benchmark.truth != "aligned":
            lack = {"none": "no", "unaligned": "no aligned"}[each.benchmark.truth]
            raise UserError(f"{each.name} has {lack} ground truth to train or validate on; name another set")
    remarks = [f"{each.name}: {remark}" for each in found for remark in each.remarks]
    return list(dict.fromkeys(pair for each in found for pair in each.pairs)), remarks


def _look(wanted: Sequence[tuple[str, str]], top: Path) -> dict[tuple[str, str], list["Place"]]:
    """Where each (set, split) lies; what is to be scored is not looked for among what is to train on."""
    sets = {(name, split): BENCHMARKS[name] for name, split in wanted}
    training = {(name, split): benchmark.to_train_on(split) for (name, split), benchmark in sets.items()}
    folders = {kind: _folders(top, kind) for kind in set(training.values())}
    places = {key: _places(sets[key], folders[training[key]], sets[key].places(key[1])) for key in sets}
    for (name, split), found in places.items():
        if split == "all" and found and BENCHMARKS[name].train not in ("", WHOLE):
            found[0] = _with_train(BENCHMARKS[name], found[0], top)
    if len(set(sets.values())) == 1 and not any(places.values()):
        places = {key: _unnamed(sets[key], top, training[key]) for key in sets}
    return places


def _wanted(names: Sequence[str]) -> dict[tuple[str, str], str]:
    """(set, split) -> the group that it was named by, or "" if by itself; each once, in the order of the user."""
    sets = {_key(name): name for name in (*BENCHMARKS, *GROUPS)}
    wanted: dict[tuple[str, str], str] = {}
    for text in names:
        asked, _, split = (part.strip() for part in text.partition(":"))
        name, split = sets.get(_key(asked), ""), split.lower() or "all"
        if _key(text) in sets:  # CSD:train is a set of its own
            name, split = sets[_key(text)], "all"
        if not name:
            raise UserError(f"'{quoted(asked)}': no such set{nearest(asked.lower(), map(str.lower, sets.values()))}")
        parts = GROUPS.get(name, (name,))
        having = [part for part in parts if split in BENCHMARKS[part].splits]
        if not having:
            known = {split for part in parts for split in BENCHMARKS[part].splits}
            raise UserError(f"'{quoted(text)}': no such split{nearest(split, known)}")
        for part in having:
            group = name if name in GROUPS else ""
            wanted[part, split] = group and wanted.get((part, split), group)  # by itself: no longer optional
    return wanted


def _key(name: str) -> str:
    return re.sub("[-_ ]", "", name).casefold()


class Place(NamedTuple):
    """Where a set lies; of several folders of ``truths`` the first counts, and may be the hazy one itself."""

    hazy: Path
    truths: list[Path]
    whole: bool  # has the ground truth that it should have
    rest: tuple["Place", ...] = ()  # of a set that lies in two places, as train/ and test/


def _places(benchmark: Benchmark, folders: list[Path], layouts: Sequence[str]) -> list[Place]:
    """The best first: whole ones, then by the order of the layouts, then the shallowest; each real folder once."""
    places: dict[str, Place] = {}
    for layout in layouts:
        for folder in (folder for folder in folders if _fits(folder, layout, 1)):
            truths = []
            if "{" in layout:
                truths = [other for other in _beside(folder, layout) if _fits(other, layout, 2)]
                truths.sort(key=lambda path: path.name.lower() != "gt")
            elif benchmark.truth != "none":
                truths = [folder]
            if _holds_pictures(folder, "_gt" if truths == [folder] else ""):
                if layout in benchmark.shared and not _has_its_numbers(benchmark, folder):
                    continue
                whole = bool(truths) or benchmark.truth == "none"
                places.setdefault(os.path.realpath(folder), Place(folder, truths, whole))
    return sorted(places.values(), key=lambda place: not place.whole)


def _has_its_numbers(benchmark: Benchmark, folder: Path) -> bool:
    """Can these be its images, by their numbers, and not those of a set that shares the layout?"""
    numbers = {_number(path) for path in _pictures(folder)}
    own = set(unroll(benchmark.numbers))
    others = {n for other in BENCHMARKS.values() if other.shared == benchmark.shared for n in unroll(other.numbers)}
    return numbers <= own if own else not numbers & others


def _with_train(benchmark: Benchmark, place: Place, top: Path) -> Place:
    """The place and, where it holds the test split alone, that of the training split beside it: then all is there."""
    train, test = (set(unroll(part)) for part in (benchmark.train, benchmark.test))
    have = {_number(path) for path in _hazy(place)}
    if not place.whole or not (have == test or _is_renumbered(benchmark, place)):
        return place
    for other in _places(benchmark, _folders(top, True), benchmark.places("train")):
        if other.whole and {_number(path) for path in _hazy(other)} == train:
            return other._replace(rest=(place,))
    return place


def _is_renumbered(benchmark: Benchmark, place: Place) -> bool:
    """Is it the test split in a folder of that name, its images numbered from 1?"""
    parts = {part.casefold() for part in place.hazy.parts[-3:]}
    numbers = sorted(_number(path) or 0 for path in _hazy(place))
    return bool({"test", "testa"} & parts) and numbers == list(range(1, len(unroll(benchmark.test)) + 1))


def _beside(hazy: Path, layout: str) -> list[Path]:
    """The folders that may have the ground truth of ``hazy``, by the layout's braces."""
    up, down = (len(Path(side).parts) for side in BRACES.search(layout).groups())
    level = [hazy.parents[up - 1] if up else hazy]
    for _ in range(down):
        level = [below for folder in level for below in _subfolders(folder)]
    return level


def _unnamed(benchmark: Benchmark, top: Path, training: bool) -> list[Place]:
    """The data root itself as the one set that is asked for, unless its name or its numbers are those of another."""
    root = Path(os.path.abspath(top))
    below = [folder for folder in _subfolders(root) if training or not SKIPPED.fullmatch(folder.name)]
    if any(_places(other, [root, *below], other.places()) for other in BENCHMARKS.values()):
        return []
    if training:
        below += [deep for folder in below if SKIPPED.fullmatch(folder.name) for deep in _subfolders(folder)]
    own = "{trainA,trainB}" if training else "{testA,testB}"
    braces = {match[0]: None for match in map(BRACES.search, benchmark.layouts) if match and match[1]}
    found = _places(benchmark, below, ["{hazy,gt}", own, *braces] if benchmark.truth != "none" else ["hazy"])
    if benchmark.truth == "none" or benchmark.rule == GT:
        found += _places(benchmark, [root], ["*"])
    wanted = unroll(benchmark.numbers)
    return [place for place in found if all(not wanted or _number(path) in wanted for path in _pictures(place.hazy))]


def _fits(folder: Path, layout: str, side: int) -> bool:
    return _regex(layout, side).fullmatch(folder.as_posix()) is not None


@functools.cache
def _regex(layout: str, side: int) -> re.Pattern:
    """What the path of a folder of hazy images (``side`` 1) or of ground truths (2) looks like."""
    synonyms = {"hazy": HAZY, "haze": HAZY, "gt": TRUTH}
    parts = Path(BRACES.sub(rf"\{side}", layout)).parts
    choices = ("|".join(map(_pattern, synonyms.get(part, (part,)))) for part in parts)
    return re.compile(".*" + "".join(f"/[#_ ]*(?:{choice})" for choice in choices), re.IGNORECASE)


def _pattern(name: str) -> str:
    """The regular expression for the name of one folder; parts of RESIDE may have its name before their own."""
    joints = "[-_ ]+|(?<=[a-z])(?=[A-Z])|(?<=[A-Za-z])(?=[0-9])"  # PhoneHazy is Phone-Hazy too
    text = re.sub(joints, "[-_ ]*", name.removesuffix("*"))
    if name.endswith("*"):
        text += f"(?:[-_ ]+{OTHER})?" if text else OTHER
    return f"(?:RESIDE[-_ ]*)?{text}" if re.match("SOTS|HSTS|ITS|OTS|RTTS|URHI", name) else text


def _folders(root: Path, training: bool) -> list[Path]:
    """``root`` and the folders below it, level by level; then, by their real names, those that links lead to.

    Without those of images to train on, unless these are what is looked for.
    """
    level, found = [Path(os.path.abspath(root))], []
    for _ in range(LEVELS + 1):
        found += level
        level = [below for folder in level for below in _subfolders(folder)]
        level = [folder for folder in level if training or not SKIPPED.fullmatch(folder.name)]
    return list(dict.fromkeys([*found, *(Path(os.path.realpath(folder)) for folder in found)]))


def _subfolders(folder: Path) -> list[Path]:
    """Sorted; hidden folders and links that lead back up are left out."""
    subfolders, pictures, real = [], 0, Path(os.path.realpath(folder))
    made = paths.results(folder)
    with contextlib.suppress(OSError), os.scandir(folder) as entries:  # what cannot be listed holds no benchmark
        for entry in entries:
            if entry.is_dir():
                back = entry.is_symlink() and real.is_relative_to(os.path.realpath(entry))
                if not back and not entry.name.startswith(".") and entry.name not in made:
                    subfolders.append(folder / entry.name)
            elif _is_picture(entry.name):
                pictures += 1
                if pictures == MANY:
                    break
    return sorted(subfolders, key=lambda path: (path.name.casefold(), path.name))


def _is_picture(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in paths.EXTENSIONS


def _holds_pictures(folder: Path, ending: str) -> bool:
    for part in _parts(folder):
        with contextlib.suppress(OSError), os.scandir(part) as entries:
            names = (entry.name for entry in entries if _is_picture(entry.name))
            if any(os.path.splitext(name)[0].lower().endswith(ending) for name in names):
                return True
    return False


def _parts(folder: Path) -> Iterator[Path]:
    yield folder
    yield from (below for below in _subfolders(folder) if PART.fullmatch(below.name))


def _missing(places: dict[str, list[Place]], root: Path) -> str:
    """One line about the sets that are not there: what was looked for, and where to get it."""
    way_out = (
        "or name the set's own folder as data root (--data-root, data.root), or its images themselves (--hazy and "
        "--clear, data.hazy and data.clear)"
    )
    if len(places) > 3:
        known = "--list-benchmarks has their layouts and where to get them"
        return f"{', '.join(places)}: not under {root}; {known}, {way_out}"
    hints = []
    for name, half in places.items():
        looked = f"looked for {', '.join(BENCHMARKS[name].places()[:3])} and the like"
        if half:
            looked = f"{half[0].hazy} has no folder of ground truths beside it ({', '.join(TRUTH[:4])} ...)"
        which = f"{name}: " if len(places) > 1 else ""
        hints.append(f"{which}{looked}; to get it: {BENCHMARKS[name].paper.where}")
    return f"{', '.join(places)}: not under {root}; {'; '.join(hints)}; {way_out}"


def _gather(benchmark: Benchmark, split: str, places: list[Place]) -> Found:
    """Pair and check the images of a split at the first of the places."""
    place = places[0]
    parts = [place, *place.rest]
    found = Found(benchmark, split, place.hazy, [pair for part in parts for pair in _members(benchmark, split, part)])
    if benchmark.test not in ("", WHOLE) and _is_renumbered(benchmark, parts[-1]):
        tests = len(unroll(benchmark.test))
        found.remarks.append(
            f"{len(found.pairs)} of {found.expected} hazy images; those in {parts[-1].hazy} are numbered 1-{tests}: "
            f"taken for {benchmark.test}, the test split, by the name of the folder"
        )
    else:
        found.remarks.extend(_remarks(found))
    others = [*place.truths[1:], *(other.hazy for other in places[1:] if other.whole and other not in parts)]
    found.remarks.extend(f"there is also {other}; not used" for other in others)
    folders = dict.fromkeys(folder for part in parts for folder in (part.hazy, *part.truths[:1]))
    unread = {folder: paths.describe_unread(map(str, os.listdir(folder))) for folder in folders}
    found.remarks.extend(f"{folder}: passed over {text}" for folder, text in unread.items() if text)
    return found


def _members(benchmark: Benchmark, split: str, place: Place) -> list[tuple[Path, Path | None]]:
    """The pairs of a split at one place."""
    hazy, numbers = _hazy(place), benchmark.splits[split]
    if numbers != benchmark.numbers and not (split == "test" and _is_renumbered(benchmark, place)):
        hazy = [path for path in hazy if _number(path) in unroll(numbers)]
        if not hazy:
            raise UserError(f"{place.hazy}: none of {benchmark.name}:{split} ({numbers}); add them or name no split")
    if benchmark.truth == "none":
        return [(path, None) for path in hazy]
    truths = _pictures(place.truths[0])
    if place.truths == [place.hazy]:
        truths = [path for path in truths if path.stem.lower().endswith("_gt")]
    pairs = _pair(benchmark, hazy, truths, place.truths[0])
    step = math.ceil(len(pairs) / LOOKED_AT) if benchmark.to_train_on(split) else 1
    _check_sizes(benchmark, pairs[::step])
    return pairs


def _hazy(place: Place) -> list[Path]:
    flat = place.truths == [place.hazy]
    return [path for path in _pictures(place.hazy) if not (flat and path.stem.lower().endswith("_gt"))]


def _pictures(folder: Path) -> list[Path]:
    """Those in the folder itself or in its parts, 2 before 10."""
    parts = set(_parts(folder))
    return [path for path in paths.find(folder) if path.parent in parts]


def _pair(benchmark: Benchmark, hazy: list[Path], truths: list[Path], folder: Path) -> list[tuple[Path, Path]]:
    """Every hazy image with its ground truth, by the set's rule; repackaged sets give both the same stem."""
    stems, rule = pairing.by_stem(truths), RULES[benchmark.rule]
    names = {path: path.stem.casefold() for path in hazy}
    if benchmark.rule == ORDER and not stems.keys() & names.values():
        return _in_order(benchmark, hazy, truths, folder)
    choices = {path: stems.get(name) or stems.get(rule(name), []) for path, name in names.items()}
    double = [paths for paths in pairing.by_stem(hazy).values() if len(paths) > 1]
    _refuse([f"{a} and {b} are hazy images of one name" for a, b, *_ in double], "keep one")
    lone = [f"{path}: no ground truth {rule(names[path])}.* in {folder}" for path in hazy if not choices[path]]
    _refuse(lone, f"add it; {benchmark.name} is paired as {benchmark.rule}, or by the same name")
    many = {path: found for path, found in choices.items() if len(found) > 1}
    _refuse([f"{path}: has two ground truths, {a} and {b}" for path, (a, b, *_) in many.items()], "keep one")
    return [(path, found[0]) for path, found in choices.items()]


def _in_order(benchmark: Benchmark, hazy: list[Path], truths: list[Path], folder: Path) -> list[tuple[Path, Path]]:
    if len(hazy) != len(truths):
        raise UserError(
            f"{hazy[0].parent} holds {len(hazy)} images and {folder} {len(truths)}; {benchmark.name} pairs "
            f"{benchmark.rule}, so there must be as many: fetch the set again"
        )
    return list(zip(hazy, truths, strict=True))


def _check_sizes(benchmark: Benchmark, pairs: list[tuple[Path, Path]]) -> None:
    sizes = {path: _size(path) for path in dict.fromkeys(path for pair in pairs for path in pair)}
    wrong, border = [], benchmark.border
    for hazy, truth in pairs:
        if sizes[hazy] and sizes[truth]:
            (w, h), (W, H) = sizes[hazy], sizes[truth]
            if (W - w, H - h) not in [(0, 0), (2 * border, 2 * border)]:
                wrong.append(f"{hazy} is {w}x{h} but its ground truth {truth} is {W}x{H}")
    larger = f", or the ground truth {border} pixels larger on every side" if border else ""
    _refuse(wrong, f"sizes must be equal{larger}, and nothing is ever resized; fetch the set again")


def _size(path: Path) -> tuple[int, int] | None:
    """Width and height as seen upright, by the header alone; None if it cannot be read, which the reader will tell."""
    Image.MAX_IMAGE_PIXELS = images.MAX_PIXELS
    with contextlib.suppress(Exception), Image.open(path) as image:  # on broken bytes Pillow raises nearly any kind
        exif = Image.Image.getexif(image)  # that of PNG files would first decode all pixels
        return image.size[::-1] if exif.get(ORIENTATION) in QUARTER_TURNS else image.size
    return None


def _refuse(problems: list[str], remedy: str) -> None:
    if problems:
        more = f" (and {len(problems) - 1} more like it)" if len(problems) > 1 else ""
        raise UserError(f"{problems[0]}{more}; {remedy}")


def _remarks(found: Found) -> Iterator[str]:
    """What is missing or odd, by the numbers of the images where the set has any."""
    benchmark, text = found.benchmark, found.benchmark.splits[found.split]
    wanted, have = unroll(text), Counter(_number(hazy) for hazy, _ in found.pairs)
    absent, few = [n for n in wanted if not have[n]], [n for n in wanted if 0 < have[n] < benchmark.each]
    strange = [hazy.name for hazy, _ in found.pairs if wanted and _number(hazy) not in wanted]
    parts = [f"missing: {_runs(absent, text)}"] if absent else []
    parts += [f"fewer than {benchmark.each} each: {_runs(few, text)}"] if few else []
    parts += [f"not of this set: {', '.join(strange[:3])}{' ...' if len(strange) > 3 else ''}"] if strange else []
    expected = found.expected or len(found.pairs)
    if parts or len(found.pairs) != expected:
        yield "; ".join([f"{len(found.pairs)} of {expected} hazy images", *parts])
    if len(found.pairs) > expected:
        yield f"more hazy images than the set has; is there anything else in {found.folder}?"
    truths = len({truth for _, truth in found.pairs})
    if len(found.pairs) == benchmark.hazy and benchmark.truths and truths not in (benchmark.truths, benchmark.hazy):
        yield f"{truths} ground truths where the set has {benchmark.truths}"
    if benchmark.truth == "unaligned":
        yield "hazy images and ground truths are not aligned: full-reference figures mean little"


def _number(path: Path) -> int | None:
    digits = re.match("[0-9]+", path.stem)
    return int(digits[0]) if digits else None


def _runs(numbers: Sequence[int], like: str) -> str:
    """The other way round, with as many digits as ``like`` begins with; of many runs the first `RUNS`."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    width = len(like.partition("-")[0])
    texts = [f"{a:0{width}}" if a == b else f"{a:0{width}}-{b:0{width}}" for a, b in runs]
    return " ".join(texts[:RUNS]) + (f" ... ({len(numbers)} in all)" if len(texts) > RUNS else "")
