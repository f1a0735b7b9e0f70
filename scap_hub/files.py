"""Files and folders that are whole or absent."""

from __future__ import annotations

import contextlib
import os
import shutil
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
    # Some libraries choose the format by the suffix, so it stays.
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}.unfinished{path.suffix}")
    try:
        yield unfinished
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())  # else a power cut can leave the new name with nothing behind it
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def making(folder: Path) -> Iterator[Path]:
    """A new folder to write files to; when all went well it becomes `folder`, in one step.

    Whoever is interrupted while it is written finds `folder` absent, or empty as it was before.

    Args:
        folder: Absent or empty; the one that it lies in is made if absent.
    """
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.unfinished")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        for path in unfinished.iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
