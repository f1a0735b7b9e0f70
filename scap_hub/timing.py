"""Times forward passes side by side, so that their ratios survive a busy machine."""

from __future__ import annotations

import contextlib
import operator
import platform
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from scap_hub.channels.capture import evaluating

Call = tuple[nn.Module, Tensor]
Timer = Callable[[Sequence[Call]], list[float]]
"""Gives the milliseconds of one forward pass of each module on its images."""

WARM_UP = 3
"""The first calls choose kernels and fill caches."""


@torch.no_grad()
def milliseconds(calls: Sequence[Call], seconds: float = 0.5, least: int = 10, most: int = 200) -> list[float]:
    """Times of forward passes, in eval mode, where the images are, with the threads torch has.

    The calls take turns, so whatever slows the machine for a while slows all of them alike. The first call's time is
    its median; the others' are that, times the median of their ratio to the first in the same round. On two busy cores
    such ratios spread by 1 % where ratios of medians spread by 10 %.

    Args:
        calls: Modules, each with its input; the one that others are compared with first.
        seconds: Go on until the calls have taken this long each, on average.
        least: Rounds at least.
        most: Rounds at most.
    """
    times: list[list[float]] = [[] for _ in calls]
    with contextlib.ExitStack() as stack:
        for module, _ in calls:
            stack.enter_context(evaluating(module))
        for turn in range(WARM_UP + most):
            for own, (module, images) in zip(times, calls, strict=True):
                start = time.perf_counter()
                module(images)
                if images.device.type != "cpu":
                    torch.accelerator.synchronize(images.device)
                if turn >= WARM_UP:
                    own.append(time.perf_counter() - start)
            if turn >= WARM_UP + least - 1 and sum(map(sum, times)) > seconds * len(calls):
                break
    first = 1e3 * statistics.median(times[0])
    return [first * statistics.median(map(operator.truediv, own, times[0])) for own in times]


def device_name(device: torch.device) -> str:
    """What measured times belong to."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {device.type.upper()}, {torch.get_num_threads()} threads"
