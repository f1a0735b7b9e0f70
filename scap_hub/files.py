"""Files and folders that are whole or absent."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil

from scap_hub.errors import ScapHubError

_HOST = re.sub(r"[^\w-]", "_", socket.gethostname())
_ASIDE = re.compile(r"\..+\.(?P<host>[\w-]+)\.(?P<pid>\d+)\.unfinished(\.\w+)?")


def path_of(name: str | Path) -> Path:
    """A path that a user gave, `~` resolved; there need be nothing.

    Raises:
        ScapHubError: It can be no path: it is blank, too long, or in the home of nobody.
    """
    if not str(name).strip():
        raise ScapHubError(f"{str(name)!r} is blank, where the name of a file or folder should be")
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:
        raise ScapHubError(f"{str(name)!r} is no path: {getattr(error, 'strerror', None) or error}") from error
    return path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path to write to, and moves that file to `path` in one step when the block ends.

    If the block raises or the process is interrupted, `path` is as it was before.

    Args:
        path: The file to create or replace; its folder is created if absent.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(path.parent, path.stem)
    # Some libraries choose the format by the suffix, so it stays.
    unfinished = path.with_name(f".{path.stem}.{_HOST}.{os.getpid()}.unfinished{path.suffix}")
    try:
        yield unfinished
        _sync(unfinished)
        unfinished.replace(path)
        _sync(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def making(folder: Path) -> Iterator[Path]:
    """A new folder to write files to; when all went well it becomes `folder`, in one step.

    Whoever is interrupted while it is written finds `folder` absent, or empty as it was before.

    Args:
        folder: Absent or empty; the one that it lies in is made if absent.
    """
    clear_leftovers(folder.parent, folder.name)
    unfinished = _aside(folder)
    try:
        # A container that is started again has the same name and number.
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        yield unfinished
        for path in [*unfinished.rglob("*"), unfinished]:
            _sync(path)
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def discard(folder: Path, name: str) -> None:
    """Removes a folder that was kept for something of that name beside it.

    It is gone in one step: whoever is killed meanwhile leaves what `clear_leftovers` removes, never half of it.
    """
    with contextlib.suppress(OSError):
        folder = folder.rename(_aside(folder.with_name(name)))
    shutil.rmtree(folder, ignore_errors=True)


def clear_leftovers(folder: Path, name: str) -> None:
    """Removes what processes of this machine that are gone left in a folder while they wrote something of that name."""
    for path in folder.glob(f".{_literal(name)}.*.unfinished*"):
        found = _ASIDE.fullmatch(path.name)
        if found is None or found["host"] != _HOST or psutil.pid_exists(int(found["pid"])):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _aside(folder: Path) -> Path:
    """Where this process puts a folder of that name while it is not whole."""
    return folder.with_name(f".{folder.name}.{_HOST}.{os.getpid()}.unfinished")


def _literal(name: str) -> str:
    """A glob pattern that matches this name alone."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _sync(path: Path) -> None:
    """Waits until a file or folder is on the disk; else a power cut can leave a new name with nothing behind it."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders
    number = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(number)
    finally:
        os.close(number)
