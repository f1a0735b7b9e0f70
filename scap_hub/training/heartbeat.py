"""Processes of one run watch each other: a lost or frozen one ends the run, which says so once.

Each process has a thread that counts in the store which torchrun keeps for its workers, and reads the others' counts.
A process that works, however long, goes on counting. One that is stopped, killed, or on a lost machine does not.
"""

from __future__ import annotations

import functools
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from typing import Any, NoReturn

import psutil
from torch import distributed

PERIOD = 2.0
"""Seconds between two counts."""
STOPPED, SILENT = 20.0, 60.0
"""Seconds without a count after which a process is given up: one that is seen to be stopped, and any other."""
PATIENCE = timedelta(hours=6)
"""How long processes that are alive wait for each other, such as for the main one at its work."""
_LEFT = b"left"


@functools.cache
def store() -> Any:
    """What torchrun keeps for its workers, over a connection of our own; None without torchrun, or for one process."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    opened = distributed.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=SILENT)
    )
    attempt = f"{os.environ.get('TORCHELASTIC_RUN_ID')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}"
    return distributed.PrefixStore(f"scap_hub/{attempt}", opened)


def first_to_tell() -> bool:
    """Whether this process is the one that says why the run ends; without a store, whether it is the main one."""
    try:
        if (kept := store()) is not None:
            return kept.add("told", 1) == 1
    except RuntimeError:  # the launcher is gone
        pass
    return os.environ.get("RANK", "0") == "0"


class Heartbeat(threading.Thread):
    """Counts for this process, and watches the others."""

    def __init__(self, kept: Any, rank: int, ranks: int) -> None:
        super().__init__(daemon=True, name="heartbeat")
        self.store, self.rank, self.ranks = kept, rank, ranks
        self._ended = threading.Event()
        self._where: dict[int, tuple[str, int]] = {}
        self._counts: dict[int, bytes] = {}
        self._silence = dict.fromkeys(range(ranks), 0.0)
        kept.set(f"where/{rank}", f"{socket.gethostname()} {os.getpid()}")
        kept.set(f"count/{rank}", "0")

    def run(self) -> None:
        """Until the process ends."""
        count, failing, before = 0, 0.0, time.monotonic()
        while not self._ended.wait(PERIOD):
            # Seconds in which this process itself was stopped say nothing about the others.
            passed, before = min(time.monotonic() - before, 2 * PERIOD), time.monotonic()
            count += 1
            try:
                self.store.set(f"count/{self.rank}", str(count))
                lost, failing = self.lost(passed), 0.0
            except RuntimeError:
                lost, failing = None, failing + passed
            if failing > SILENT and not self._ended.is_set():
                lost = f"the launcher on {os.environ['MASTER_ADDR']} no longer answers"
            if lost is not None and not self._ended.is_set():
                end(lost)

    def leave(self) -> None:
        """Says that this process ends as it should."""
        self._ended.set()
        self.join(2 * PERIOD)  # an interpreter that ends must not find it in the middle of a call
        try:
            self.store.set(f"count/{self.rank}", _LEFT.decode())
        except RuntimeError:
            return  # the launcher is gone, and nobody watches any more

    def lost(self, passed: float = 0.0) -> str | None:
        """Which process is lost, in words.

        Args:
            passed: Seconds since it was asked last.
        """
        others = [rank for rank in range(self.ranks) if rank != self.rank]
        if not self._where:
            if not self.store.check([f"count/{rank}" for rank in others]):
                return None  # they are starting
            for rank, found in zip(others, self.store.multi_get([f"where/{r}" for r in others]), strict=True):
                host, pid = found.decode().rsplit(" ", 1)
                self._where[rank] = (host, int(pid))
        # Looked at before the counts, so that one that leaves in between has said so.
        states = {rank: self._state(rank) for rank in others}
        for rank, count in zip(others, self.store.multi_get([f"count/{rank}" for rank in others]), strict=True):
            changed = count != self._counts.get(rank)
            self._counts[rank], self._silence[rank] = count, 0.0 if changed else self._silence[rank] + passed
            if count == _LEFT:
                continue
            place = f"rank {rank} (process {self._where[rank][1]} on {self._where[rank][0]})"
            if states[rank] == "gone":
                return f"{place} is gone: it was killed, for lack of memory perhaps"
            if self._silence[rank] > (STOPPED if states[rank] == "stopped" else SILENT):
                why = "is stopped" if states[rank] == "stopped" else "or its machine does not answer"
                return f"{place} {why}, for {self._silence[rank]:.0f} s now"
        return None

    def _state(self, rank: int) -> str | None:
        """What can be seen of a process on this machine."""
        host, pid = self._where[rank]
        if host != socket.gethostname():
            return None
        try:
            state = psutil.Process(pid).status()
        except psutil.Error:
            return "gone"
        if state in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return "gone"
        return "stopped" if state in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP) else None


_running: list[Heartbeat] = []


def start(rank: int, ranks: int) -> Heartbeat | None:
    """Starts to count and to watch, where there is a store."""
    if (kept := store()) is None:
        return None
    _running.append(Heartbeat(kept, rank, ranks))
    _running[0].start()
    return _running[0]


def end(lost: str) -> NoReturn:
    """Ends this process at once, from any thread: the main one may wait for the lost process for ever."""
    if first_to_tell():
        message = f"scap-hub: {lost}; the run ends; with the same output folder, the same command goes on where it was"
        print(message, file=sys.stderr, flush=True)
    else:
        time.sleep(1)  # for the one that tells
    os._exit(1)


def end_if_lost() -> None:
    """Call it when something has failed, or a signal came: ends the process if another is seen to be lost."""
    for watch in _running:
        try:
            if lost := watch.lost():
                end(lost)
        except RuntimeError:
            pass  # the launcher is gone
