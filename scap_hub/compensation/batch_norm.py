"""Batch-norm statistics, taken anew on calibration images."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from scap_hub.compensation.processes import one_process, sum_over_processes
from scap_hub.criteria.calibration import images_of, total_images
from scap_hub.errors import CalibrationError
from scap_hub.graph.record import evaluating
from scap_hub.placement import fed
from scap_hub.private import BatchNorm
from scap_hub.progress import track


def recalibrate(model: nn.Module, batches: Iterable[Any]) -> None:
    """Takes the running statistics of every batch norm anew, as plain averages over the batches and all processes.

    Args:
        model: Changed in place.
        batches: Calibration batches (this process's share); images only are used.

    Raises:
        CalibrationError: Fewer than 2 images, or images that give NaN or Inf.
    """
    shares = [images_of(batch) for batch in batches]
    total_images(sum(map(len, shares)))
    # Each batch counts the same, so none may be a remainder; and one image has no variance.
    images = torch.cat(shares)
    even = images.tensor_split(max(1, len(images) // max(2, *map(len, shares))))
    with evaluating(model), torch.no_grad(), fresh_statistics(model, len(even)):
        for batch in track(even, "batch-norm statistics"):
            model(fed(model, batch))


@contextlib.contextmanager
def fresh_statistics(model: nn.Module, batches: int) -> Iterator[None]:
    """Batch norms of a model in eval mode take their running statistics from what they are given meanwhile.

    If the forward passes fail, or give NaN or Inf, the former statistics are back.

    Args:
        model: Changed in place.
        batches: How many batches this process will give; its weight in the mean over processes.

    Raises:
        CalibrationError: The new statistics are not finite.
    """
    norms = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, BatchNorm) and module.track_running_stats
    }
    former = {path: {key: value.clone() for key, value in norm.state_dict().items()} for path, norm in norms.items()}
    momenta = {path: norm.momentum for path, norm in norms.items()}
    done = False
    try:
        for norm in norms.values():
            norm.reset_running_stats()
            norm.momentum = None  # a plain average
            norm.train()
        yield
        for path, norm in norms.items():
            _average(path, norm, batches)
        done = True
    finally:
        for path, norm in norms.items():
            norm.momentum = momenta[path]
            norm.eval()
            if not done:
                norm.load_state_dict(former[path])


def _average(path: str, norm: BatchNorm, batches: int) -> None:
    """The mean of a norm's statistics over processes."""
    for statistic in (norm.running_mean, norm.running_var):
        assert statistic is not None  # it tracks running statistics
        statistic.copy_(_mean_over_processes(statistic, batches))
        if not statistic.isfinite().all():
            raise CalibrationError(f"NaN or Inf in what batch norm {path!r} is given; check the images and the weights")


def _mean_over_processes(value: Tensor, weight: int) -> Tensor:
    if one_process():
        return value
    total = sum_over_processes(torch.cat([value * weight, value.new_tensor([weight])]))
    return total[:-1] / total[-1]
