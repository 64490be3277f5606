"""Rows of cells as a table: in Markdown, or aligned for a terminal."""

from collections.abc import Iterable, Sequence


def markdown(rows: Iterable[Sequence[str]], numbers: bool = False) -> list[str]:
    """The lines of a Markdown table, whose head is the first of ``rows``. ``numbers``: all columns but one go right."""
    head, *body = ([cell.strip().replace("|", "\\|") for cell in row] for row in rows)
    rule = ["---", *["---:" if numbers else "---"] * (len(head) - 1)]
    return [f"| {' | '.join(row)} |" for row in (head, rule, *body)]


def aligned(rows: Iterable[Sequence[str]], sides: str = "", indent: str = "") -> list[str]:
    """The lines of a table in which every column is as wide as its widest cell.

    ``sides`` has one of ``<`` and ``>`` for each column, flush left or right; by default the first alone goes left.
    """
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = sides or "<" + ">" * (len(widths) - 1)
    lines = []
    for row in rows:
        cells = [f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)]
        lines.append((indent + "  ".join(cells)).rstrip())
    return lines
