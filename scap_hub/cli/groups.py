"""Channel groups as a tree that fits into a terminal of 80 columns."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

_BAR = 10
_FIGURES = 18 + _BAR
_SIGNS = " ▏▎▍▌▋▊▉█"


def print_groups(rows: Sequence[Mapping[str, Any]], blocks: bool) -> None:
    """Prints groups, a line each; names that do not fit go on in the next line.

    Args:
        rows: As `scap-hub inspect --json` gives them.
        blocks: Whether groups stand under the block of the network that they are in, with the block's MACs.
    """
    signs = _signs()
    columns = max(shutil.get_terminal_size((80, 24)).columns, 50)
    width = min(columns - _FIGURES, max((len(row["name"]) + 2 for row in rows), default=0))
    print("\n".join(_lines(rows, blocks, width, columns, signs)))


def _lines(rows: Sequence[Mapping[str, Any]], blocks: bool, width: int, columns: int, signs: str) -> Iterator[str]:
    most = max((row["macs"] for row in rows), default=0.0) or 1.0
    yield f"{'group':<{width}}{'channels':>10}{'MACs':>7}"
    for block, members in groupby(rows, key=lambda row: _block(row["name"]) if blocks else ""):
        own = list(members)
        indent = ""
        if block and (len(own) > 1 or own[0]["name"] != block):
            yield f"{block:<{width}}{'':>10}{sum(row['macs'] for row in own):>7.1%}"
            indent = "  "
        for row in own:
            *begun, name = _folded(row["name"], width - len(indent))
            yield from (indent + part for part in begun)
            bar = _bar(row["macs"] / most, signs)
            yield f"{indent + name:<{width}}{row['size']:>10}{row['macs']:>7.1%} {bar}".rstrip()
            note = f"whole: it {row['pinned_because']}" if row["pinned_because"] else "; ".join(row["constraint"])
            yield from textwrap.wrap(note, columns, initial_indent=indent + "    ", subsequent_indent=indent + "    ")
    free = sum(row["prunable"] for row in rows)
    last = f"{len(rows)} groups, {free} can be pruned; --wide and --json tell which layers compute each"
    yield from textwrap.wrap(last, columns)


def _block(name: str) -> str:
    """The part of the network that a group is in: "layer1.0", or "stem" where blocks are not numbered."""
    parts = name.partition("#")[0].split(".")
    return ".".join(parts[: 2 if len(parts) > 2 and parts[1].isdigit() else 1])


def _folded(name: str, width: int) -> list[str]:
    """A name in parts that fit, cut behind dots where it can be; nothing of it is lost."""
    parts = []
    while len(name) > width:
        cut = name.rfind(".", 1, width) + 1 or width
        parts.append(name[:cut])
        name = name[cut:]
    return [*parts, name]


def _signs() -> str:
    """Those of a bar, from an empty place to a full one; plain ones where the output has no others."""
    try:
        _SIGNS.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return " #"
    return _SIGNS


def _bar(share: float, signs: str) -> str:
    parts = len(signs) - 1
    filled = round(parts * _BAR * share)
    return signs[-1] * (filled // parts) + signs[filled % parts].strip()
