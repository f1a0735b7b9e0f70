"""Which columns of a data set hold the images and their targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from scap_hub.errors import DataError
from scap_hub.private import column_types
from scap_hub.recipe import DataSettings
from scap_hub.tasks import PlacedTask, Task


@dataclass(frozen=True)
class Columns:
    """Names of columns.

    Attributes:
        image: Holds the images.
        target: Holds their targets; None where there are none, or they are not to be used.
    """

    image: str
    target: str | None


def find_columns(rows: Any, name: str, settings: DataSettings, task: Task) -> Columns:
    """Finds the columns by their types, unless the settings name them.

    Args:
        rows: A split of the data set.
        name: The data set's, for the message of an error.
        settings: The recipe's `data` block.
        task: Knows what a target looks like.

    Raises:
        DataError: No column may be meant, or several, or one that is named is not there or of a wrong type.
    """
    kinds = {column: _kind(feature) for column, feature in column_types(rows).items()}
    listing = f"the columns of {name!r} are {', '.join(f'{column} ({kind})' for column, kind in kinds.items())}"
    for asked in (settings.image_column, settings.label_column):
        if asked is not None and asked not in kinds:
            raise DataError(f"no column {asked!r}; {listing}")
    # Targets of other tasks may be images too, and are to be told from them.
    several = isinstance(task, PlacedTask) or task.from_teacher
    target = task.target_column(kinds, settings.label_column, listing) if several and settings.labels else None
    images = [column for column, kind in kinds.items() if kind == "Image" and column != target]
    if settings.image_column is None and len(images) != 1:
        usual = [column for column in images if column == "image"] if several else []
        if not usual:
            raise DataError(f"{len(images) or 'no'} image columns; {listing}; set data.image_column")
        images = usual
    image = settings.image_column or images[0]
    if not several and settings.labels:
        target = task.target_column(kinds, settings.label_column, listing)
    return Columns(image, target)


def _kind(feature: Any) -> str:
    """What a column holds, in one word."""
    import datasets

    if isinstance(feature, (datasets.Image, datasets.ClassLabel, datasets.Array2D)):
        return type(feature).__name__
    return getattr(feature, "dtype", type(feature).__name__)
