"""Tables as text and as HTML, for what shows itself in a terminal or a notebook."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from html import escape

LINES = 18
"""Of a table that stands for an object; what does not fit is counted in the last one."""
WIDTH = 100
"""Of a line of text below it."""

Row = Sequence[object]


def text_table(rows: Sequence[Row]) -> str:
    """Rows in aligned columns, a few lines of them."""
    shown = [[" ".join(str(cell).split()) for cell in row] for row in rows[: _shown(rows)]]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in shown]
    return "\n".join([*lines, *_rest(rows)])


def in_lines(notes: Sequence[str]) -> list[str]:
    """Sentences in lines that fit a terminal and a notebook."""
    return [line for note in notes for line in textwrap.wrap(note, WIDTH)]


def html_table(title: str, head: Row, rows: Sequence[Row], notes: Sequence[str] = ()) -> str:
    """The same as HTML, with sentences below; markup in a cell is text."""
    columns = "".join(f"<th style='text-align:left'>{escape(str(cell))}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td style='text-align:left'>{escape(str(cell))}</td>" for cell in row) + "</tr>"
        for row in rows[: _shown(rows)]
    )
    rest = "".join(f"<p>{line}</p>" for line in [*_rest(rows), *map(escape, notes)])
    return f"<p><b>{escape(title)}</b></p><table><thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table>{rest}"


def _shown(rows: Sequence[Row]) -> int:
    return len(rows) if len(rows) <= LINES else LINES - 1


def _rest(rows: Sequence[Row]) -> list[str]:
    left = len(rows) - _shown(rows)
    return [f"... and {left} more"] if left else []
