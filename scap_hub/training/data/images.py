"""Rows of a data set as uint8 images (C, H, W) and targets, for torch's loaders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset

from scap_hub.errors import DataError
from scap_hub.private import column_types
from scap_hub.tasks import Batch, PlacedTask, Task
from scap_hub.training.data.classes import Classes
from scap_hub.training.data.columns import Columns
from scap_hub.training.data.geometry import Geometry
from scap_hub.training.data.transforms import upright
from scap_hub.training.data.unreadable import Tolerance, TooManyUnreadable
from scap_hub.zoo.base import Pixels

if TYPE_CHECKING:
    import datasets

MEMORY_LIMIT = 512 * 2**20
"""Bytes of decoded images that are kept instead of being decoded again."""
_WITH_TARGET = 4
"""A target that has places may take three times the memory of its image."""


@dataclass(frozen=True)
class RowReader:
    """Reads rows of one data set.

    Attributes:
        name: The data set's.
        columns: Where images and targets are.
        input_size: (channels, height, width) of the images that the model takes.
        pixels: How they are resized and cropped.
        task: How targets are read.
        classes: What the targets are numbered by, and checked against.
        tolerance: How many images may be unreadable.
        geometry: How targets that have places in the image follow its pixels; None for other targets.
    """

    name: str
    columns: Columns
    input_size: tuple[int, int, int]
    pixels: Pixels
    task: Task
    classes: Classes
    tolerance: Tolerance
    geometry: Geometry | None = None

    def read(self, rows: Any, split: str) -> tuple[Any, str | None, RowReader, Numbering]:
        """A split's rows, undecoded, with what else `Images` and `Stream` are made from."""
        import datasets

        kinds = column_types(rows)
        target = self.columns.target if self.columns.target in kinds else None
        where = f"{self.name}[{split}]"
        names = None if target is None else self.task.class_names(kinds[target])
        numbering = Numbering(self.task, self.classes.numbers(names, where), self.classes.count, where)
        rows = rows.with_format(None).select_columns([self.columns.image, *([target] if target else [])])
        # Decoding is ours, so that a broken image can be named.
        for column in (self.columns.image, target):
            if column and isinstance(kinds[column], datasets.Image):
                rows = rows.cast_column(column, datasets.Image(decode=False))
        return rows, target, self, numbering

    def image(self, row: Mapping[str, Any]) -> Image.Image:
        """A row's image, decoded, as it is in the file; any exception means that it cannot be read."""
        import datasets

        return datasets.Image().decode_example(row[self.columns.image])

    def readable(self, row: Mapping[str, Any], numbering: Numbering) -> Batch | str:
        """A row's image as the model takes it, (C, H, W) uint8, with its target if that has places in the image.

        Returns:
            Or else why it cannot be read.
        """
        target = self.columns.target if self.geometry is not None and self.columns.target in row else None
        try:
            image = upright(self.image(row), self.input_size[0])
            value = None if target is None else _decoded(row[target])
        except Exception as error:  # a foreign file in a foreign library: it may be anything
            return " ".join(str(error).split()) or type(error).__name__
        if target is None or self.geometry is None:
            return (self.pixels(image),)
        return self.pixels(image), self.geometry(numbering.placed(value, (image.height, image.width)))

    def named(self, row: Mapping[str, Any], number: int) -> str:
        """Where a row's image lies, or its number, where that is all there is."""
        return (row[self.columns.image] or {}).get("path") or f"image {number}"


def _decoded(value: Any) -> Any:
    """A value of a target column, decoded where it is an image.

    Raises:
        ValueError: There is none.
    """
    import datasets

    if value is None:
        raise ValueError("it has no target")
    is_image = isinstance(value, Mapping) and value.keys() == {"bytes", "path"}
    return datasets.Image().decode_example(dict(value)) if is_image else value


@dataclass(frozen=True)
class Numbering:
    """The targets of one split, numbered as the model does.

    Attributes:
        task: How they are read.
        numbers: The model's number of each of the split's classes; None where they are the same.
        count: How many classes the model has; 0 where it is unknown.
        where: The split in words.
    """

    task: Task
    numbers: Tensor | None
    count: int
    where: str

    @property
    def _own(self) -> int:
        """Classes as the split numbers them."""
        return self.count if self.numbers is None else len(self.numbers)

    def all(self, rows: datasets.Dataset, column: str) -> Tensor | None:
        """The targets of all rows, checked; None where they are hidden."""
        return self._renumbered(self.task.targets(rows, column, self._own, self.where))

    def one(self, value: Any) -> Tensor:
        """The target of one row, checked."""
        return self._renumbered(self.task.target(value, self._own, self.where))

    def placed(self, value: Any, size: tuple[int, int]) -> Any:
        """The target of an image of this (height, width), as it lies on the image, checked."""
        assert isinstance(self.task, PlacedTask)
        return self._renumbered(self.task.read(value, size, self._own, self.where))

    def batch(self, targets: Any, images: int) -> Any:
        """The targets of a batch that the caller made, of so many images, checked."""
        return self._renumbered(self.task.given(targets, images, self._own, self.where))

    def _renumbered(self, targets: Any) -> Any:
        if targets is None or self.numbers is None:
            return targets
        return self.task.renumbered(targets, self.numbers)


class Images(Dataset):
    """Images by index; decoded once where all of them fit in memory."""

    def __init__(
        self,
        rows: datasets.Dataset,
        target: str | None,
        reader: RowReader,
        numbering: Numbering,
        allowed: int | None = None,
    ) -> None:
        """Reads the targets.

        Args:
            rows: Undecoded.
            target: Column of the targets; None where there are none.
            reader: Decodes the images.
            numbering: Of the targets.
            allowed: How many images may be unreadable; by default what the reader says of so many.
        """
        self.where = numbering.where
        if len(rows) == 0:
            raise DataError(f"{self.where} has no images")
        self.rows, self.reader = rows, reader
        self.allowed = reader.tolerance.of(len(rows)) if allowed is None else allowed
        self.numbering, self.placed = numbering, target if reader.geometry is not None else None
        self.targets = None if target is None or self.placed else numbering.all(rows, target)
        size = (len(rows), *reader.input_size)
        needed = np.prod(size, dtype=np.int64) * (1 if self.placed is None else _WITH_TARGET)
        self.cache = torch.empty(size, dtype=torch.uint8) if needed <= MEMORY_LIMIT else None
        self.cached_targets: dict[int, Any] = {}
        self.cached = np.zeros(len(rows), dtype=bool)
        # Shared by all loader processes.
        self.unreadable = torch.zeros(len(rows), dtype=torch.bool).share_memory_()

    @property
    def labelled(self) -> bool:
        """Whether the images have targets."""
        return self.targets is not None or self.placed is not None

    @property
    def skipped(self) -> int:
        """How many images were found to be unreadable so far."""
        return int(self.unreadable.sum())

    def in_colour(self) -> bool:
        """Whether the first image that can be read is a colour image."""
        for row in self.rows:
            try:
                return Image.getmodebase(self.reader.image(row).mode) != "L"
            except Exception:  # it is named when it is its turn
                continue
        return False

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        return tuple(column[0] for column in self.__getitems__([index]))

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """A whole batch, which torch's loaders ask for, without the images that cannot be read.

        Returns:
            (N, C, H, W) uint8 and, if known, (N, ...) targets.
        """
        images = self.fetch(indices)
        return self.batch([index for index in indices if index in images], images)

    def batch(self, indices: Sequence[int], images: Mapping[int, Batch]) -> Batch:
        """The images with these indices, and their targets."""
        own = torch.stack([images[index][0] for index in indices]) if indices else torch.empty(
            0, *self.reader.input_size, dtype=torch.uint8
        )  # fmt: skip
        if self.placed is not None:
            return own, [images[index][1] for index in indices]
        return (own,) if self.targets is None else (own, self.targets[list(indices)])

    def fetch(self, indices: Sequence[int]) -> dict[int, Batch]:
        """Those of these images that can be read, by index, (C, H, W) uint8; with the targets that lie on them.

        Raises:
            DataError: More images cannot be read than are allowed.
        """
        images: dict[int, Batch] = {}
        reasons: dict[int, str] = {}
        for index in dict.fromkeys(indices):
            if self.cache is not None and self.cached[index]:
                kept = (self.cached_targets[index],) if self.placed is not None else ()
                images[index] = (self.cache[index], *kept)
            elif not self.unreadable[index]:
                found = self.reader.readable(self.rows[index], self.numbering)
                if isinstance(found, str):
                    reasons[index] = found
                    continue
                images[index] = found
                if self.cache is not None:
                    self.cache[index], self.cached[index] = found[0], True
                    if self.placed is not None:
                        self.cached_targets[index] = found[1]
        if reasons:
            self._skip(reasons)
        return images

    def _skip(self, reasons: Mapping[int, str]) -> None:
        """Notes that images cannot be read, if so many may be."""
        self.unreadable[list(reasons)] = True
        if self.skipped > self.allowed:
            listed = [
                self.reader.named(self.rows[index], index) + (f" ({reasons[index]})" if index in reasons else "")
                for index in self.unreadable.nonzero().flatten().tolist()
            ]
            raise TooManyUnreadable.of(self.where, listed, self.allowed)


class Part(Subset):
    """Some of the images.

    Attributes:
        refill: Whether another image takes the place of one that cannot be read, so that a batch is never empty; for
            training. Where something is measured, such an image is left out.
    """

    def __init__(self, images: Images, indices: Sequence[int], refill: bool = False) -> None:
        super().__init__(images, indices)
        self.images, self.refill = images, refill

    def __getitems__(self, places: list[int]) -> Any:
        """See `Images.__getitems__`."""
        wanted = [self.indices[place] for place in places]
        if not self.refill:
            return self.images.__getitems__(wanted)
        found = self.images.fetch(wanted)
        good = [index for index in wanted if index in found]
        for step in range(1, len(self.indices)):
            if len(good) >= len(wanted):
                break
            other = self.indices[(places[-1] + step) % len(self.indices)]
            found |= self.images.fetch([other])
            good += [other] if other in found else []
        if not good:
            raise DataError(f"no image of {self.images.where} can be read")
        return self.images.batch(good, found)
