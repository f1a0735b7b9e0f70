"""Torch data sets and loaders that a caller hands over: their classes, and a check of each of their batches."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, default_collate

from scap_hub.errors import DataError
from scap_hub.recipe import DataSettings
from scap_hub.tasks import Batch, PlacedTask
from scap_hub.tasks.placed import check_size
from scap_hub.training.data.batches import loader_of
from scap_hub.training.data.geometry import Geometry, finish_placed, geometry_of
from scap_hub.training.data.images import Numbering
from scap_hub.training.data.sources import is_rows
from scap_hub.training.data.transforms import finish, pixels_of, upright
from scap_hub.zoo.base import Pixels, Preprocessing


@dataclass(frozen=True)
class Checked:
    """A collate function: batches as the caller's makes them, as the model and the task want them.

    Attributes:
        collate: The caller's.
        numbering: Of the targets.
        labels: Whether to use the targets.
        preprocessing: How the model wants its images; None where nobody knows.
    """

    collate: Callable[[Any], Any]
    numbering: Numbering
    labels: bool
    preprocessing: Preprocessing | None

    def __call__(self, samples: Any) -> Batch:
        """A batch: float32 images (N, C, H, W) and, if there are any, targets by the model's numbers.

        Raises:
            DataError: The samples make no such batch.
        """
        batch = self._batch(samples)
        mask = batch.get("pixel_mask") if isinstance(batch, Mapping) else None
        if isinstance(mask, Tensor) and not mask.all():
            raise DataError(
                f"the images of {self.numbering.where} are padded, as pixel_mask says, and models are run without it: "
                "give images of one size (do_pad=False and a size of height and width in the image processor); to a "
                "model that takes no pixel_mask, leave it out"
            )
        parts = parts_of(batch) if self.labels else parts_of(batch)[:1]  # what is not used may be anything
        parts = (*(stacked(images, self.numbering.where) for images in parts[:1]), *parts[1:])
        # Targets that have places are looked at by their task.
        tensors = parts[:1] if isinstance(self.numbering.task, PlacedTask) else parts
        if not 1 <= len(parts) <= 2 or not all(isinstance(part, Tensor) for part in tensors) or parts[0].ndim != 4:
            raise DataError(
                "a DataLoader must yield (images, labels) or (images,) tuples of tensors, images (N, C, H, W); "
                f"this one yields {_described(batch)}"
            )
        images = self._images(parts[0])
        if len(parts) == 1:
            return (images,)
        targets = self.numbering.batch(parts[1], len(images))
        if isinstance(self.numbering.task, PlacedTask) and isinstance(targets, Tensor) and targets.ndim == 3:
            check_size("target", tuple(targets.shape[1:]), tuple(images.shape[2:]), self.numbering.where)
        return images, targets

    def _batch(self, samples: Any) -> Any:
        if self.collate is not default_collate:
            return self.collate(samples)
        for sample in samples:
            if isinstance(first_of(sample), Image.Image):
                raise DataError(
                    "a DataLoader cannot batch PIL images: give the data set itself, whose images are then resized and "
                    "normalised as the model wants them, or give it a transform that does so"
                )
        try:
            return _joined(samples)
        except (RuntimeError, TypeError) as error:  # unequal sizes, and types that torch cannot batch
            raise DataError(
                f"the samples of {self.numbering.where} make no batch: {' '.join(str(error).split())}; give images of "
                "one size as tensors, and labels as numbers"
            ) from None

    def _images(self, images: Tensor) -> Tensor:
        known = self.preprocessing
        if known is not None and images.shape[1] != known.input_size[0]:
            raise DataError(
                f"the images of {self.numbering.where} have {images.shape[1]} channels, (N, C, H, W) = "
                f"{tuple(images.shape)}, and the model takes {known.input_size[0]}: give images of so many"
            )
        if images.is_floating_point():
            return images.float()
        values = f" with mean {known.mean} and standard deviation {known.std}" if known else " as the model wants them"
        raise DataError(
            f"the images of {self.numbering.where} are {str(images.dtype).removeprefix('torch.')}, not normalised: "
            f"scale them to floats from 0 to 1 and normalise them{values} (torchvision's ToDtype(torch.float32, "
            "scale=True) and Normalize), or give a data set of PIL images, for which that is done"
        )


def parts_of(batch: Any) -> tuple[Any, ...]:
    """Images and, if there are any, targets, of a batch or a sample; transformers' name them."""
    if isinstance(batch, Mapping) and "pixel_values" in batch:
        return batch["pixel_values"], *([batch["labels"]] if "labels" in batch else [])
    return tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)


def _joined(samples: Any) -> Any:
    """Torch's own batch, in which dictionaries of targets stay apart: no two images have equally many boxes."""
    parts = [parts_of(sample) for sample in samples]
    if not all(len(part) == 2 and isinstance(part[1], Mapping) for part in parts):
        return default_collate(samples)
    return default_collate([image for image, _ in parts]), [target for _, target in parts]


def stacked(images: Any, where: str) -> Any:
    """Images as one tensor, also from a list of images of one size, as torchvision's detectors are fed."""
    if not isinstance(images, (tuple, list)) or not images or not all(isinstance(image, Tensor) for image in images):
        return images
    shapes = list(dict.fromkeys(tuple(image.shape) for image in images))
    if len(shapes) > 1:
        raise DataError(f"the images of {where} are {shapes[0]} and {shapes[1]} in one batch: give images of one size")
    return torch.stack([*images])


_BEYOND = 10
"""Values so many times as large as the largest normalised one are no normalised pixels."""

_BELOW = -0.25
"""Values below it come from a normalisation, where pixels begin at 0; noise stays above."""
_LOOKED_AT = 8
"""About so many images of a data set are looked at."""


def warn_if_raw(images: Tensor, preprocessing: Preprocessing | None, where: str) -> None:
    """Warns of floats that the model's preprocessing can hardly make, such as 0 to 255; only its owner knows."""
    if preprocessing is None or not images.is_floating_point() or not images.numel():
        return
    mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
    largest, usual = images.abs().max().item(), (torch.maximum(mean, 1 - mean) / std).max().item()
    if largest > _BEYOND * usual:
        warnings.warn(
            f"the images of {where} have values up to {largest:g}, and normalised with mean {preprocessing.mean} and "
            f"standard deviation {preprocessing.std} they would be within {usual:.3g}: normalise them, unless the "
            "model was trained on such values",
            stacklevel=2,
        )
    lowest = images.min().item()
    if lowest < _BELOW and not mean.any():
        warnings.warn(
            f"the images of {where} have values down to {lowest:.3g}, and the model takes them from 0 on, as one that "
            "normalises them itself: give them as they are, unless it was trained on such values",
            stacklevel=2,
        )


def _described(batch: Any) -> str:
    if isinstance(batch, (tuple, list)):
        return f"{type(batch).__name__} of {', '.join(map(_described, batch)) or 'nothing'}"
    return f"a tensor {tuple(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__


def first_of(sample: Any) -> Any:
    """The image of a sample."""
    return parts[0] if (parts := parts_of(sample)) else sample


def _tuples(samples: Any) -> Batch:
    """Torch's own batches, as tuples."""
    return tuple(default_collate(samples))


def with_check(loader: DataLoader, check: Checked, whole_batches: bool = False) -> DataLoader:
    """The same loader with checked batches; the caller's stays as it is.

    Args:
        loader: The caller's.
        check: What becomes of each batch.
        whole_batches: Whether to leave out a last batch of one image, on which batch norm cannot be trained.

    Raises:
        DataError: Its class iterates in a way of its own, which training on many processes would leave out.
    """
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise DataError(
            f"{type(loader).__name__} has an __iter__ of its own, which training would leave out: give a plain "
            "torch DataLoader, and do that work in its data set or its collate_fn"
        )
    checked = copy.copy(loader)
    changes: dict[str, Any] = {"collate_fn": check, "_iterator": None}
    if whole_batches and _leaves_one(loader):
        changes |= {"batch_sampler": BatchSampler(loader.sampler, loader.batch_size, True), "drop_last": True}  # type: ignore[arg-type]
    vars(checked).update(changes)  # torch forbids to set them one by one
    return checked


def _leaves_one(loader: DataLoader) -> bool:
    size = loader.batch_size
    # A batch sampler of the caller's own has no batch size.
    if size is None or size < 2 or loader.drop_last or isinstance(loader.dataset, IterableDataset):
        return False
    images = len(loader.sampler)  # type: ignore[arg-type]
    return images > size and images % size == 1


@contextlib.contextmanager
def _readable(index: int) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise DataError(f"image {index} of the data set cannot be read: {' '.join(str(error).split())}") from error


class Readable(Dataset):
    """A data set of PIL images, as uint8 (C, H, W) of the model's size, and their targets."""

    def __init__(
        self, dataset: Any, channels: int, pixels: Pixels, numbering: Numbering, geometry: Geometry | None
    ) -> None:
        """Wraps a data set.

        Args:
            dataset: Of PIL images, or of tuples that start with one.
            channels: Of the images that the model takes.
            pixels: Resizes and crops.
            numbering: Of its targets.
            geometry: How targets that have places in the image follow its pixels; None where they have none.
        """
        self.dataset, self.channels, self.pixels = dataset, channels, pixels
        self.numbering, self.geometry = numbering, geometry

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        """See `Readable`."""
        with _readable(index):
            image, *rest = parts_of(self.dataset[index])
            image = upright(image, self.channels)
        if rest and self.geometry is not None:
            rest[0] = self.geometry(self.numbering.placed(rest[0], (image.height, image.width)))
        return (self.pixels(image), *rest)


class Handed:
    """One split, a torch loader or data set.

    Attributes:
        whole: The data set, if it is one that can be read by index; else None.
        labelled: Whether its images have targets that are to be used; a loader may turn out to have none.
    """

    def __init__(
        self,
        source: Any,
        numbering: Numbering,
        preprocessing: Preprocessing,
        settings: DataSettings,
        pixels: Pixels | None,
    ) -> None:
        """Looks at the first image of a data set.

        Args:
            source: The loader or data set.
            numbering: Of its targets.
            preprocessing: How the model wants its images.
            settings: The recipe's `data` block.
            pixels: How the model's zoo resizes and crops.
        """
        self.numbering, self.preprocessing, self.settings = numbering, preprocessing, settings
        self.whole: Any = None
        self.labelled, self._pictures, self._colour, self._placed = settings.labels, False, False, False
        if isinstance(source, IterableDataset):
            source = DataLoader(source, batch_size=settings.batch_size)
        self.given = source
        if not isinstance(source, DataLoader):
            self.whole = source
            first = self._first(source)
            image = first_of(first)
            self.labelled = settings.labels and len(parts_of(first)) > 1
            if isinstance(image, Tensor):
                spread = range(0, len(source), max(1, len(source) // _LOOKED_AT))
                with torch.random.fork_rng(devices=[]):
                    values = torch.cat([first_of(source[index]).flatten() for index in spread])
                warn_if_raw(values, preprocessing, numbering.where)
            elif isinstance(image, Image.Image):
                self._pictures, self._colour = True, Image.getmodebase(image.mode) != "L"
                channels = preprocessing.input_size[0]
                if channels not in (1, 3):
                    raise DataError(f"the model takes {channels} channels, and images have 1 or 3: give a DataLoader")
                pixels = pixels or pixels_of(preprocessing)
                self._placed = self.labelled and isinstance(numbering.task, PlacedTask)
                geometry = geometry_of(pixels, preprocessing, numbering.where) if self._placed else None
                self.whole = Readable(source, channels, pixels, numbering, geometry)

    def _first(self, source: Any) -> Any:
        try:
            images = len(source)
        except (TypeError, NotImplementedError):
            raise DataError(
                f"{self.numbering.where} ({type(source).__name__}) has no length: give a DataLoader"
            ) from None
        if not images:
            raise DataError(f"{self.numbering.where} has no images")
        with _readable(0), torch.random.fork_rng(devices=[]):
            return source[0]

    def collate(self, augment: bool = False) -> Checked:
        """What makes checked batches.

        Args:
            augment: Whether to augment PIL images as the recipe says; tensors stay as they are.
        """
        join: Any = default_collate
        if isinstance(self.given, DataLoader):
            join = self.given.collate_fn
        elif self._pictures:
            shift = augment and self.settings.augmentation != "none"
            mirror = self.settings.augmentation == "crop-flip" or (
                self.settings.augmentation == "auto" and self._colour
            )
            mean, std = self.preprocessing.mean, self.preprocessing.std
            how: dict[str, Any] = {"mean": mean, "std": std, "shift": shift, "mirror": mirror}
            placed = self.numbering.task if self._placed else None
            if isinstance(placed, PlacedTask):
                join = partial(finish_placed, task=placed, **how)
            else:
                join = partial(finish, collate=_tuples, **how)
        return Checked(join, self.numbering, self.settings.labels, self.preprocessing)

    def measuring(self) -> DataLoader | None:
        """Checked batches to measure a model on; None where the images have no targets and the task wants some."""
        return self.loader() if self.labelled or self.numbering.task.from_teacher else None

    def loader(self, whole_batches: bool = False) -> DataLoader:
        """Checked batches, in the caller's order.

        Args:
            whole_batches: As for `with_check`.
        """
        if isinstance(self.given, DataLoader):
            return with_check(self.given, self.collate(), whole_batches)
        return loader_of(self.whole, self.collate(), self.settings)


def is_handed(source: Any) -> bool:
    """Whether this is a torch loader or data set; those of `datasets` are not."""
    return isinstance(source, (DataLoader, Dataset)) and not is_rows(source)
