"""Progress bars, and the one switch that turns them off."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")
_quiet = False


def set_quiet(quiet: bool) -> None:
    """Turns every progress bar of the process off, or on again."""
    global _quiet
    _quiet = quiet


def track(items: Iterable[T], description: str, total: int | None = None, **options: Any) -> tqdm[T]:
    """Iterates with a progress bar that shows the time left."""
    return tqdm(items, desc=description, total=total, disable=_quiet, leave=False, dynamic_ncols=True, **options)


def announce(description: str) -> tqdm[None]:
    """A context manager that shows a line of text, for work whose steps cannot be counted."""
    return tqdm(desc=description, bar_format="{desc} ...", disable=_quiet, leave=False, dynamic_ncols=True)


def tell(line: str) -> None:
    """Writes a line that stays, above the bars; to standard error, so that it stands in a log as well."""
    if not _quiet:
        tqdm.write(line, file=sys.stderr)
