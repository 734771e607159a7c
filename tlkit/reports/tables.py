"""Tables for people: as Markdown, and the numbers in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Table(NamedTuple):
    """A table for people.

    Args:
        title: Above it.
        columns: Titles.
        rows: Cells as text.
        notes: Lines below it.
    """

    title: str
    columns: Sequence[str]
    rows: list[list[str]]
    notes: Sequence[str] = ()


def as_markdown(table: Table) -> str:
    """The table in GitHub's Markdown; numbers stand on the right."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (table.columns, *table.rows)]
    right = [is_number(column) for column in zip(*table.rows, strict=True)] or [False] * len(table.columns)
    ruler = ["--:" if number else "---" for number in right]
    return "".join(f"| {' | '.join(row)} |\n" for row in (cells[0], ruler, *cells[1:]))


def is_number(cells: Sequence[str]) -> bool:
    """Whether a column holds numbers, so that it stands on the right."""
    return any(cell[:1].isdigit() for cell in cells) and all(cell[:1].isdigit() or cell == "-" for cell in cells)


def short(number: float) -> str:
    """Four digits and a decimal prefix: 4089184256 is ``4.089 G``."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * factor:
            return f"{number / factor:.3f} {prefix}"
    return f"{number} "
