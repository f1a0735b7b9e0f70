"""The dataset argument as loaders of image batches."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Subset, TensorDataset

from scap_hub.errors import DataError
from scap_hub.private import column_types
from scap_hub.recipe import DataSettings
from scap_hub.tasks import IMAGE_CLASSIFICATION, Batch, PlacedTask, Task, unlabelled
from scap_hub.training.data.batches import loader_of
from scap_hub.training.data.classes import Classes, NewHead, agreed_classes
from scap_hub.training.data.columns import find_columns
from scap_hub.training.data.first import has_targets
from scap_hub.training.data.geometry import finish_placed, geometry_of
from scap_hub.training.data.handed import Handed, is_handed, warn_if_raw
from scap_hub.training.data.images import Images, Numbering, Part, RowReader
from scap_hub.training.data.named import handed_classes, handed_numbers, named_classes
from scap_hub.training.data.sources import as_splits, open_splits, split_names
from scap_hub.training.data.stream import Stream
from scap_hub.training.data.transforms import as_batch, finish, pixels_of
from scap_hub.training.data.unreadable import Tolerance
from scap_hub.training.distributed import accelerator, main_first
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
        """The images that a model is measured on: those for testing, or else those for validation.

        Where it is measured by the dense model's outputs, any images will do: the calibration images at last.
        """
        found = self.test if self.test is not None else self.validation
        return self.calibration if found is None and self.task.from_teacher else found


def load_data(
    dataset: Any,
    preprocessing: Preprocessing,
    settings: DataSettings | None = None,
    *,
    num_classes: int = 0,
    new_head: NewHead = False,
    seed: int = 0,
    task: Task = IMAGE_CLASSIFICATION,
    model_classes: Sequence[str] | None = None,
    pixels: Pixels | None = None,
) -> Data:
    """Reads a data set into loaders.

    Args:
        dataset: "digits" (embedded), Hub id, image folder, parquet file or folder, save_to_disk folder,
            `datasets.Dataset` or `DatasetDict`, a torch data set, or a torch DataLoader, used as it is; a dict of split
            name to one of these two as well. None stands for `settings.dataset`.
        preprocessing: How the model wants its images; DataLoaders know, and data sets of tensors.
        settings: The recipe's `data` block.
        num_classes: Width of the classifier, to check the targets against; 0 checks nothing.
        new_head: Whether the classifier will be replaced where the data names another number of classes; "auto" keeps
            one that has all of them among others.
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
    if is_handed(source):
        source = {"train": source}
    if isinstance(source, Mapping) and source and all(map(is_handed, source.values())):
        model = Classes(num_classes, model_classes, settings.match_classes)
        return _from_hands(source, preprocessing, settings, model, new_head, seed, task, pixels)
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
    new_head: NewHead,
    seed: int,
    task: Task,
    model_classes: Sequence[str] | None,
    pixels: Pixels | None,
) -> Data:
    train, validation, test = split_names(splits, settings)
    if train is None:
        raise DataError(f"which split of {name!r} to train on? It has {', '.join(splits)}; set data.train_split")
    columns = find_columns(splits[train], name, settings, task)
    if columns.target is None:
        task = unlabelled(task)
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
    geometry = geometry_of(pixels, preprocessing, name) if isinstance(task, PlacedTask) else None
    reader = RowReader(name, columns, size, pixels, task, classes, tolerance, geometry)
    whole = _split(reader, splits[train], train)
    held_out = _split(reader, splits[validation], validation) if validation else None
    final = _split(reader, splits[test], test) if test else None
    parts = _parts(whole, held_out, settings.calibration_images, seed, any_images=task.from_teacher)
    plain = _finishing(task, preprocessing)
    mirror = settings.augmentation == "crop-flip" or (settings.augmentation == "auto" and parts.in_colour())
    augmented = functools.partial(plain, shift=settings.augmentation != "none", mirror=mirror)
    return Data(
        train=loader_of(parts.train, augmented, settings, shuffle=True),
        validation=loader_of(parts.validation, plain, settings) if parts.validation is not None else None,
        calibration=loader_of(parts.calibration, plain, settings),
        labels=list(classes.names) if classes.names and whole.labelled else None,
        name=name,
        test=loader_of(final, plain, settings) if final is not None and (final.labelled or task.from_teacher) else None,
        task=task,
        sources=[source for source in (whole, held_out, final, parts.calibration) if source is not None],
    )


def _finishing(task: Task, preprocessing: Preprocessing) -> Any:
    """What makes batches ready for the model."""
    statistics: dict[str, Any] = {"mean": preprocessing.mean, "std": preprocessing.std}
    if isinstance(task, PlacedTask):
        return functools.partial(finish_placed, task=task, **statistics)
    return functools.partial(finish, collate=task.collate, **statistics)


def _split(reader: RowReader, rows: Any, split: str) -> Images | Stream:
    """A split's images, by index or, where it is streamed, as they come."""
    import datasets

    return (Images if isinstance(rows, datasets.Dataset) else Stream)(*reader.read(rows, split))


@dataclass(frozen=True)
class _Parts:
    """What a training split is used for; validation images have targets, if the task is measured by them."""

    train: Images | Stream | Part
    validation: Images | Stream | Part | None
    calibration: Images | Part

    def in_colour(self) -> bool:
        images = self.calibration.images if isinstance(self.calibration, Part) else self.calibration
        return images.in_colour()


def _divided(images: int, hold_out: bool, calibration_images: int, seed: int) -> tuple[list[int], list[int], list[int]]:
    """Which images train, which are held out for validation, if any, and which of the former calibrate."""
    # The split does not depend on the seed, so that runs with several seeds can be compared.
    order = np.random.default_rng(0).permutation(images)
    spared = round(VALIDATION_SHARE * images) if hold_out else 0
    chosen = np.random.default_rng(seed).permutation(order[spared:])[:calibration_images]
    return order[spared:].tolist(), order[:spared].tolist(), chosen.tolist()


def _parts(
    whole: Images | Stream, held_out: Images | Stream | None, calibration_images: int, seed: int, any_images: bool
) -> _Parts:
    """Divides the training images.

    Args:
        whole: The training split.
        held_out: The validation split; without one, a tenth of the training images is held out if they have targets.
        calibration_images: At most so many are kept for calibration.
        seed: Chooses them.
        any_images: Whether images without targets are held out too.
    """
    validation = held_out if held_out is not None and (held_out.labelled or any_images) else None
    if isinstance(whole, Stream):
        shuffled = whole.shuffled(seed)
        return _Parts(shuffled, validation, shuffled.first(calibration_images))
    train, spared, chosen = _divided(
        len(whole), held_out is None and (whole.labelled or any_images), calibration_images, seed
    )
    return _Parts(Part(whole, train, refill=True), Part(whole, spared) if spared else validation, Part(whole, chosen))


def _from_hands(
    given: Mapping[str, Any],
    preprocessing: Preprocessing,
    settings: DataSettings,
    model: Classes,
    new_head: NewHead,
    seed: int,
    task: Task,
    pixels: Pixels | None,
) -> Data:
    """Torch loaders, used as they are but for a check, and torch data sets, by split."""
    train, validation, test = split_names(given, settings)
    if train is None:
        raise DataError(f"which of {', '.join(given)} to train on? Name it 'train'")
    used = {name: given[name] for name in (train, validation, test) if name is not None}
    if isinstance(task, PlacedTask) and not (settings.labels and has_targets(given[train], seed)):
        task = unlabelled(task)
    if not task.uses_targets:
        settings = settings.model_copy(update={"labels": False})
    named = {name: named_classes(source, task) if settings.labels else None for name, source in used.items()}
    first = next((found for found in named.values() if found is not None), None)
    classes = handed_classes(first, model, new_head)
    splits = {}
    for name, source in used.items():
        where = "the DataLoader" if isinstance(source, DataLoader) else "the data set"
        where = f"{where} {name!r}" if len(used) > 1 else where
        numbering = Numbering(task, handed_numbers(named[name], classes, where), classes.count, where)
        splits[name] = Handed(source, numbering, preprocessing, settings, pixels)

    whole = splits[train]
    held_out, final = (splits[name].measuring() if name else None for name in (validation, test))
    if whole.whole is None:
        calibration = _calibration(whole.loader(), settings, seed, task)
        warn_if_raw(calibration.dataset[:][0], preprocessing, whole.numbering.where)
        training = whole.loader(whole_batches=accelerator().num_processes == 1)
    else:
        hold_out = validation is None and (whole.labelled or task.from_teacher)
        own, spared, chosen = _divided(len(whole.whole), hold_out, settings.calibration_images, seed)
        training = loader_of(Subset(whole.whole, own), whole.collate(augment=True), settings, shuffle=True)
        calibration = loader_of(Subset(whole.whole, chosen), whole.collate(), settings)
        held_out = loader_of(Subset(whole.whole, spared), whole.collate(), settings) if spared else held_out
    return Data(
        train=training,
        validation=held_out,
        calibration=calibration,
        labels=list(classes.names) if first is not None and classes.names else None,
        name=type(given[train]).__name__,
        test=final,
        task=task,
    )


def _calibration(loader: DataLoader, settings: DataSettings, seed: int, task: Task) -> DataLoader:
    """The first images of the caller's loader; the random state stays as it was."""
    batches: list[Batch] = []
    count = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for batch in loader:
            batches.append(batch)
            count += len(batch[0])
            if count >= settings.calibration_images:
                break
    if not batches:
        raise DataError(
            "the DataLoader has no batches: it is empty, or it drops a last batch that is all there is; "
            "lower its batch_size"
        )
    columns = [column for column in zip(*batches, strict=True) if isinstance(column[0], torch.Tensor)]
    images = TensorDataset(*(torch.cat(column)[: settings.calibration_images] for column in columns))
    collate = functools.partial(as_batch, collate=task.collate)
    return DataLoader(images, batch_size=settings.batch_size, collate_fn=collate)
