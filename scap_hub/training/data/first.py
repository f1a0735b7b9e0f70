"""The first sample of a torch data set or loader that a caller hands over: its size, and whether it has a target."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate

from scap_hub.training.data.handed import first_of, is_handed, parts_of, stacked


def image_size(dataset: Any, seed: int) -> tuple[int, int, int] | None:
    """(channels, height, width) of what a torch loader or data set, or the first of several, gives, if tensors.

    None also for batches that are padded to the largest image in them, and for what cannot be read or makes no batch,
    which is told when it is needed.

    Args:
        dataset: Whatever a user gives as data.
        seed: Of the shuffling; the random state stays as it was.
    """
    source = next(iter(dataset.values()), None) if isinstance(dataset, Mapping) else dataset
    if not is_handed(source):
        return None
    if isinstance(source, DataLoader) and source.collate_fn is default_collate:
        source = source.dataset
    try:
        sample = _first_sample(source, seed)
        image = stacked(first_of(sample), "the data set")
    except Exception:
        return None
    if isinstance(sample, Mapping) and "pixel_mask" in sample:
        return None
    shape = tuple(image.shape[-3:]) if isinstance(image, Tensor) else ()
    return shape if len(shape) == 3 else None


def has_targets(source: Any, seed: int) -> bool:
    """Whether the first sample of a torch data set, or the first batch of a loader, has more than images."""
    return len(parts_of(_first_sample(source, seed))) > 1


def _first_sample(source: Any, seed: int) -> Any:
    """Of a torch data set the first sample, of a loader the first batch; None, which is told later, if it is empty."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            if isinstance(source, DataLoader):
                source = _without_workers(source)
            return next(iter(source)) if isinstance(source, (DataLoader, IterableDataset)) else source[0]
        except (StopIteration, IndexError):
            return None


def _without_workers(loader: DataLoader) -> DataLoader:
    """The same loader in this process: for one batch workers are slow to start, and persistent ones would stay."""
    here = copy.copy(loader)
    changes = {"num_workers": 0, "prefetch_factor": None, "persistent_workers": False, "timeout": 0, "_iterator": None}
    vars(here).update(changes)  # torch forbids to set some of them
    return here
