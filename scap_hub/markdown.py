"""Text of others in Markdown: names that cannot be taken for markup, and metadata that may be broken."""

from __future__ import annotations

import re
from typing import Any

import yaml


def escaped(text: object) -> str:
    """A name as running text, in one line: nothing in it is read as Markdown or HTML."""
    return re.sub(r"[\\`*\[\]<>|~$&]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", " ".join(str(text).split()))


def code(text: object) -> str:
    """A name as code, in one line that may stand in a table."""
    line = " ".join(str(text).split())
    fence = "`" * (_longest_run(line) + 1)
    space = " " if line.startswith("`") or line.endswith("`") else ""
    # A table takes a bar for the end of a cell, in code too.
    return f"{fence}{space}{line}{space}{fence}".replace("|", r"\|")


def fenced(text: str, language: str) -> str:
    """A block of code, whatever it holds."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def metadata(card: str) -> tuple[dict[str, Any], str]:
    """Metadata and text of a card; a card whose metadata cannot be read has text only."""
    found = re.match(r"\s*---\r?\n(.*?)\r?\n---\s*(?:\r?\n|$)(.*)", card, re.DOTALL)
    if not found:
        return {}, card
    try:
        data = yaml.safe_load(found[1]) or {}
    except (yaml.YAMLError, ValueError, RecursionError):  # also of dates and numbers that do not exist
        data = None
    return (data, found[2]) if isinstance(data, dict) else ({}, found[2])


def _longest_run(text: str) -> int:
    """Length of the longest run of backticks."""
    return max(map(len, re.findall("`+", text)), default=0)
