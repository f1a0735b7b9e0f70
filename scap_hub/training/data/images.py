"""Rows of a data set as uint8 images (C, H, W) and targets, for torch's loaders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from scap_hub.errors import DataError
from scap_hub.private import column_types
from scap_hub.tasks import Batch, Task
from scap_hub.training.data.columns import Columns
from scap_hub.training.data.transforms import pixels
from scap_hub.zoo.base import Preprocessing

if TYPE_CHECKING:
    import datasets

MEMORY_LIMIT = 512 * 2**20
"""Bytes of decoded images that are kept instead of being decoded again."""


@dataclass(frozen=True)
class RowReader:
    """Reads rows of one data set.

    Attributes:
        name: The data set's.
        columns: Where images and targets are.
        preprocessing: How the model wants its images.
        task: How targets are read.
        num_classes: Width of the classifier, to check the targets against; 0 checks nothing.
    """

    name: str
    columns: Columns
    preprocessing: Preprocessing
    task: Task
    num_classes: int

    def read(self, rows: Any, split: str) -> Images | Stream:
        """A split's images, by index or, where it is streamed, as they come."""
        import datasets

        target = self.columns.target if self.columns.target in column_types(rows) else None
        rows = rows.with_format(None).select_columns([self.columns.image, *([target] if target else [])])
        # Decoding is ours, so that a broken image can be named.
        rows = rows.cast_column(self.columns.image, datasets.Image(decode=False))
        kind = Images if isinstance(rows, datasets.Dataset) else Stream
        return kind(rows, f"{self.name}[{split}]", target, self)

    def image(self, row: Mapping[str, Any], where: str) -> Image.Image:
        """A row's image, decoded.

        Raises:
            DataError: It cannot be read.
        """
        import datasets

        try:
            return datasets.Image().decode_example(row[self.columns.image])
        except (OSError, TypeError, ValueError) as error:
            raise DataError(f"an image of {where} cannot be read: {error}") from error

    def pixels(self, row: Mapping[str, Any], where: str) -> Tensor:
        """A row's image as the model takes it, (C, H, W) uint8."""
        return pixels(self.image(row, where), self.preprocessing)


class Images(Dataset):
    """Images by index; decoded once where all of them fit in memory."""

    def __init__(self, rows: datasets.Dataset, where: str, target: str | None, reader: RowReader) -> None:
        if len(rows) == 0:
            raise DataError(f"{where} has no images")
        self.rows, self.where, self.reader = rows, where, reader
        self.targets = None if target is None else reader.task.targets(rows, target, reader.num_classes, where)
        size = (len(rows), *reader.preprocessing.input_size)
        self.cache = torch.empty(size, dtype=torch.uint8) if np.prod(size, dtype=np.int64) <= MEMORY_LIMIT else None
        self.cached = np.zeros(len(rows), dtype=bool)

    @property
    def labelled(self) -> bool:
        """Whether the images have targets."""
        return self.targets is not None

    def in_colour(self) -> bool:
        """Whether the first image is a colour image."""
        return self.reader.image(self.rows[0], self.where).mode not in ("1", "L", "LA", "I", "I;16", "F")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        return tuple(column[0] for column in self.__getitems__([index]))

    def __getitems__(self, indices: list[int]) -> Batch:
        """A whole batch, which torch's loaders ask for: (N, C, H, W) uint8 and, if known, (N, ...) targets."""
        if self.cache is None:
            images = self._decode(indices)
        else:
            missing = [index for index in indices if not self.cached[index]]
            if missing:
                self.cache[missing] = self._decode(missing)
                self.cached[missing] = True
            images = self.cache[indices]
        return (images,) if self.targets is None else (images, self.targets[indices])

    def _decode(self, indices: Sequence[int]) -> Tensor:
        column = self.reader.columns.image
        return torch.stack([self.reader.pixels({column: image}, self.where) for image in self.rows[indices][column]])


class Stream(IterableDataset):
    """Images as they come."""

    def __init__(self, rows: datasets.IterableDataset, where: str, target: str | None, reader: RowReader) -> None:
        self.rows, self.where, self.target, self.reader = rows, where, target, reader

    @property
    def labelled(self) -> bool:
        """Whether the images have targets."""
        return self.target is not None

    def shuffled(self, seed: int) -> Stream:
        """The same images in another order, as far as a buffer of 1000 reaches."""
        return Stream(self.rows.shuffle(seed=seed, buffer_size=1000), self.where, self.target, self.reader)

    def first(self, count: int) -> Images:
        """Keeps the first images in memory."""
        import datasets

        rows = datasets.Dataset.from_list(list(self.rows.take(count)), features=column_types(self.rows))
        return Images(rows, self.where, self.target, self.reader)

    def set_epoch(self, epoch: int) -> None:
        """Shuffles anew; accelerate's loaders call it."""
        self.rows.set_epoch(epoch)

    def __len__(self) -> int:
        known = (self.rows.info.splits or {}).get(str(self.rows.split))
        if known is None or not known.num_examples:
            raise TypeError(f"{self.where} does not say how many images it has")
        return known.num_examples

    def __iter__(self) -> Iterator[Batch]:
        reader = self.reader
        for row in self.rows:
            image = reader.pixels(row, self.where)
            if self.target is None:
                yield (image,)
            else:
                yield image, reader.task.target(row[self.target], reader.num_classes, self.where)
