"""Times forward passes side by side, so that their ratios survive a busy machine."""

from __future__ import annotations

import contextlib
import ctypes
import operator
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from scap_hub.graph.record import evaluating

Call = tuple[nn.Module, Tensor]
Timer = Callable[[Sequence[Call]], list[float]]
"""Gives the milliseconds of one forward pass of each module on its images."""


@torch.no_grad()
def milliseconds(calls: Sequence[Call], seconds: float = 0.5, turns: int = 7) -> list[float]:
    """Times of forward passes, in eval mode, where the images are, with the threads torch has.

    The modules take turns, so whatever slows the machine for a while slows all of them alike. In its turn a module runs
    until its time is over. Where it runs more than once, the first run does not count: it finds caches and memory as
    another module left them, and a small network is up to 1.5 times slower after a large one than after itself.

    The first module's time is its median. The time of another is the first one's, times the median of the ratios of the
    two in each turn. On two busy cores such ratios spread by 1 %, where ratios of medians spread by 10 %.

    Args:
        calls: Modules, each with its input; first the one that the others are compared with.
        seconds: How long each module runs in all its turns together, if a single run does not take longer.
        turns: How many turns of each module count; one more before them lets the libraries choose their kernels.

    Returns:
        Milliseconds of one forward pass of each module.
    """
    times: list[list[float]] = [[] for _ in calls]
    with contextlib.ExitStack() as stack:
        stack.enter_context(_steady_heap())
        for module, _ in calls:
            stack.enter_context(evaluating(module, compiled=True))
        for _ in range(1 + turns):
            for own, (module, images) in zip(times, calls, strict=True):
                own.append(_turn(module, images, seconds / turns))
    counted = [own[1:] for own in times]
    first = 1e3 * statistics.median(counted[0])
    return [first * statistics.median(map(operator.truediv, own, counted[0])) for own in counted]


def fastest(call: Callable[[], object], seconds: float = 0.0) -> float:
    """Seconds of a call: of several the fastest, as the first one warms up and other work on the machine delays.

    Args:
        call: What to time, to its end on a GPU too.
        seconds: For how long; two calls are made at least.
    """
    times: list[float] = []
    while len(times) < 2 or sum(times) < seconds:
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def _turn(module: nn.Module, images: Tensor, seconds: float) -> float:
    """Seconds of one run."""
    runs: list[float] = []
    while sum(runs) < seconds:
        start = time.perf_counter()
        module(images)
        if images.device.type != "cpu":
            torch.accelerator.synchronize(images.device)
        runs.append(time.perf_counter() - start)
    return statistics.median(runs[1:] or runs)


@contextlib.contextmanager
def _steady_heap() -> Iterator[None]:
    """Keeps glibc from giving memory back to the system after each run.

    Whether it does depends on what the process did before, and it matters: a forward pass of MobileNetV2 takes 30 ms
    when its memory is requested anew, with thousands of page faults, and 20 ms when not. Afterwards the limits are set
    to the highest values that glibc would choose by itself.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    mallopt, trim_threshold, mmap_threshold = ctypes.CDLL(None).mallopt, -1, -3
    mallopt(mmap_threshold, 32 << 20)
    mallopt(trim_threshold, 1 << 30)
    try:
        yield
    finally:
        mallopt(trim_threshold, 64 << 20)


def device_name(device: torch.device) -> str:
    """What measured times belong to."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.machine()} {device.type.upper()}, {threads} thread{'s' * (threads != 1)}"
