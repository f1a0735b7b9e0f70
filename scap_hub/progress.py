"""Progress bars, where somebody watches them, and the one switch that turns them off."""

from __future__ import annotations

import shutil
import sys
import textwrap
import weakref
from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")
_quiet = False
_bars: weakref.WeakSet[tqdm[Any]] = weakref.WeakSet()


class _Bar(tqdm):
    """A bar that leaves room for the ^C that a terminal writes behind it; a broken line would not be taken away."""

    @property
    def format_dict(self) -> Any:
        found = super().format_dict
        return found if found["ncols"] is None else {**found, "ncols": found["ncols"] - 2}


def set_quiet(quiet: bool) -> None:
    """Turns every progress bar of the process off, or on again."""
    global _quiet
    _quiet = quiet


def track(items: Iterable[T], description: str, total: int | None = None, **options: Any) -> tqdm[T]:
    """Iterates with a progress bar that shows the time left; in a notebook, only where no other bar is open."""
    hidden = not (_terminal() or (in_notebook() and not _open()))
    bar = _Bar(
        items, desc=description, total=total, disable=_quiet or hidden, leave=False, dynamic_ncols=True, **options
    )
    _bars.add(bar)
    return bar


def announce(description: str) -> tqdm[None]:
    """A context manager that shows a line of text, for work whose steps cannot be counted."""
    hidden = _quiet or not _terminal()
    bar = _Bar(desc=description, bar_format="{desc} ...", disable=hidden, leave=False, dynamic_ncols=True)
    _bars.add(bar)
    return bar


def tell(line: str) -> None:
    """Writes a line that stays, above the bars; to standard error, so that it stands in a log as well."""
    if not _quiet:
        tqdm.write(_folded(line) if _terminal() else line, file=sys.stderr)


def tell_stage(name: str, seconds: float) -> None:
    """Writes what a stage took, in notebooks, where it is all that stays of it."""
    if in_notebook():
        tell(f"{name:<18} {seconds:8.1f} s")


def clear_bars() -> None:
    """Takes away the bars that are still there, such as those that an error has cut short."""
    for bar in _open():
        bar.leave = False
        bar.close()


def in_notebook() -> bool:
    """Whether a Jupyter kernel runs this."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and "IPKernelApp" in shell.config


def _open() -> list[tqdm[Any]]:
    # The innermost first: it is the lowest on the screen.
    return sorted((bar for bar in _bars if not bar.disable), key=lambda bar: -abs(bar.pos))


def _folded(text: str) -> str:
    """Lines that a terminal need not break inside of words."""
    columns = shutil.get_terminal_size().columns
    return "\n".join(textwrap.fill(line, columns, subsequent_indent="  ") for line in text.splitlines())


def _terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()
