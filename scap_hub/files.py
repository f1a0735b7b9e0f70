"""Files that are whole or absent."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write a file to; when all went well it takes the place of `path`, in one step.

    Whoever is interrupted while it is written finds `path` as it was before.

    Args:
        path: The file to make or to replace; its folder is made if absent.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        yield unfinished
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())  # else a power cut can leave the new name with nothing behind it
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
