"""Progress bars, where somebody watches them, and the one switch that turns them off."""

from __future__ import annotations

import shutil
import sys
import textwrap
import weakref
from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm import tqdm
from tqdm.utils import disp_len

T = TypeVar("T")
_quiet = False
_bars: weakref.WeakSet[tqdm[Any]] = weakref.WeakSet()


class _Bar(tqdm):
    """A bar that can be interrupted at any moment and still be taken away."""

    def __init__(self, *args: Any, delay: float = 0, **options: Any) -> None:
        self._drawn = 0
        # tqdm draws at once, before anybody knows the bar, unless it is to wait; 1e-9 is less than its clock can tell.
        super().__init__(*args, leave=False, dynamic_ncols=True, delay=delay or 1e-9, **options)
        _bars.add(self)
        if not delay:
            self.refresh()

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Draws in one write; tqdm takes three, and between them the cursor is in another line than it believes.

        The cursor ends in front of the bar, so that the ^C of a terminal neither breaks the line nor stays.
        """
        text, rows = str(self) if msg is None else msg, abs(self.pos if pos is None else pos)
        length, before = disp_len(text), self._drawn
        self._drawn = max(length, before)  # whichever of the two an interruption leaves there
        self.fp.write("\n" * rows + "\r" + text + " " * (before - length) + "\r" + "\x1b[A" * rows)
        self.fp.flush()
        self._drawn = length


def set_quiet(quiet: bool) -> None:
    """Turns every progress bar of the process off, or on again."""
    global _quiet
    _quiet = quiet


def track(items: Iterable[T], description: str, total: int | None = None, **options: Any) -> tqdm[T]:
    """Iterates with a progress bar that shows the time left; in a notebook, only where no other bar is open."""
    hidden = not (_terminal() or (in_notebook() and not _open()))
    return _Bar(items, desc=description, total=total, disable=_quiet or hidden, **options)


def announce(description: str) -> tqdm[None]:
    """A context manager that shows a line of text, for work whose steps cannot be counted."""
    hidden = _quiet or not _terminal()
    return _Bar(desc=description, bar_format="{desc} ...", disable=hidden)


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
