"""Writes files so that they are either complete or as they were before."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path to write to, and moves that file to `path` in one step when the block ends.

    If the block raises or the process is interrupted, `path` is as it was before.

    Args:
        path: The file to create or replace; its folder is created if absent.
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
