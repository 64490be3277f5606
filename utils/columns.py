"""Rows of cells as a table: in Markdown, or aligned for a terminal."""

from collections.abc import Iterable, Sequence


def markdown(rows: Iterable[Sequence[str]], numbers: bool = False) -> list[str]:
    """The lines of a Markdown table; the first of ``rows`` is its head. ``numbers``: align all but the first right."""
    head, *body = ([cell.strip().replace("|", "\\|") for cell in row] for row in rows)
    rule = ["---", *["---:" if numbers else "---"] * (len(head) - 1)]
    return [f"| {' | '.join(row)} |" for row in (head, rule, *body)]


def aligned(rows: Iterable[Sequence[str]], sides: str = "", indent: str = "") -> list[str]:
    """The lines of a table in which every column is as wide as its widest cell.

    ``sides`` has ``<`` or ``>`` for each column, flush left or right; by default only the first is flush left.
    """
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = sides or "<" + ">" * (len(widths) - 1)
    lines = []
    for row in rows:
        cells = [f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)]
        lines.append((indent + "  ".join(cells)).rstrip())
    return lines
