"""The dataset argument as loaders of image batches."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from scap_hub.errors import DataError
from scap_hub.private import column_types
from scap_hub.recipe import DataSettings
from scap_hub.tasks import IMAGE_CLASSIFICATION, Batch, Task
from scap_hub.training.data.classes import agreed_classes
from scap_hub.training.data.columns import find_columns
from scap_hub.training.data.images import Images, Part, RowReader, Stream
from scap_hub.training.data.sources import as_splits, open_splits, split_names
from scap_hub.training.data.transforms import as_batch, finish, pixels_of
from scap_hub.training.data.unreadable import Tolerance
from scap_hub.training.distributed import main_first
from scap_hub.zoo.base import Pixels, Preprocessing

VALIDATION_SHARE = 0.1


@dataclass
class Data:
    """Loaders of (images, targets) batches, or of (images,) where the data has no targets.

    Images are float32 (N, C, H, W) as the model wants them, targets (N, ...) as the task wants them.

    Attributes:
        train: Shuffled and augmented training images.
        validation: Images that decide on the best weights: a split of the data, or else a fixed tenth of the training
            images; None where there are no targets.
        calibration: A fixed subset of the training images in a fixed order, not augmented.
        labels: Class names by index, None where unknown.
        name: What the data set is called.
        test: Images that nothing is decided on; None where the data has no such split.
        task: What the targets are for.
        sources: What the images are read from; none where they come from the caller's loaders.
    """

    train: DataLoader
    validation: DataLoader | None
    calibration: DataLoader
    labels: list[str] | None
    name: str
    test: DataLoader | None = None
    task: Task = IMAGE_CLASSIFICATION
    sources: Sequence[Any] = ()

    def skipped(self) -> dict[str, int]:
        """How many images could not be read and were left out so far, on all processes, by split."""
        own = [(source.where, source.skipped) for source in self.sources if hasattr(source, "skipped")]
        counts: dict[str, int] = {}
        for where, count in gather_object(own):
            counts[where] = max(counts.get(where, 0), count)
        return {where: count for where, count in counts.items() if count}

    @property
    def measured_on(self) -> DataLoader | None:
        """The images that a model is measured on: those for testing, or else those for validation."""
        return self.test if self.test is not None else self.validation


def load_data(
    dataset: Any,
    preprocessing: Preprocessing,
    settings: DataSettings | None = None,
    *,
    num_classes: int = 0,
    new_head: bool = False,
    seed: int = 0,
    task: Task = IMAGE_CLASSIFICATION,
    model_classes: Sequence[str] | None = None,
    pixels: Pixels | None = None,
) -> Data:
    """Reads a data set into loaders.

    Args:
        dataset: "digits" (embedded), Hub id, image folder, parquet file or folder, save_to_disk folder,
            `datasets.Dataset` or `DatasetDict`, or a torch DataLoader, used as it is; a dict of split name to
            DataLoader too. None stands for `settings.dataset`.
        preprocessing: How the model wants its images; DataLoaders know.
        settings: The recipe's `data` block.
        num_classes: Width of the classifier, to check the targets against; 0 checks nothing.
        new_head: Whether the classifier will be replaced where the data names another number of classes.
        seed: Chooses the calibration images.
        task: What the targets are for.
        model_classes: Names of the model's classes by number; a data set that names the same classes in another order
            is renumbered.
        pixels: How the model's zoo resizes and crops, from `Zoo.pixels`; by default as `preprocessing` says.

    Raises:
        DataError: The data cannot be found or read, its columns are unclear, or a target does not fit the model.
    """
    settings = settings or DataSettings()
    source = settings.dataset if dataset is None else dataset
    if source is None:
        raise DataError("no data set; pass dataset=... or set data.dataset in the recipe")
    if isinstance(source, DataLoader):
        source = {"train": source}
    if isinstance(source, Mapping) and source and all(isinstance(split, DataLoader) for split in source.values()):
        return _from_loaders(source, settings, num_classes, seed, task)
    if isinstance(source, (str, Path)):
        name = str(source)
        splits = main_first(lambda: open_splits(name, settings))
    else:
        splits = as_splits(source)
        name = next(iter(splits.values())).info.dataset_name or "custom"
    return _from_splits(splits, name, preprocessing, settings, num_classes, new_head, seed, task, model_classes, pixels)


def _from_splits(
    splits: Mapping[str, Any],
    name: str,
    preprocessing: Preprocessing,
    settings: DataSettings,
    num_classes: int,
    new_head: bool,
    seed: int,
    task: Task,
    model_classes: Sequence[str] | None,
    pixels: Pixels | None,
) -> Data:
    train, validation, test = split_names(splits, settings)
    if train is None:
        raise DataError(f"which split of {name!r} to train on? It has {', '.join(splits)}; set data.train_split")
    columns = find_columns(splits[train], name, settings, task)
    names = task.class_names(column_types(splits[train])[columns.target]) if columns.target else None
    classes = agreed_classes(
        names, model_classes, num_classes, new_head=new_head, by_name=settings.match_classes, name=name
    )
    if preprocessing.input_size[0] not in (1, 3):
        raise DataError(
            f"the model takes {preprocessing.input_size[0]} channels, and images have 1 or 3: give a DataLoader"
        )
    tolerance = Tolerance(settings.max_broken)
    size, pixels = preprocessing.input_size, pixels or pixels_of(preprocessing)
    reader = RowReader(name, columns, size, pixels, task, classes, tolerance)
    whole = reader.read(splits[train], train)
    held_out = reader.read(splits[validation], validation) if validation else None
    final = reader.read(splits[test], test) if test else None
    parts = _parts(whole, held_out, settings.calibration_images, seed)

    plain = functools.partial(finish, collate=task.collate, mean=preprocessing.mean, std=preprocessing.std)
    mirror = settings.augmentation == "crop-flip" or (settings.augmentation == "auto" and parts.in_colour())
    augmented = functools.partial(plain, shift=settings.augmentation != "none", mirror=mirror)
    return Data(
        train=_loader(parts.train, augmented, settings, shuffle=True),
        validation=_loader(parts.validation, plain, settings) if parts.validation is not None else None,
        calibration=_loader(parts.calibration, plain, settings),
        labels=list(classes.names) if classes.names and whole.labelled else None,
        name=name,
        test=_loader(final, plain, settings) if final is not None and final.labelled else None,
        task=task,
        sources=[source for source in (whole, held_out, final, parts.calibration) if source is not None],
    )


@dataclass(frozen=True)
class _Parts:
    """What a training split is used for; validation images have targets."""

    train: Images | Stream | Part
    validation: Images | Stream | Part | None
    calibration: Images | Part

    def in_colour(self) -> bool:
        images = self.calibration.images if isinstance(self.calibration, Part) else self.calibration
        return images.in_colour()


def _parts(whole: Images | Stream, held_out: Images | Stream | None, calibration_images: int, seed: int) -> _Parts:
    """Divides the training images.

    Args:
        whole: The training split.
        held_out: The validation split; without one, a tenth of the training images is held out if they have targets.
        calibration_images: At most so many are kept for calibration.
        seed: Chooses them.
    """
    validation = held_out if held_out is not None and held_out.labelled else None
    if isinstance(whole, Stream):
        shuffled = whole.shuffled(seed)
        return _Parts(shuffled, validation, shuffled.first(calibration_images))
    # The split does not depend on the seed, so that runs with several seeds can be compared.
    order = np.random.default_rng(0).permutation(len(whole))
    spared = round(VALIDATION_SHARE * len(whole)) if held_out is None and whole.labelled else 0
    chosen = np.random.default_rng(seed).permutation(order[spared:])[:calibration_images]
    return _Parts(
        Part(whole, order[spared:].tolist(), refill=True),
        Part(whole, order[:spared].tolist()) if spared else validation,
        Part(whole, chosen.tolist()),
    )


def _loader(images: Dataset, collate: Callable, settings: DataSettings, shuffle: bool = False) -> DataLoader:
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


def _from_loaders(
    loaders: Mapping[str, DataLoader], settings: DataSettings, num_classes: int, seed: int, task: Task
) -> Data:
    train, validation, test = split_names(loaders, settings)
    if train is None:
        raise DataError(f"which of the loaders {', '.join(loaders)} to train on? Name it 'train'")
    return Data(
        train=loaders[train],
        validation=loaders[validation] if validation else None,
        calibration=_calibration(loaders[train], settings, num_classes, seed, task),
        labels=None,
        name="DataLoader",
        test=loaders[test] if test else None,
        task=task,
    )


def _calibration(loader: DataLoader, settings: DataSettings, num_classes: int, seed: int, task: Task) -> DataLoader:
    """The first images of the caller's loader; the random state stays as it was."""
    batches: list[Batch] = []
    count = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for batch in loader:
            batches.append(_checked(batch, num_classes, task))
            count += len(batches[-1][0])
            if count >= settings.calibration_images:
                break
    if not batches:
        raise DataError(
            "the DataLoader has no batches: it is empty, or it drops a last batch that is all there is; "
            "lower its batch_size"
        )
    images = TensorDataset(*(torch.cat(column)[: settings.calibration_images] for column in zip(*batches, strict=True)))
    collate = functools.partial(as_batch, collate=task.collate)
    return DataLoader(images, batch_size=settings.batch_size, collate_fn=collate)


def _checked(batch: Any, num_classes: int, task: Task) -> Batch:
    """A batch of the caller's loader, as a tuple."""
    parts = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
    if len(parts) > 2 or not all(isinstance(part, Tensor) for part in parts) or parts[0].ndim != 4:
        raise DataError(
            "a DataLoader must yield (images, labels) or (images,) tuples of tensors, images (N, C, H, W); "
            f"this one yields {type(batch).__name__}"
        )
    if len(parts) == 2:
        task.check(parts[1], num_classes, "the DataLoader")
    return parts
