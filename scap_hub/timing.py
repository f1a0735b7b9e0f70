"""Times forward passes side by side, so that their ratios survive a busy machine."""

from __future__ import annotations

import contextlib
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
    """Median times of forward passes, in eval mode, where the images are, with the threads torch has.

    The calls take turns, so whatever slows the machine for a while slows all of them alike.

    Args:
        calls: Modules, each with its input.
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
    return [1e3 * statistics.median(own) for own in times]


def device_name(device: torch.device) -> str:
    """What measured times belong to."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {device.type.upper()}, {torch.get_num_threads()} threads"
