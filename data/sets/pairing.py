"""The rules by which hazy images find their ground truth, and clear images their depth map.

Names are compared without extension, in any case. An image is looked for in the folder of the same path below its
source, then in the folders above that one; only where no folder answers to its own, in the folders that answer to no
other. Within a folder the first of these rules that finds anything counts: the same name; the same but for one word of
its side (``01_hazy``, ``01_GT``, ``01``); A for B; what is left when endings at ``_`` are dropped (``1400_1`` and
``1400``). What could be another pair is refused, never guessed.
"""

import os
import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data import paths
from utils.errors import UserError

Sources = str | Path | Sequence[str | Path]  # what a user names: a folder, a .flist, an image, or several of these
Pair = tuple[Path, Path]
Folder = tuple[str, ...]  # the parts of its path below the source, case folded


class Kind(NamedTuple):
    """What is looked for, the words by which names of both sides may differ, and which of the looser rules hold."""

    what: str
    own: frozenset[str]
    other: frozenset[str]
    letters: bool
    endings: bool


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


TRUTH = Kind(
    "ground truth",
    _words("hazy haze foggy fog misty mist smoky smoke input inputs in lq degraded snowy snow rainy rain blurry blur"),
    _words("clear clean gt gts truth groundtruth hazefree target targets reference ref original hq sharp label"),
    letters=True,
    endings=True,
)
DEPTH = Kind(
    "depth map",
    _words("rgb color colors colour image img photo clear clean gt"),
    _words("depth depths depthmap disparity disp"),
    letters=False,
    endings=False,
)
SPELLINGS = (  # of words that may be written as two
    (re.compile("ground[-_ .]?truth"), "groundtruth"),
    (re.compile("(non|no|without)[-_ .]?(haze|hazy|fog)|(haze|fog)[-_ .]?free"), "hazefree"),
    (re.compile("depth[-_ .]?map"), "depthmap"),
)
SAME, WORD, LETTER, ENDING = range(4)  # the rules, the strictest first


def pairs(hazy_source: Sources, clear_source: Sources) -> tuple[list[Pair], list[str]]:
    """Pair every hazy image with its ground truth, in the order of the hazy ones; and what is to be said about it.

    By name, see above. Two files that are named singly are a pair; two lists of one length whose names do not pair are
    paired line by line. Raises `UserError` for a hazy image with no ground truth, with two, or with a doubtful one.
    """
    hazy, clear = Source.of(hazy_source), Source.of(clear_source)
    by_line = list(zip(hazy.paths, clear.paths, strict=False)) if len(hazy.paths) == len(clear.paths) else None
    if hazy.kind == clear.kind == "file":
        return _different(by_line), []
    search = Search(hazy, clear, TRUTH)
    if not hazy.kind == clear.kind == "list" or not by_line:
        return _different(search.pairs()), []
    try:
        found = _different(search.pairs())
    except UserError:
        said = f"{clear.name}: paired with {hazy.name} line by line, since the names do not pair"
        return _different(search.check_lines(by_line)), [said]
    return found, [] if found == by_line else [f"{clear.name}: paired with {hazy.name} by name, not line by line"]


def match_depth(clear: Sequence[Path], depth: Sequence[Path]) -> list[Path]:
    """The depth map of every clear image, by the rules above but for letters and endings. Raises `UserError`."""
    search = Search(Source(list(clear)), Source(list(depth), name=str(depth[0].parent)), DEPTH)
    return [found for _, found in search.pairs()]


def by_stem(paths: Iterable[Path]) -> dict[str, list[Path]]:
    """Group files by name without extension, case folded."""
    return _grouped((path.stem.casefold(), path) for path in paths)


@dataclass
class Source:
    """Files, and the folder that they were found in; those of a list may lie anywhere."""

    paths: list[Path]
    root: Path | None = None
    kind: str = "list"
    name: str = ""

    @classmethod
    def of(cls, source: Sources) -> "Source":
        """What the user names."""
        if not isinstance(source, str | Path):
            if len(source) == 1:
                return cls.of(source[0])
            return cls(paths.find(source), None, "list", ", ".join(map(str, source)))
        path, found = paths.resolve(source), paths.find(source)
        if path.is_dir():
            return cls(found, path, "folder", str(source))
        return cls(found, None, "list" if path.suffix.lower() == ".flist" else "file", str(source))

    def folder(self, path: Path) -> Folder:
        """Where a file lies, below the folder of the source if there is one."""
        parent = path.relative_to(self.root).parent if self.root else Path(os.path.abspath(path)).parent
        return tuple(part.casefold() for part in parent.parts)


class Match(NamedTuple):
    """What may belong to an image: ``rule`` is how it was found, ``base`` and ``dropped`` the parts of the name."""

    rule: tuple[int, Hashable]
    found: list[Path]
    base: str
    dropped: list[str]
    index: "Index"


class Index:
    """The files of some folders by their names."""

    def __init__(self, paths: Iterable[Path], kind: Kind):
        self.kind, self.stems = kind, by_stem(paths)
        named = [(stem, path) for stem, paths in self.stems.items() for path in paths]
        self.keys = _grouped((key, path) for stem, path in named for key in _keys(stem, kind.other))
        self.longer = _grouped((start, (rest, path)) for stem, path in named for start, rest in _starts(stem))

    def match(self, stem: str) -> Match | None:
        """By the first rule that finds anything."""
        parts = stem.split("_")
        for left in range(len(parts), 0 if self.kind.endings else len(parts) - 1, -1):
            base, dropped = "_".join(parts[:left]), parts[left:]
            for rule, found in self._whole(base, letters=self.kind.letters and not dropped):
                if found:
                    rule = (ENDING, len(dropped)) if dropped else rule
                    return Match(rule, list(dict.fromkeys(found)), base, dropped, self)
        return None

    def _whole(self, stem: str, letters: bool) -> Iterator[tuple[tuple[int, Hashable], list[Path]]]:
        yield (SAME, ""), self.stems.get(stem, [])
        tokens, *shorter = _keys(stem, self.kind.own)
        yield (WORD, ""), [path for key in (tokens, *shorter) for path in self.keys.get(key, [])]
        for one, other in (("a", "b"), ("b", "a")) if letters and len(tokens) > 1 else ():
            if tokens[-1] == one:
                yield (LETTER, f"_{one}"), self.keys.get((*tokens[:-1], other), [])
            if tokens[0] == one:
                yield (LETTER, f"{one}_"), self.keys.get((other, *tokens[1:]), [])


class Search:
    """Looks for what belongs to the images of one source among those of another."""

    def __init__(self, own: Source, other: Source, kind: Kind):
        self.own, self.other, self.kind = own, other, kind
        self.pools = _grouped((other.folder(path), path) for path in dict.fromkeys(other.paths))
        self.members = _grouped((own.folder(path), path) for path in own.paths)
        words = kind.own | kind.other
        self.bare = {folder: _bare(folder, words) for folder in (*self.pools, *self.members)}
        self.bare_pools = _grouped((self.bare[folder], folder) for folder in self.pools)
        self.ends = _grouped((self.bare[folder][-1:], folder) for folder in self.members)
        self.pool_ends = _grouped((self.bare[folder][-1:], folder) for folder in self.pools)
        self.indices: dict[tuple[Folder, ...], Index] = {}

    def pairs(self) -> list[Pair]:
        """Every image with what belongs to it. Raises `UserError` where that is nothing, two things or a guess."""
        matches = {path: match for folder in self.members for path, match in self._matches(folder).items()}
        alone = [path for path in self.own.paths if matches[path] is None]
        if alone:
            raise UserError(self._missing(alone))
        for path, match in matches.items():
            if len(match.found) > 1:
                both = f"{match.found[0]} and {match.found[1]}"
                remedy = "keep one, or lay both sides out in the same sub-folders"
                raise UserError(f"{path}: has two {self.kind.what}s, {both}; {remedy}")
        for members in self.members.values():
            _check_rules({path: matches[path] for path in members})
        return [(path, matches[path].found[0]) for path in self.own.paths]

    def check_lines(self, pairs: Sequence[Pair]) -> list[Pair]:
        """The pairs of two lists by line, if no name speaks against it. Raises `UserError`."""
        matches = {path: match for folder in self.members for path, match in self._matches(folder).items()}
        for line, (path, truth) in enumerate(pairs, 1):
            if matches[path] and truth not in matches[path].found:
                raise UserError(
                    f"{self.other.name}: not all images pair by name, and by line {path} belongs to {truth} (line "
                    f"{line} of both lists) but by name to {matches[path].found[0]}; order both lists alike"
                )
        return list(pairs)

    def _matches(self, folder: Folder) -> dict[Path, Match | None]:
        """What the images of one folder find: in the first of its places where there is anything."""
        places = [self._index(folders) for folders in self._places(folder)]
        stems = {path: path.stem.casefold() for path in self.members[folder]}
        return {p: next(filter(None, (place.match(stem) for place in places)), None) for p, stem in stems.items()}

    def _index(self, folders: Sequence[Folder]) -> Index:
        key = tuple(folders)
        if key not in self.indices:
            self.indices[key] = Index([path for folder in folders for path in self.pools[folder]], self.kind)
        return self.indices[key]

    def _places(self, folder: Folder) -> Iterator[list[Folder]]:
        """The folders to look through for what belongs to those of ``folder``, in turn."""
        answering = self._answering(folder)
        above = [folder[:length] for length in range(len(folder) - 1, -1, -1)]
        yield from filter(None, [answering, *(self._answering(each) for each in above if each in self.bare)])
        if not answering or not folder:
            rest = [each for each in self.pools if not self._belongs_to_another(each) and each not in answering]
            if rest:
                yield rest

    def _answering(self, folder: Folder) -> list[Folder]:
        """The folders of the same path; or the same but for words such as hazy; or whose path ends alike."""
        if folder in self.pools:
            return [folder]
        bare = self.bare[folder]
        alike = self.bare_pools.get(bare, []) or (self.pool_ends.get(bare[-1:], []) if bare else [])
        if not alike:
            return []
        most = max(_common_end(bare, self.bare[each]) for each in alike)
        return [each for each in alike if _common_end(bare, self.bare[each]) == most == self._closest(each)]

    def _closest(self, pool: Folder) -> int:
        """How many parts at the end of its path a folder shares at most with one of the other side."""
        bare = self.bare[pool]
        return max((_common_end(bare, self.bare[own]) for own in self.ends.get(bare[-1:], [])), default=0)

    def _belongs_to_another(self, pool: Folder) -> bool:
        return bool(pool) and (pool in self.members or self.bare[pool][-1:] in self.ends)

    def _missing(self, alone: list[Path]) -> str:
        what, source = self.kind.what, self.other.name
        if what == DEPTH.what:
            return f"{alone[0]}: no depth map {alone[0].stem}.* in {source}; add it, or leave depth out"
        return (
            f"{alone[0]}: no ground truth in {source} ({len(alone)} of {len(self.own.paths)} images have none); add "
            f"it, or name the images alike: the same, as 01_hazy and 01_GT (hazy_01, clear_01) or 1400_1 and 1400; "
            f"or give both as .flist files of one length, which pair line by line, or one image and its ground truth"
        )


def _check_rules(matches: dict[Path, Match]) -> None:
    """Refuse what one folder's names do not tell for certain. Raises `UserError`.

    A name that is shortened may only look as if it belonged to another: frame_002 to frame, where frame_001 is another
    ground truth. So the files of one folder are to be named by one rule, unless what is dropped are numbers that
    nothing else is told by.
    """
    if not matches:
        return
    rules = {match.rule for match in matches.values()}
    strict = {match.found[0] for match in matches.values() if match.rule[0] != ENDING}
    used = {(match.found[0], match.rule) for match in matches.values()}
    example = next((path for path, match in matches.items() if match.rule == min(rules)), None)
    for path, match in matches.items():
        truth, (rule, _) = match.found[0], match.rule
        if rule == LETTER and len(rules) > 1:
            raise UserError(_doubt(path, truth, f"{example} is named otherwise"))
        if rule != ENDING:
            continue
        first = _is_number(match.dropped[0])
        for rest, other in match.index.longer.get(match.base, []):
            if other != truth and _is_number(rest) == first and (other, match.rule) not in used:
                raise UserError(_doubt(path, truth, f"there is {other} too"))
        shorter = [start for start, _ in _starts(match.base) if start in match.index.stems]
        if len(rules) > 1 and shorter:  # a_1_0.9 may be of a_1, or the first one of a
            raise UserError(_doubt(path, truth, f"there is {match.index.stems[shorter[-1]][0]} too"))
        if len(rules) > 1 and (truth in strict or not all(map(_is_number, match.dropped))):
            raise UserError(_doubt(path, truth, f"{example} is named otherwise"))


def _doubt(path: Path, truth: Path, why: str) -> str:
    return (
        f"{path}: only by a part of its name is {truth} its ground truth, and {why}; rename it, take it out, or give "
        f"both sides as .flist files of one length, which pair line by line"
    )


def _different(pairs: Sequence[Pair]) -> list[Pair]:
    real = {truth: os.path.realpath(truth) for truth in dict.fromkeys(truth for _, truth in pairs)}
    for hazy, truth in pairs:
        if os.path.realpath(hazy) == real[truth]:
            raise UserError(
                f"{hazy}: hazy image and ground truth are one file; name two sources, as .flist if in one folder"
            )
    return list(pairs)


def _keys(stem: str, words: frozenset[str]) -> list[Folder]:
    """The name in pieces, whole and without one of the ``words``."""
    tokens = _tokens(stem, words)
    shorter = [tokens[:k] + tokens[k + 1 :] for k, token in enumerate(tokens) if token in words]
    return list(dict.fromkeys([tokens, *shorter]))


def _tokens(name: str, words: frozenset[str]) -> tuple[str, ...]:
    """A name in pieces: at separators, and between a word of ``words`` and a number (hazy01)."""
    for pattern, word in SPELLINGS:
        name = pattern.sub(word, name)
    tokens: list[str] = []
    for piece in re.split("[-_ .]+", name):
        glued = re.fullmatch("([a-z]+)([0-9]+)|([0-9]+)([a-z]+)", piece)
        parts = [part for part in glued.groups() if part] if glued else [piece]
        tokens += parts if any(part in words for part in parts) else [piece]
    return tuple(filter(None, tokens))


def _starts(stem: str) -> Iterator[tuple[str, str]]:
    """Every beginning of a name that ends before a ``_``, and the part that follows."""
    parts = stem.split("_")
    for length in range(1, len(parts)):
        yield "_".join(parts[:length]), parts[length]


def _bare(folder: Folder, words: frozenset[str]) -> Folder:
    """The path of a folder without the words that tell one side from the other."""
    pieces = ("_".join(token for token in _tokens(part, words) if token not in words) for part in folder)
    return tuple(filter(None, pieces))


def _common_end(one: Folder, other: Folder) -> int:
    pairs = zip(reversed(one), reversed(other), strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _is_number(text: str) -> bool:
    return re.fullmatch("[0-9.]+", text) is not None


def _grouped(items: Iterable[tuple]) -> dict:
    groups = defaultdict(list)
    for key, item in items:
        groups[key].append(item)
    return dict(groups)
