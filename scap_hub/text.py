"""Parts of error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: object, names: Iterable[str]) -> str:
    """Suggests a name for the end of an error message, such as "; did you mean 'resnet18'?".

    Args:
        name: What the user wrote.
        names: All valid names.

    Returns:
        The suggestion with the nearest valid name, or "" if none is near.
    """
    near = difflib.get_close_matches(str(name), list(names), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
