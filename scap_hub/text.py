"""Words for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

_LONGEST = 100
"""Characters of a value that a message shows whole."""


def did_you_mean(name: object, names: Iterable[str], cutoff: float = 0.6) -> str:
    """The nearest of some names as the end of a sentence, "; did you mean 'resnet18'?"; empty if none is near.

    Args:
        name: What was written.
        names: What could have been meant.
        cutoff: How alike the nearest must be, 0 to 1.
    """
    near = difflib.get_close_matches(str(name), list(names), n=1, cutoff=cutoff)
    return f"; did you mean {near[0]!r}?" if near else ""


def one_line(error: Exception) -> str:
    """The first line of an error that somebody else raised."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def shown(value: object) -> str:
    """What a user gave, as Python writes it; of a long one the two ends."""
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]}...{text[-_LONGEST // 4 :]}"


def first_few(problems: Sequence[str]) -> str:
    """The first three, and how many more there are."""
    more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
    return ", ".join(problems[:3]) + more


def count(value: float) -> str:
    """A large number in short: 4.09 G."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {letter}" if value < 999.5 * size else f"{value / size:,.0f} {letter}"
    return f"{value:g}"


def counted(number: int, noun: str) -> str:
    """A number of things whose plural ends in s: "1 epoch", "2 epochs"."""
    return f"{number} {noun}{'s' * (number != 1)}"
