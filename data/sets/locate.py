"""Find benchmark sets on disk by the layouts of their table, pair their images and check for completeness."""

import contextlib
import functools
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data import paths
from data.pictures import Folder, Paired, doubts, of_other_size
from data.sets import pairing
from data.sets.table import BENCHMARKS, GROUPS, GT, HAZY, ORDER, RULES, TRUTH, WHOLE, Benchmark, unroll
from utils.errors import UserError, nearest, quoted
from utils.evaluation.runner import ImageSet

LEVELS = 5  # of folders below the data root that are searched
MAX_RANGES = 10  # of missing numbers that a warning lists
FURTHER = r"(?![^/]*(?:train|val|dehaz|result|output))[a-z][^/]*"  # what * matches
CHECKED_PAIRS = 1000  # of a training set, evenly spread, whose sizes are compared by their headers
SKIPPED = re.compile(r"train(ing)?|val(id|idation)?", re.IGNORECASE)  # folders that are not searched for test sets
BRACES = re.compile("{([^,}]*),([^,}]*)}")  # {hazy,gt} in a layout
PART = re.compile(r"part[-_ ]?[0-9]+", re.IGNORECASE)  # sub-folders in which a set's images may lie (OTS)
MANY = 1000  # images in a folder after which the rest of it is not listed


@dataclass(frozen=True)
class LocatedSet:
    """A set on disk: ``pairs`` of hazy image and ground truth (or None), 2 before 10.

    ``folder`` holds the hazy images; ``remarks`` are warnings about missing or unexpected images, one line each.
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
        """The number of hazy images of the whole split; None if there is no agreed number."""
        numbers = unroll(self.benchmark.splits[self.split])
        return len(numbers) * self.benchmark.each or self.benchmark.hazy or None

    def items(self) -> Paired | Folder:
        """The images as a dataset, to score on or, without ground truth, to dehaze."""
        if self.benchmark.truth == "none":
            return Folder([hazy for hazy, _ in self.pairs], self.folder)
        return Paired(self.pairs, self.folder, self.benchmark.border)

    def pictures(self) -> ImageSet:
        """The set as `utils.evaluation` scores it, with the released methods' test settings for it."""
        benchmark = self.benchmark
        items = self.items()
        truth = benchmark.truth != "none"
        preset = {"airlight": benchmark.airlight, "guided_filter": benchmark.guided_filter}
        warnings = [*self.remarks, *(doubts(items) if truth and benchmark.degradation == "haze" else [])]
        if benchmark.to_train_on(self.split):
            warnings.append("training images: figures on them say little about other images")
        return ImageSet(self.name, items, truth, self.expected, warnings, preset, self.name.replace(":", "-"))


def find(names: Sequence[str], root: str | Path) -> list[LocatedSet]:
    """Find sets ("o_haze"), splits ("O-HAZE:test") and groups ("SOTS") in ``root`` and `LEVELS` folders deep.

    If a single set is requested, ``root`` may also be its own folder, under any name. Absent sets of a group are left
    out with a warning. Raises `UserError` for an unknown name, an absent set, a hazy image without exactly one ground
    truth, and sizes that do not agree. Reads headers only.
    """
    requested = _requested(names)
    top = paths.resolve(root)
    if not top.is_dir():
        raise UserError(f"{top}: a file, not a data root; name the folder that holds the sets")
    locations = _locate(list(requested), top)
    absent = [key for key, located in locations.items() if not located or not located[0].complete]
    present = {group for key, group in requested.items() if key not in absent and group}
    missing = [key for key, group in requested.items() if key in absent and group not in present]
    if missing:
        raise UserError(_missing({key[0]: locations[key] for key in missing}, top))
    sets: list[LocatedSet] = []
    first: dict[str, LocatedSet] = {}
    for (name, split), group in requested.items():
        if (name, split) not in absent:
            sets.append(_collect(BENCHMARKS[name], split, locations[name, split]))
            first.setdefault(group, sets[-1])
    for group, head in first.items():
        omitted = dict.fromkeys(key[0] for key, by in requested.items() if by == group and key in absent)
        if omitted:
            head.remarks.append(f"of {group}, not under {top} and left out: {', '.join(omitted)}")
    return sets


def pairs(names: Sequence[str], root: str | Path) -> tuple[list[tuple[Path, Path]], list[str]]:
    """All pairs of the sets that `find` returns, each once, and the warnings. Raises `UserError` like `find`."""
    sets = find(names, root)
    for each in sets:
        if each.benchmark.truth != "aligned":
            has = {"none": "no", "unaligned": "no aligned"}[each.benchmark.truth]
            raise UserError(f"{each.name} has {has} ground truth to train or validate on; name another set")
    warnings = [f"{each.name}: {warning}" for each in sets for warning in each.remarks]
    return list(dict.fromkeys(pair for each in sets for pair in each.pairs)), warnings


def _locate(requested: Sequence[tuple[str, str]], top: Path) -> dict[tuple[str, str], list["Location"]]:
    """The locations of each (set, split); test sets are not searched for in training folders."""
    sets = {(name, split): BENCHMARKS[name] for name, split in requested}
    training = {(name, split): benchmark.to_train_on(split) for (name, split), benchmark in sets.items()}
    folders = {kind: _folders(top, kind) for kind in set(training.values())}
    locations = {key: _locations(sets[key], folders[training[key]], sets[key].all_layouts(key[1])) for key in sets}
    for (name, split), located in locations.items():
        if split == "all" and located and BENCHMARKS[name].train not in ("", WHOLE):
            located[0] = _with_train(BENCHMARKS[name], located[0], top)
    if len(set(sets.values())) == 1 and not any(locations.values()):
        locations = {key: _root_as_set(sets[key], top, training[key]) for key in sets}
    return locations


def _requested(names: Sequence[str]) -> dict[tuple[str, str], str]:
    """(set, split) -> the group that requested it, "" if named itself; each once, in the order of ``names``."""
    sets = {_key(name): name for name in (*BENCHMARKS, *GROUPS)}
    requested: dict[tuple[str, str], str] = {}
    for text in names:
        base, _, split = (part.strip() for part in text.partition(":"))
        name = sets.get(_key(base), "")
        split = split.lower() or "all"
        if _key(text) in sets:  # CSD:train is a set of its own
            name, split = sets[_key(text)], "all"
        if not name:
            raise UserError(f"'{quoted(base)}': no such set{nearest(base.lower(), map(str.lower, sets.values()))}")
        parts = GROUPS.get(name, (name,))
        with_split = [part for part in parts if split in BENCHMARKS[part].splits]
        if not with_split:
            known = {split for part in parts for split in BENCHMARKS[part].splits}
            raise UserError(f"'{quoted(text)}': no such split{nearest(split, known)}")
        for part in with_split:
            group = name if name in GROUPS else ""
            requested[part, split] = group and requested.get((part, split), group)  # named itself: no longer optional
    return requested


def _key(name: str) -> str:
    return re.sub("[-_ ]", "", name).casefold()


class Location(NamedTuple):
    """The folders of a set; of several ``truths`` the first is used, which may be the hazy folder itself."""

    hazy: Path
    truths: list[Path]
    complete: bool  # has ground truth, if the set has any
    rest: tuple["Location", ...] = ()  # further folders of a set in several parts, as train/ and test/


def _locations(benchmark: Benchmark, folders: list[Path], layouts: Sequence[str]) -> list[Location]:
    """The best first: complete ones, then by the order of the layouts, then the shallowest; each real folder once."""
    locations: dict[str, Location] = {}
    for layout in layouts:
        for folder in (folder for folder in folders if _fits(folder, layout, 1)):
            truths = []
            if "{" in layout:
                truths = [other for other in _truth_folders(folder, layout) if _fits(other, layout, 2)]
                truths.sort(key=lambda path: path.name.lower() != "gt")
            elif benchmark.truth != "none":
                truths = [folder]
            if _holds_images(folder, "_gt" if truths == [folder] else ""):
                if layout in benchmark.shared and not _has_own_numbers(benchmark, folder):
                    continue
                complete = bool(truths) or benchmark.truth == "none"
                locations.setdefault(os.path.realpath(folder), Location(folder, truths, complete))
    return sorted(locations.values(), key=lambda location: not location.complete)


def _has_own_numbers(benchmark: Benchmark, folder: Path) -> bool:
    """Whether the image numbers fit this set and not another one that shares the layout."""
    numbers = {_number(path) for path in _images(folder)}
    own = set(unroll(benchmark.numbers))
    others = {n for other in BENCHMARKS.values() if other.shared == benchmark.shared for n in unroll(other.numbers)}
    return numbers <= own if own else not numbers & others


def _with_train(benchmark: Benchmark, location: Location, top: Path) -> Location:
    """``location``, joined with that of the training split if it holds the test split alone."""
    train, test = (set(unroll(part)) for part in (benchmark.train, benchmark.test))
    present = {_number(path) for path in _hazy(location)}
    if not location.complete or not (present == test or _is_renumbered(benchmark, location)):
        return location
    for other in _locations(benchmark, _folders(top, True), benchmark.all_layouts("train")):
        if other.complete and {_number(path) for path in _hazy(other)} == train:
            return other._replace(rest=(location,))
    return location


def _is_renumbered(benchmark: Benchmark, location: Location) -> bool:
    """Whether it is the test split in a folder of that name, with its images renumbered from 1."""
    parts = {part.casefold() for part in location.hazy.parts[-3:]}
    numbers = sorted(_number(path) or 0 for path in _hazy(location))
    return bool({"test", "testa"} & parts) and numbers == list(range(1, len(unroll(benchmark.test)) + 1))


def _truth_folders(hazy: Path, layout: str) -> list[Path]:
    """The folders that may hold the ground truth of ``hazy``, by the braces in the layout."""
    up, down = (len(Path(side).parts) for side in BRACES.search(layout).groups())
    level = [hazy.parents[up - 1] if up else hazy]
    for _ in range(down):
        level = [below for folder in level for below in _subfolders(folder)]
    return level


def _root_as_set(benchmark: Benchmark, top: Path, training: bool) -> list[Location]:
    """The data root itself as the one requested set, unless its name or its numbers are those of another set."""
    root = Path(os.path.abspath(top))
    below = [folder for folder in _subfolders(root) if training or not SKIPPED.fullmatch(folder.name)]
    if any(_locations(other, [root, *below], other.all_layouts()) for other in BENCHMARKS.values()):
        return []
    if training:
        below += [deep for folder in below if SKIPPED.fullmatch(folder.name) for deep in _subfolders(folder)]
    domains = "{trainA,trainB}" if training else "{testA,testB}"
    braces = {match[0]: None for match in map(BRACES.search, benchmark.layouts) if match and match[1]}
    locations = _locations(benchmark, below, ["{hazy,gt}", domains, *braces] if benchmark.truth != "none" else ["hazy"])
    if benchmark.truth == "none" or benchmark.rule == GT:
        locations += _locations(benchmark, [root], ["*"])
    wanted = unroll(benchmark.numbers)
    return [
        location
        for location in locations
        if all(not wanted or _number(path) in wanted for path in _images(location.hazy))
    ]


def _fits(folder: Path, layout: str, side: int) -> bool:
    return _regex(layout, side).fullmatch(folder.as_posix()) is not None


@functools.cache
def _regex(layout: str, side: int) -> re.Pattern:
    """The pattern for the path of a folder of hazy images (``side`` 1) or of ground truths (2)."""
    synonyms = {"hazy": HAZY, "haze": HAZY, "gt": TRUTH}
    parts = Path(BRACES.sub(rf"\{side}", layout)).parts
    choices = ("|".join(map(_pattern, synonyms.get(part, (part,)))) for part in parts)
    return re.compile(".*" + "".join(f"/[#_ ]*(?:{choice})" for choice in choices), re.IGNORECASE)


def _pattern(name: str) -> str:
    """The regular expression for one folder name; RESIDE may precede the names of its parts."""
    separators = "[-_ ]+|(?<=[a-z])(?=[A-Z])|(?<=[A-Za-z])(?=[0-9])"  # PhoneHazy is Phone-Hazy too
    text = re.sub(separators, "[-_ ]*", name.removesuffix("*"))
    if name.endswith("*"):
        text += f"(?:[-_ ]+{FURTHER})?" if text else FURTHER
    return f"(?:RESIDE[-_ ]*)?{text}" if re.match("SOTS|HSTS|ITS|OTS|RTTS|URHI", name) else text


def _folders(root: Path, training: bool) -> list[Path]:
    """``root`` and the folders below it, level by level; then the targets of links, by their real paths.

    Training folders are left out unless ``training``.
    """
    level = [Path(os.path.abspath(root))]
    folders = []
    for _ in range(LEVELS + 1):
        folders += level
        level = [below for folder in level for below in _subfolders(folder)]
        level = [folder for folder in level if training or not SKIPPED.fullmatch(folder.name)]
    return list(dict.fromkeys([*folders, *(Path(os.path.realpath(folder)) for folder in folders)]))


def _subfolders(folder: Path) -> list[Path]:
    """Sorted; hidden folders, results of runs and links to a parent folder are left out."""
    subfolders = []
    count = 0
    real = Path(os.path.realpath(folder))
    results = paths.results(folder)
    with contextlib.suppress(OSError), os.scandir(folder) as entries:  # an unreadable folder holds no benchmark
        for entry in entries:
            if entry.is_dir():
                loop = entry.is_symlink() and real.is_relative_to(os.path.realpath(entry))
                if not loop and not entry.name.startswith(".") and entry.name not in results:
                    subfolders.append(folder / entry.name)
            elif _is_image(entry.name):
                count += 1
                if count == MANY:
                    break
    return sorted(subfolders, key=lambda path: (path.name.casefold(), path.name))


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in paths.EXTENSIONS


def _holds_images(folder: Path, ending: str) -> bool:
    for part in _parts(folder):
        with contextlib.suppress(OSError), os.scandir(part) as entries:
            names = (entry.name for entry in entries if _is_image(entry.name))
            if any(os.path.splitext(name)[0].lower().endswith(ending) for name in names):
                return True
    return False


def _parts(folder: Path) -> Iterator[Path]:
    yield folder
    yield from (below for below in _subfolders(folder) if PART.fullmatch(below.name))


def _missing(locations: dict[str, list[Location]], root: Path) -> str:
    """One line about the absent sets: the expected layouts, and where to get the sets."""
    remedy = (
        "or name the set's own folder as data root (--data-root, data.root), or its images themselves (--hazy and "
        "--clear, data.hazy and data.clear)"
    )
    if len(locations) > 3:
        known = "--list-benchmarks has their layouts and where to get them"
        return f"{', '.join(locations)}: not under {root}; {known}, {remedy}"
    hints = []
    for name, incomplete in locations.items():
        hint = f"looked for {', '.join(BENCHMARKS[name].all_layouts()[:3])} and the like"
        if incomplete:
            hint = f"{incomplete[0].hazy} has no folder of ground truths beside it ({', '.join(TRUTH[:4])} ...)"
        prefix = f"{name}: " if len(locations) > 1 else ""
        hints.append(f"{prefix}{hint}; to get it: {BENCHMARKS[name].paper.where}")
    return f"{', '.join(locations)}: not under {root}; {'; '.join(hints)}; {remedy}"


def _collect(benchmark: Benchmark, split: str, locations: list[Location]) -> LocatedSet:
    """Pair and check the images of a split at the first of the ``locations``."""
    location = locations[0]
    parts = [location, *location.rest]
    located = LocatedSet(
        benchmark, split, location.hazy, [pair for part in parts for pair in _split_pairs(benchmark, split, part)]
    )
    if benchmark.test not in ("", WHOLE) and _is_renumbered(benchmark, parts[-1]):
        tests = len(unroll(benchmark.test))
        located.remarks.append(
            f"{len(located.pairs)} of {located.expected} hazy images; those in {parts[-1].hazy} are "
            f"numbered 1-{tests}: assumed to be {benchmark.test}, the test split, by the name of the folder"
        )
    else:
        located.remarks.extend(_warnings(located))
    others = [*location.truths[1:], *(other.hazy for other in locations[1:] if other.complete and other not in parts)]
    located.remarks.extend(f"{other} exists too and is not used" for other in others)
    folders = dict.fromkeys(folder for part in parts for folder in (part.hazy, *part.truths[:1]))
    unread = {folder: paths.describe_unread(map(str, os.listdir(folder))) for folder in folders}
    located.remarks.extend(f"{folder}: passed over {text}" for folder, text in unread.items() if text)
    return located


def _split_pairs(benchmark: Benchmark, split: str, location: Location) -> list[tuple[Path, Path | None]]:
    """The pairs of a split at one location."""
    hazy = _hazy(location)
    numbers = benchmark.splits[split]
    if numbers != benchmark.numbers and not (split == "test" and _is_renumbered(benchmark, location)):
        hazy = [path for path in hazy if _number(path) in unroll(numbers)]
        if not hazy:
            raise UserError(f"{location.hazy}: none of {benchmark.name}:{split} ({numbers}); add them or name no split")
    if benchmark.truth == "none":
        return [(path, None) for path in hazy]
    truths = _images(location.truths[0])
    if location.truths == [location.hazy]:
        truths = [path for path in truths if path.stem.lower().endswith("_gt")]
    pairs = _pair(benchmark, hazy, truths, location.truths[0])
    _check_sizes(benchmark, paths.spread(pairs, CHECKED_PAIRS) if benchmark.to_train_on(split) else pairs)
    return pairs


def _hazy(location: Location) -> list[Path]:
    flat = location.truths == [location.hazy]
    return [path for path in _images(location.hazy) if not (flat and path.stem.lower().endswith("_gt"))]


def _images(folder: Path) -> list[Path]:
    """The images in the folder itself and in its parts (`PART`), 2 before 10."""
    parts = set(_parts(folder))
    return [path for path in paths.find(folder) if path.parent in parts]


def _pair(benchmark: Benchmark, hazy: list[Path], truths: list[Path], folder: Path) -> list[tuple[Path, Path]]:
    """Every hazy image with its ground truth, by the set's rule; in repackaged sets both may have the same stem."""
    stems = pairing.by_stem(truths)
    rule = RULES[benchmark.rule]
    names = {path: path.stem.casefold() for path in hazy}
    if benchmark.rule == ORDER and not stems.keys() & names.values():
        return _in_order(benchmark, hazy, truths, folder)
    choices = {path: stems.get(name) or stems.get(rule(name), []) for path, name in names.items()}
    duplicates = [paths for paths in pairing.by_stem(hazy).values() if len(paths) > 1]
    _refuse([f"{a} and {b} are hazy images of one name" for a, b, *_ in duplicates], "keep one")
    unpaired = [f"{path}: no ground truth {rule(names[path])}.* in {folder}" for path in hazy if not choices[path]]
    _refuse(unpaired, f"add it; {benchmark.name} is paired as {benchmark.rule}, or by the same name")
    ambiguous = {path: truths for path, truths in choices.items() if len(truths) > 1}
    _refuse([f"{path}: has two ground truths, {a} and {b}" for path, (a, b, *_) in ambiguous.items()], "keep one")
    return [(path, truths[0]) for path, truths in choices.items()]


def _in_order(benchmark: Benchmark, hazy: list[Path], truths: list[Path], folder: Path) -> list[tuple[Path, Path]]:
    if len(hazy) != len(truths):
        raise UserError(
            f"{hazy[0].parent} holds {len(hazy)} images and {folder} {len(truths)}; {benchmark.name} pairs "
            f"{benchmark.rule}, so both must have the same number: download the set again"
        )
    return list(zip(hazy, truths, strict=True))


def _check_sizes(benchmark: Benchmark, pairs: list[tuple[Path, Path]]) -> None:
    border = benchmark.border
    larger = f", or the ground truth {border} pixels larger on every side" if border else ""
    remedy = f"sizes must be equal{larger}, and nothing is ever resized; download the set again"
    _refuse(of_other_size(pairs, border), remedy)


def _refuse(problems: list[str], remedy: str) -> None:
    if problems:
        more = f" (and {len(problems) - 1} more like this)" if len(problems) > 1 else ""
        raise UserError(f"{problems[0]}{more}; {remedy}")


def _warnings(located: LocatedSet) -> Iterator[str]:
    """Warnings about missing and unexpected images, by their numbers where the set has any."""
    benchmark = located.benchmark
    text = benchmark.splits[located.split]
    numbers = unroll(text)
    counts = Counter(_number(hazy) for hazy, _ in located.pairs)
    absent = [n for n in numbers if not counts[n]]
    few = [n for n in numbers if 0 < counts[n] < benchmark.each]
    foreign = [hazy.name for hazy, _ in located.pairs if numbers and _number(hazy) not in numbers]
    parts = [f"missing: {_ranges(absent, text)}"] if absent else []
    parts += [f"fewer than {benchmark.each} each: {_ranges(few, text)}"] if few else []
    parts += [f"not of this set: {', '.join(foreign[:3])}{' ...' if len(foreign) > 3 else ''}"] if foreign else []
    expected = located.expected or len(located.pairs)
    if parts or len(located.pairs) != expected:
        yield "; ".join([f"{len(located.pairs)} of {expected} hazy images", *parts])
    if len(located.pairs) > expected:
        yield f"more hazy images than the set has; does {located.folder} hold anything else?"
    truths = len({truth for _, truth in located.pairs})
    if len(located.pairs) == benchmark.hazy and benchmark.truths and truths not in (benchmark.truths, benchmark.hazy):
        yield f"{truths} ground truths where the set has {benchmark.truths}"
    if benchmark.truth == "unaligned":
        yield "hazy images and ground truths are not aligned: full-reference figures mean little"


def _number(path: Path) -> int | None:
    digits = re.match("[0-9]+", path.stem)
    return int(digits[0]) if digits else None


def _ranges(numbers: Sequence[int], like: str) -> str:
    """The inverse of `unroll`, with as many digits as ``like`` begins with; at most `MAX_RANGES` ranges."""
    ranges: list[list[int]] = []
    for n in numbers:
        if ranges and n == ranges[-1][1] + 1:
            ranges[-1][1] = n
        else:
            ranges.append([n, n])
    width = len(like.partition("-")[0])
    texts = [f"{a:0{width}}" if a == b else f"{a:0{width}}-{b:0{width}}" for a, b in ranges]
    return " ".join(texts[:MAX_RANGES]) + (f" ... ({len(numbers)} in all)" if len(texts) > MAX_RANGES else "")
