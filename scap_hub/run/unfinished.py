"""What a run keeps on disk until its result is saved: a hidden folder beside the output, for one run at a time."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from scap_hub.errors import CheckpointError, PublishError, ScapHubError, VerificationError
from scap_hub.files import clear_leftovers, discard, replacing
from scap_hub.hub.checkpoint import check_output, placed
from scap_hub.page import FAMILY, REPORT
from scap_hub.run.identity import differences
from scap_hub.run.kept import ADVICE, damaged
from scap_hub.training.distributed import accelerator, from_main

_LOCK, _HOLDER, _RUN, _SAVED = "lock", "holder.json", "run.json", "saved.json"
_ORPHANS = 20.0
"""Seconds in which the loader processes of a killed run notice that it is gone, and let go of its lock."""


class Unfinished:
    """The hidden folder of one run.

    Attributes:
        output: Where the result will be saved.
        folder: Where everything is kept until then.
        fresh: Whether nothing of an earlier call is taken up.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output.with_name(f".{output.name}.unfinished")
        self.fresh = True

    def begin(self, identity: Mapping[str, Any], restart: bool, need: int, changeable: Collection[str] = ()) -> None:
        """Takes up what the same run has kept, or begins; call it before any work, on all processes.

        Args:
            identity: What the run is.
            restart: Whether to throw away what is kept.
            need: Bytes that the run will keep at most.
            changeable: Names in the identity that may have other values, as what follows from them is kept under names
                of its own; not once the result is saved.

        Raises:
            CheckpointError: What is kept is of another run, or the disk is too full.
        """
        self.fresh = from_main(lambda: self._begin(identity, restart, need, changeable))

    def _begin(self, identity: Mapping[str, Any], restart: bool, need: int, changeable: Collection[str]) -> bool:
        if restart:
            _clear(self.folder)
        path = self.folder / _RUN
        if path.is_file():
            self._check(path, identity, () if self.saved else changeable)
            _clear(self.folder, leftovers=True)
            self._note(path, identity)
            return False
        if any(file.name not in (_LOCK, _HOLDER) for file in self.folder.iterdir()):
            raise CheckpointError(f"{str(self.folder)!r} was left by another version of scap_hub; {ADVICE}")
        free = shutil.disk_usage(self.folder).free
        if free < need:
            raise CheckpointError(
                f"the run needs up to {need / 1e6:,.0f} MB beside {str(self.output)!r}, and {free / 1e6:,.0f} MB are "
                "free; make room, or choose another output folder"
            )
        self._note(path, identity)
        return True

    def _note(self, path: Path, identity: Mapping[str, Any]) -> None:
        with replacing(path) as unfinished:
            unfinished.write_text(json.dumps(identity, indent=1), encoding="utf-8")

    def _check(self, path: Path, identity: Mapping[str, Any], changeable: Collection[str]) -> None:
        try:
            theirs = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise damaged(path, error) from error
        if found := differences(*({k: own[k] for k in own if k not in changeable} for own in (theirs, identity))):
            more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
            raise CheckpointError(
                f"an unfinished run with the same output differs: {'; '.join(found[:5])}{more}; repeat its command to "
                f"go on, {ADVICE}, or choose another output folder"
            )

    @property
    def saved(self) -> bool:
        """Whether the output is what this run has saved: it was killed before it could clean up."""
        with contextlib.suppress(OSError):
            saved = (self.folder / _SAVED).read_bytes()
            for name in (REPORT, FAMILY):
                with contextlib.suppress(OSError):
                    return saved == (self.output / name).read_bytes()
        return False

    def saving(self, document: str) -> None:
        """Remembers how the result will be known again, by its report.json or family.json; call it before saving."""
        with replacing(self.folder / _SAVED) as unfinished:
            unfinished.write_text(document, encoding="utf-8")


@contextlib.contextmanager
def kept_beside(output_dir: str | Path | None, restart: bool = False) -> Iterator[Unfinished | None]:
    """The hidden folder of a run, which no other run can use meanwhile; None where nothing is saved.

    It goes when the run ends well, and when a run that began anew ends with a mistake of the user before any training.
    After anything else it stays, so that the same call takes up there; also after a verification that failed, which
    another recipe may avoid, when the disk is full, where room can be made, and when publishing failed.

    Args:
        output_dir: Where the result will be saved; None to save nothing.
        restart: Whether what is kept will be thrown away.

    Raises:
        CheckpointError: The output holds something else, cannot be made, or another run writes there.
    """
    if output_dir is None:
        yield None
        return
    work = Unfinished(placed(output_dir))
    lock = FileLock(work.folder / _LOCK, thread_local=False)
    missing = from_main(lambda: _enter(work, lock, restart))
    try:
        yield work
    except ScapHubError as error:
        lasting = isinstance(error, VerificationError | CheckpointError | PublishError)
        begun = (work.folder / _RUN).exists() and lasting
        if not begun and accelerator().is_main_process and work.fresh and not any(work.folder.rglob("training-*")):
            _remove(work, missing)
        raise
    else:
        from_main(lambda: _remove(work, missing))
    finally:
        lock.release()


def check_free(output_dir: str | Path) -> None:
    """Makes sure that a result could be saved there, without writing anything.

    Raises:
        CheckpointError: The output holds something else, or cannot be replaced.
    """
    check_output(placed(output_dir))


def _enter(work: Unfinished, lock: FileLock, restart: bool) -> list[Path]:
    """Makes the hidden folder and locks it; returns the folders above it that were missing, the lowest first."""
    clear_leftovers(work.output.parent, work.output.name)
    if restart or not work.saved:
        check_output(work.output)
    missing = [folder for folder in work.folder.parents if not folder.exists()]
    try:
        work.folder.mkdir(parents=True, exist_ok=True)
        _acquire(work, lock)
        if restart or not work.saved:
            check_output(work.output)  # again: the run that held the lock may have saved
        work.fresh = not (work.folder / _RUN).exists()
        holder = {"pid": os.getpid(), "host": socket.gethostname()}
        (work.folder / _HOLDER).write_text(json.dumps(holder), encoding="utf-8")
    except OSError as error:
        lock.release()
        _remove_empty(missing)
        raise CheckpointError(f"cannot write beside output folder {str(work.output)!r}: {error.strerror}") from error
    except CheckpointError:
        lock.release()
        raise
    return missing


def _acquire(work: Unfinished, lock: FileLock) -> None:
    """Takes the lock. The system frees that of a process that is gone, so no lock is ever stale."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        pid, host = _holder(work.folder)
        try:
            if host != socket.gethostname() or pid is None or psutil.pid_exists(pid):
                raise
            lock.acquire(timeout=_ORPHANS)
        except Timeout:
            raise CheckpointError(
                f"another run (process {pid} on {host}) is writing to {str(work.output)!r}: wait for it, end it, or "
                "choose another output folder"
            ) from None


def _holder(folder: Path) -> tuple[int | None, str | None]:
    """Process and machine that hold the lock, as far as they say so."""
    try:
        holder = json.loads((folder / _HOLDER).read_text(encoding="utf-8"))
        return int(holder["pid"]), str(holder["host"])
    except (OSError, ValueError, KeyError, TypeError):
        return None, None


def _clear(folder: Path, leftovers: bool = False) -> None:
    """Empties the folder but for its lock, or removes only what was being written when a run was killed."""
    for path in sorted(folder.rglob(".*.unfinished*")) if leftovers else list(folder.iterdir()):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name not in (_LOCK, _HOLDER):
            path.unlink(missing_ok=True)


def _remove(work: Unfinished, missing: list[Path]) -> None:
    """Removes the folder, and those above it that were made for it and hold nothing else."""
    discard(work.folder, work.output.name)
    _remove_empty(missing)


def _remove_empty(folders: list[Path]) -> None:
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()
