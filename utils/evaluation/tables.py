"""The figures of a scoring run as tables, for a terminal and in Markdown, with their protocols."""

import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from utils import columns
from utils.evaluation import scoring
from utils.evaluation.results import HAZY, Row, describe, keys

MEBIBYTE = 2**20


def text(rows: Sequence[Row], results: Mapping) -> str:
    """The figures of every set, starting with its hazy input, the times, and the protocols, for a terminal."""
    lines = []
    for name, members in _by_set(rows).items():
        title = f"{name}: " if members[0].expected is not None else ""  # the user's own images have no name
        lines += ["", title + image_count(members[0].count), *_screen_table(members)]
        lines += [line for row in members for line in _notes(row)]
    lines += [line for each in results["protocols"].values() for line in _protocol(each)]
    return "\n".join(lines[1:])


def markdown(rows: Sequence[Row], results: Mapping) -> str:
    """The figures as Markdown tables, one for each protocol, sets side by side; then settings, cost and protocols."""
    parts = [_figures_table(rows, name, [f"{name}.psnr", f"{name}.ssim"]) for name in results["protocols"]]
    extra = [key for key in results["metrics"] if "." not in key]
    parts += [_figures_table(rows, None, [key]) for key in extra]
    parts.append(_cost_table(rows, results["methods"]))
    notes = [
        f"- protocol `{p['name']}`: {p['pixels']}. PSNR: {p['psnr']}. SSIM: {p['ssim']}."
        for p in results["protocols"].values()
    ]
    notes += [f"- {results['metrics'][key]['title']}: {results['metrics'][key]['source']}." for key in extra]
    notes += [f"- {name}: {remark}" for name, members in _by_set(rows).items() for remark in members[0].remarks]
    notes += [f"- {row.benchmark}, {row.method}: {note}" for row in rows for note in _exceptions(row)]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    notes.append(f"- {results['device']}, {results['settings']['precision']}; {versions}.")
    return "\n\n".join([*filter(None, parts), "\n".join(notes)]) + "\n"


def image_count(count: int | str) -> str:
    """``1 image``, ``24 images``, ``60 of 500 images``."""
    return "1 image" if count in (1, "1") else f"{count} images"


def pace(rows: Sequence[Row]) -> str:
    """The time for the images of all methods, in total and each; empty if there were none."""
    rows = [row for row in rows if row.method != HAZY]
    seconds = sum(row.outcome.seconds["wall"] for row in rows)
    count = sum(len(row.outcome.scores) - row.resumed for row in rows)
    return f" in {seconds:.1f} s ({seconds / count:.2f} s each)" if count else ""


def _screen_table(members: Sequence[Row]) -> list[str]:
    """The methods on one set; the names of protocols are above their PSNR and SSIM."""
    shown = keys(members)
    width = max(len(row.method) for row in members)
    heads = [f"{_title(key):>6}" for key in shown]
    protocols = ""
    column = width
    for key, head in zip(shown, heads, strict=True):
        if key.endswith(".psnr"):
            protocols = f"{protocols:{column + 2}}{key.removesuffix('.psnr')}"
        column += 2 + len(head)
    lines = [protocols] if protocols else []
    lines.append("  ".join([" " * width, *heads, "  s/image", "  images/s"]))
    for row in members:
        mean = scoring.mean(row.outcome.scores)
        cells = [f"{_number(key, mean.get(key)):>{len(head)}}" for key, head in zip(shown, heads, strict=True)]
        if row.method != HAZY and row.outcome.scores:
            cells += [f"{scoring.median_seconds(row.outcome.scores):9.3f}", f"{row.per_second:10.2f}"]
        lines.append("  ".join([f"{row.method:{width}}", *cells]).rstrip())
    return lines


def _figures_table(rows: Sequence[Row], protocol: str | None, figures: Sequence[str]) -> str:
    """A row for each method, a column for each set that has any of these figures."""
    cells = {(row.method, row.benchmark): scoring.mean(row.outcome.scores) for row in rows}
    sets = {name: members for name, members in _by_set(rows).items() if set(figures) & set(keys(members))}
    if not sets:
        return ""
    title = " / ".join(_title(key) for key in figures)
    head = f"{title}, protocol `{protocol}`" if protocol else f"{title} ({describe(figures[0])['better']} is better)"
    table = [[head, *(f"{name} ({members[0].count})" for name, members in sets.items())]]
    for method in dict.fromkeys(row.method for row in rows):
        shown = [[_number(key, cells.get((method, name), {}).get(key)) for key in figures] for name in sets]
        table.append([method, *(" / ".join(filter(None, pair)) for pair in shown)])
    return "\n".join(columns.markdown(table))


def _cost_table(rows: Sequence[Row], methods: Mapping[str, dict]) -> str:
    """The settings in force and the cost, for each set and method."""
    table = [["set", "method", "settings", "s/image", "images/s", "peak memory", "parameters", "MACs at 256x256"]]
    for row in rows:
        if row.method == HAZY:
            continue
        cost = methods[row.method]
        settings = ", ".join(f"{key} {_text(value)}" for key, value in row.settings.items())
        speed = [f"{scoring.median_seconds(row.outcome.scores):.3f}", f"{row.per_second:.2f}"]
        memory = f"{row.peak_memory / MEBIBYTE:,.0f} MiB" if row.peak_memory else "-"
        size = (
            [f"{cost['parameters'] / 1e6:.2f} M", f"{cost['macs_256'] / 1e9:.2f} G"]
            if cost["parameters"]
            else ["0", "-"]
        )
        table.append([f"{row.benchmark} ({row.count})", row.method, settings, *speed, memory, *size])
    return "\n".join(columns.markdown(table))


def _notes(row: Row) -> list[str]:
    """Lines below a set's table: the time by stage, and the images that are not in the means."""
    lines = [f"  {row.method}: {note}" for note in _exceptions(row)]
    seconds = row.outcome.seconds
    if row.method != HAZY and seconds["wall"]:
        stages = ", ".join(f"{stage} {seconds[stage]:.1f}" for stage in scoring.STAGES)
        waiting = seconds["waiting"] / seconds["wall"]
        lines.append(f"  {row.method}: {seconds['wall']:.1f} s; in seconds, {stages}; dehazing waited {waiting:.0%}")
    return lines


def _exceptions(row: Row) -> list[str]:
    counts = scoring.left_out(row.outcome.scores).items()
    lines = [f"left out of the mean {key}: {count}, infinite or undefined" for key, count in counts]
    if row.outcome.skipped:
        count = image_count(len(row.outcome.skipped))
        lines.append(f"{count} could not be used; figures and times do not include them")
    if "tile" in row.settings:
        lines.append(f"in cross-faded tiles of {row.settings['tile']}, so not the figures of whole images")
    if row.resumed:
        verb = "is" if row.resumed == 1 else "are"
        lines.append(f"{image_count(row.resumed)} {verb} from an interrupted run, which this one continued")
    return lines


def _protocol(each: Mapping[str, str]) -> list[str]:
    lines = [f"protocol {each['name']}: {each['pixels']}", f"  PSNR: {each['psnr']}", f"  SSIM: {each['ssim']}"]
    return ["", *(part for line in lines for part in textwrap.wrap(line, 110, subsequent_indent=" " * 8))]


def _by_set(rows: Sequence[Row]) -> dict[str, list[Row]]:
    sets = defaultdict(list)
    for row in rows:
        sets[row.benchmark].append(row)
    return dict(sets)


def _title(key: str) -> str:
    shown = describe(key)
    return f"{shown['title']} ({shown['unit']})" if shown["unit"] else shown["title"]


def _number(key: str, value: float | None) -> str:
    return "" if value is None else f"{value:.{describe(key)['digits']}f}"


def _text(value: Any) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
