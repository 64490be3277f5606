"""The rules that pair hazy images with their ground truth, and clear images with their depth map.

Names are compared without extension, ignoring case. The partner of an image is searched for in the folder of the same
path below its source, then in the folders above that one; if no folder corresponds to the image's, in the folders that
correspond to no other. Within a folder the first rule with a match counts: the same name; the same except for one word
of its side (``01_hazy``, ``01_GT``, ``01``); A for B; the name without endings at ``_`` (``1400_1`` and ``1400``).
Ambiguous pairs are refused, never guessed.
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

Sources = str | Path | Sequence[str | Path]  # a folder, a .flist, an image, or several of these
Pair = tuple[Path, Path]
Folder = tuple[str, ...]  # the case-folded parts of a folder's path below the source


class Kind(NamedTuple):
    """A kind of partner: the words by which the names of both sides may differ, and which looser rules apply."""

    name: str
    image_words: frozenset[str]
    partner_words: frozenset[str]
    letters: bool
    endings: bool


def _word_set(text: str) -> frozenset[str]:
    return frozenset(text.split())


TRUTH = Kind(
    "ground truth",
    _word_set(
        "hazy haze foggy fog misty mist smoky smoke input inputs in lq degraded snowy snow rainy rain blurry blur"
    ),
    _word_set("clear clean gt gts truth groundtruth hazefree target targets reference ref original hq sharp label"),
    letters=True,
    endings=True,
)
DEPTH = Kind(
    "depth map",
    _word_set("rgb color colors colour image img photo clear clean gt"),
    _word_set("depth depths depthmap disparity disp"),
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
    """All pairs of hazy image and ground truth, in the order of the hazy images; and warnings about the pairing.

    Pairs by name, see above. Two single files are a pair; two lists of one length whose names do not pair are paired
    line by line. Raises `UserError` for a hazy image with no ground truth, with two, or with an ambiguous one.
    """
    hazy = Source.of(hazy_source)
    clear = Source.of(clear_source)
    by_line = list(zip(hazy.paths, clear.paths, strict=False)) if len(hazy.paths) == len(clear.paths) else None
    if hazy.kind == clear.kind == "file":
        return _check_distinct(by_line), []
    search = Search(hazy, clear, TRUTH)
    if not hazy.kind == clear.kind == "list" or not by_line:
        return _check_distinct(search.pairs()), []
    try:
        by_name = _check_distinct(search.pairs())
    except UserError:
        warning = f"{clear.name}: paired with {hazy.name} line by line, since the names do not pair"
        return _check_distinct(search.check_lines(by_line)), [warning]
    return by_name, [] if by_name == by_line else [f"{clear.name}: paired with {hazy.name} by name, not line by line"]


def match_depth(clear: Sequence[Path], depth: Sequence[Path]) -> list[Path]:
    """The depth map of every clear image, by the rules above except letters and endings. Raises `UserError`."""
    search = Search(Source(list(clear)), Source(list(depth), name=str(depth[0].parent)), DEPTH)
    return [partner for _, partner in search.pairs()]


def by_stem(paths: Iterable[Path]) -> dict[str, list[Path]]:
    """Group files by name without extension, case folded."""
    return _grouped((path.stem.casefold(), path) for path in paths)


@dataclass
class Source:
    """Files and the folder in which they were found; the files of a list may be anywhere."""

    paths: list[Path]
    root: Path | None = None
    kind: str = "list"
    name: str = ""

    @classmethod
    def of(cls, source: Sources) -> "Source":
        """The files of a source named by the user."""
        if not isinstance(source, str | Path):
            if len(source) == 1:
                return cls.of(source[0])
            return cls(paths.find(source), None, "list", ", ".join(map(str, source)))
        path = paths.resolve(source)
        files = paths.find(source)
        if path.is_dir():
            return cls(files, path, "folder", str(source))
        return cls(files, None, "list" if path.suffix.lower() == ".flist" else "file", str(source))

    def folder(self, path: Path) -> Folder:
        """The folder of a file, relative to that of the source if there is one."""
        parent = path.relative_to(self.root).parent if self.root else Path(os.path.abspath(path)).parent
        return tuple(part.casefold() for part in parent.parts)


class Match(NamedTuple):
    """Possible partners of an image: ``rule`` matched them; ``base`` and ``dropped`` are the parts of the name."""

    rule: tuple[int, Hashable]
    partners: list[Path]
    base: str
    dropped: list[str]
    index: "Index"


class Index:
    """The files of some folders, indexed by name."""

    def __init__(self, paths: Iterable[Path], kind: Kind):
        self.kind = kind
        self.stems = by_stem(paths)
        named = [(stem, path) for stem, paths in self.stems.items() for path in paths]
        self.keys = _grouped((key, path) for stem, path in named for key in _keys(stem, kind.partner_words))
        self.longer = _grouped((start, (rest, path)) for stem, path in named for start, rest in _starts(stem))

    def match(self, stem: str) -> Match | None:
        """The result of the first rule with a match."""
        parts = stem.split("_")
        for left in range(len(parts), 0 if self.kind.endings else len(parts) - 1, -1):
            base = "_".join(parts[:left])
            dropped = parts[left:]
            for rule, partners in self._candidates(base, letters=self.kind.letters and not dropped):
                if partners:
                    rule = (ENDING, len(dropped)) if dropped else rule
                    return Match(rule, list(dict.fromkeys(partners)), base, dropped, self)
        return None

    def _candidates(self, stem: str, letters: bool) -> Iterator[tuple[tuple[int, Hashable], list[Path]]]:
        yield (SAME, ""), self.stems.get(stem, [])
        tokens, *shorter = _keys(stem, self.kind.image_words)
        yield (WORD, ""), [path for key in (tokens, *shorter) for path in self.keys.get(key, [])]
        for one, other in (("a", "b"), ("b", "a")) if letters and len(tokens) > 1 else ():
            if tokens[-1] == one:
                yield (LETTER, f"_{one}"), self.keys.get((*tokens[:-1], other), [])
            if tokens[0] == one:
                yield (LETTER, f"{one}_"), self.keys.get((other, *tokens[1:]), [])


class Search:
    """Searches one source for the partners of the images of another."""

    def __init__(self, images: Source, partners: Source, kind: Kind):
        self.images = images
        self.partners = partners
        self.kind = kind
        self.pools = _grouped((partners.folder(path), path) for path in dict.fromkeys(partners.paths))
        self.members = _grouped((images.folder(path), path) for path in images.paths)
        words = kind.image_words | kind.partner_words
        self.bare = {folder: _bare(folder, words) for folder in (*self.pools, *self.members)}
        self.bare_pools = _grouped((self.bare[folder], folder) for folder in self.pools)
        self.ends = _grouped((self.bare[folder][-1:], folder) for folder in self.members)
        self.pool_ends = _grouped((self.bare[folder][-1:], folder) for folder in self.pools)
        self.indices: dict[tuple[Folder, ...], Index] = {}

    def pairs(self) -> list[Pair]:
        """Every image with its partner. Raises `UserError` if there is none, or two, or an ambiguous one."""
        matches = {path: match for folder in self.members for path, match in self._matches(folder).items()}
        unmatched = [path for path in self.images.paths if matches[path] is None]
        if unmatched:
            raise UserError(self._missing(unmatched))
        for path, match in matches.items():
            if len(match.partners) > 1:
                both = f"{match.partners[0]} and {match.partners[1]}"
                remedy = "keep one, or arrange both sides in the same sub-folders"
                raise UserError(f"{path}: has two {self.kind.name}s, {both}; {remedy}")
        for members in self.members.values():
            _check_rules({path: matches[path] for path in members})
        return [(path, matches[path].partners[0]) for path in self.images.paths]

    def check_lines(self, pairs: Sequence[Pair]) -> list[Pair]:
        """The pairs of two lists by line. Raises `UserError` if a name contradicts them."""
        matches = {path: match for folder in self.members for path, match in self._matches(folder).items()}
        for line, (path, truth) in enumerate(pairs, 1):
            if matches[path] and truth not in matches[path].partners:
                raise UserError(
                    f"{self.partners.name}: not all images pair by name, and by line {path} belongs to {truth} (line "
                    f"{line} of both lists) but by name to {matches[path].partners[0]}; order both lists alike"
                )
        return list(pairs)

    def _matches(self, folder: Folder) -> dict[Path, Match | None]:
        """The match of every image of one folder, in the first group of folders that has any."""
        indices = [self._index(folders) for folders in self._searched(folder)]
        stems = {path: path.stem.casefold() for path in self.members[folder]}
        return {p: next(filter(None, (index.match(stem) for index in indices)), None) for p, stem in stems.items()}

    def _index(self, folders: Sequence[Folder]) -> Index:
        key = tuple(folders)
        if key not in self.indices:
            self.indices[key] = Index([path for folder in folders for path in self.pools[folder]], self.kind)
        return self.indices[key]

    def _searched(self, folder: Folder) -> Iterator[list[Folder]]:
        """The groups of folders to search for the partners of ``folder``, in turn."""
        corresponding = self._corresponding(folder)
        above = [folder[:length] for length in range(len(folder) - 1, -1, -1)]
        yield from filter(None, [corresponding, *(self._corresponding(each) for each in above if each in self.bare)])
        if not corresponding or not folder:
            rest = [each for each in self.pools if not self._belongs_to_another(each) and each not in corresponding]
            if rest:
                yield rest

    def _corresponding(self, folder: Folder) -> list[Folder]:
        """The folders of the same path; or the same except for words such as hazy; or with the same end of the path."""
        if folder in self.pools:
            return [folder]
        bare = self.bare[folder]
        similar = self.bare_pools.get(bare, []) or (self.pool_ends.get(bare[-1:], []) if bare else [])
        if not similar:
            return []
        most = max(_common_end(bare, self.bare[each]) for each in similar)
        return [each for each in similar if _common_end(bare, self.bare[each]) == most == self._longest_end(each)]

    def _longest_end(self, pool: Folder) -> int:
        """The most parts at the end of its path that a folder shares with a folder of the images."""
        bare = self.bare[pool]
        return max((_common_end(bare, self.bare[each]) for each in self.ends.get(bare[-1:], [])), default=0)

    def _belongs_to_another(self, pool: Folder) -> bool:
        return bool(pool) and (pool in self.members or self.bare[pool][-1:] in self.ends)

    def _missing(self, unmatched: list[Path]) -> str:
        source = self.partners.name
        if self.kind.name == DEPTH.name:
            return f"{unmatched[0]}: no depth map {unmatched[0].stem}.* in {source}; add it, or leave depth out"
        return (
            f"{unmatched[0]}: no ground truth in {source} ({len(unmatched)} of {len(self.images.paths)} images have "
            f"none); add it, or name both alike, as 01_hazy and 01_GT (hazy_01, clear_01) or 1400_1 and 1400; "
            f"or give both as .flist files of one length, which pair line by line, or one image and its ground truth"
        )


def _check_rules(matches: dict[Path, Match]) -> None:
    """Raise `UserError` if the names in one folder are ambiguous.

    A shortened name may match the wrong file: frame_002 matches frame, although frame_001 is another ground truth. So
    all files of one folder must match by the same rule, unless the dropped endings are numbers that distinguish
    nothing else.
    """
    if not matches:
        return
    rules = {match.rule for match in matches.values()}
    strict = {match.partners[0] for match in matches.values() if match.rule[0] != ENDING}
    used = {(match.partners[0], match.rule) for match in matches.values()}
    example = next((path for path, match in matches.items() if match.rule == min(rules)), None)
    for path, match in matches.items():
        truth = match.partners[0]
        rule, _ = match.rule
        if rule == LETTER and len(rules) > 1:
            raise UserError(_ambiguous(path, truth, f"{example} is named otherwise"))
        if rule != ENDING:
            continue
        numbered = _is_number(match.dropped[0])
        for rest, other in match.index.longer.get(match.base, []):
            if other != truth and _is_number(rest) == numbered and (other, match.rule) not in used:
                raise UserError(_ambiguous(path, truth, f"there is {other} too"))
        shorter = [start for start, _ in _starts(match.base) if start in match.index.stems]
        if len(rules) > 1 and shorter:  # a_1_0.9 may belong to a_1, or be the first one of a
            raise UserError(_ambiguous(path, truth, f"there is {match.index.stems[shorter[-1]][0]} too"))
        if len(rules) > 1 and (truth in strict or not all(map(_is_number, match.dropped))):
            raise UserError(_ambiguous(path, truth, f"{example} is named otherwise"))


def _ambiguous(path: Path, truth: Path, why: str) -> str:
    return (
        f"{path}: only a part of its name matches its ground truth {truth}, and {why}; rename it, remove it, or give "
        f"both sides as .flist files of one length, which pair line by line"
    )


def _check_distinct(pairs: Sequence[Pair]) -> list[Pair]:
    real = {truth: os.path.realpath(truth) for truth in dict.fromkeys(truth for _, truth in pairs)}
    for hazy, truth in pairs:
        if os.path.realpath(hazy) == real[truth]:
            raise UserError(
                f"{hazy}: hazy image and ground truth are the same file; name two sources, as .flist if in one folder"
            )
    return list(pairs)


def _keys(stem: str, words: frozenset[str]) -> list[Folder]:
    """The parts of a name: all of them, and without each of the ``words`` in turn."""
    tokens = _tokens(stem, words)
    shorter = [tokens[:k] + tokens[k + 1 :] for k, token in enumerate(tokens) if token in words]
    return list(dict.fromkeys([tokens, *shorter]))


def _tokens(name: str, words: frozenset[str]) -> tuple[str, ...]:
    """The parts of a name, split at separators and between one of the ``words`` and a number (hazy01)."""
    for pattern, word in SPELLINGS:
        name = pattern.sub(word, name)
    tokens: list[str] = []
    for piece in re.split("[-_ .]+", name):
        joined = re.fullmatch("([a-z]+)([0-9]+)|([0-9]+)([a-z]+)", piece)
        parts = [part for part in joined.groups() if part] if joined else [piece]
        tokens += parts if any(part in words for part in parts) else [piece]
    return tuple(filter(None, tokens))


def _starts(stem: str) -> Iterator[tuple[str, str]]:
    """Every prefix of a name that ends before a ``_``, and the part that follows."""
    parts = stem.split("_")
    for length in range(1, len(parts)):
        yield "_".join(parts[:length]), parts[length]


def _bare(folder: Folder, words: frozenset[str]) -> Folder:
    """The path of a folder without the words that mark one side."""
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
