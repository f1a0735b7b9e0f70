"""Batches of a data set that is read here."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from scap_hub.recipe import DataSettings
from scap_hub.training.data.stream import Stream
from scap_hub.training.distributed import accelerator


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
        num_workers=_workers(images, settings.workers),
        # A last batch of one image would break batch norm.
        drop_last=shuffle and (streamed or len(images) > settings.batch_size),  # type: ignore[arg-type]
        pin_memory=torch.cuda.is_available(),
    )


def known_length(loader: DataLoader) -> int | None:
    """How many images a loader has in all; None where a stream does not tell."""
    try:
        return len(loader.dataset)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None


def _workers(images: Dataset, wanted: int | None) -> int:
    """Loader processes: as many as are wanted, else none where the images are kept in memory."""
    source = images.dataset if isinstance(images, Subset) else images
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if wanted is None:
        in_memory = getattr(source, "cache", None) is not None
        wanted = 0 if in_memory else max(1, min(8, (os.cpu_count() or 1) // processes_here))
    # Loader processes of a stream without shards of their own would all read the whole of it.
    return min(wanted, source.most_workers(accelerator().num_processes)) if isinstance(source, Stream) else wanted
