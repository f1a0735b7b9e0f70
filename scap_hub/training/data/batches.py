"""Batches of a data set that is read here."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from scap_hub.recipe import DataSettings


def loader_of(images: Dataset, collate: Callable, settings: DataSettings, shuffle: bool = False) -> DataLoader:
    """A loader of a data set.

    Args:
        images: The data set.
        collate: Makes a batch of its samples.
        settings: The recipe's `data` block: the size of a batch, and how many processes read.
        shuffle: Whether to shuffle, and to leave out a last batch that is not full; for training.
    """
    streamed = isinstance(images, IterableDataset)
    return DataLoader(
        images,
        batch_size=settings.batch_size,
        shuffle=shuffle and not streamed,
        collate_fn=collate,
        num_workers=_workers(images) if settings.workers is None else settings.workers,
        # A last batch of one image would break batch norm.
        drop_last=shuffle and (streamed or len(images) > settings.batch_size),  # type: ignore[arg-type]
        pin_memory=torch.cuda.is_available(),
    )


def _workers(images: Dataset) -> int:
    """Loader processes: none where the images are kept in memory."""
    source = images.dataset if isinstance(images, Subset) else images
    if getattr(source, "cache", None) is not None:
        return 0
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(8, (os.cpu_count() or 1) // processes_here))
