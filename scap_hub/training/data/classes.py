"""Which number each class has: the model's own, found by the names of the classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from scap_hub.errors import DataError

_SHOWN = 5
"""Names that a message lists."""
WITHOUT_LABELS = "data.labels=false to use the images without labels"
NewHead = bool | Literal["auto"]
"""Whether a classifier is replaced where the data names another number of classes, or is at least trained on what the
data names; "auto" keeps one that has all of the data's classes among others."""


@dataclass(frozen=True)
class Classes:
    """The classes that targets are numbered by.

    Attributes:
        count: How many there are; 0 where it is unknown.
        names: By number; None where they are unknown.
        by_name: Whether data that numbers the same names otherwise is renumbered.
    """

    count: int
    names: Sequence[str] | None
    by_name: bool = True

    def numbers(self, names: Sequence[str] | None, where: str) -> Tensor | None:
        """The number of each class of a split, int64 (classes of the split,); None if that is its own number.

        Args:
            names: Of the split's classes, in its own order.
            where: The split in words.

        Raises:
            DataError: A name is not among the classes.
        """
        if names is None or self.names is None or not self.by_name:
            return None
        found = matched(names, self.names)
        if found is None:
            raise DataError(
                f"{where} does not name its classes as the training images do: {_unlike(names, self.names)}"
            )
        return None if found == list(range(len(found))) else torch.tensor(found)


def agreed_classes(
    names: Sequence[str] | None,
    models: Sequence[str] | None,
    num_classes: int,
    *,
    new_head: NewHead,
    by_name: bool,
    name: str,
) -> Classes:
    """The classes of a data set and a model together; where both name them, the model's numbers count.

    Args:
        names: Of the data set's classes; None where it has none.
        models: Of the model's; None where it has none.
        num_classes: Width of the classifier; 0 where it is unknown.
        new_head: Whether a classifier that does not fit will be replaced.
        by_name: Whether to match names at all; else the data set's numbers are the model's.
        name: The data set's.

    Raises:
        DataError: The data set has other classes, or another number of them, and the classifier stays.
    """
    if not names:
        return Classes(num_classes, None, by_name)
    same_count = num_classes in (0, len(names))
    if models and by_name and matched(names, models) is not None and (same_count or new_head is not True):
        return Classes(num_classes, models)
    if not same_count and not new_head:
        raise DataError(
            f"{name!r} has {len(names)} classes, the classifier {num_classes}: leave out finetune.dense_epochs=0, "
            f"and the model gets a new head and is tuned first, or set {WITHOUT_LABELS}"
        )
    if models and same_count and by_name and new_head is not True:
        raise DataError(
            f"the classes of {name!r} are not the model's: {_unlike(names, models)}; name them alike, set "
            "data.match_classes=false if the labels are the model's numbers whatever they are called, "
            f"finetune.dense_epochs=5 to tune the model to these classes first, or {WITHOUT_LABELS}"
        )
    return Classes(len(names), names if by_name or not models or not same_count else models, by_name)


def matched(names: Sequence[str], models: Sequence[str]) -> list[int] | None:
    """For each name the number of the model's class that has it; None if one has none, or several."""
    keys, theirs = _keys(names), _keys(models)
    if keys == theirs:
        return list(range(len(keys)))
    # As they are written first: names may differ in nothing but their spelling.
    for ours, others in ((list(names), list(models)), (keys, theirs)):
        counts, number = Counter(others), {key: index for index, key in enumerate(others)}
        if len(set(ours)) == len(ours) and all(counts[key] == 1 for key in ours):
            return [number[key] for key in ours]
    return None


def _keys(names: Sequence[str]) -> list[str]:
    """Names without what is often written otherwise: case, spaces, underscores, hyphens."""
    return ["".join(str(name).casefold().replace("_", " ").replace("-", " ").split()) for name in names]


def _unlike(names: Sequence[str], models: Sequence[str]) -> str:
    """Says which names have no counterpart."""
    keys, theirs = _keys(names), _keys(models)
    only = [[name for name, key in zip(own, mine, strict=True) if key not in set(other)]
            for own, mine, other in ((names, keys, theirs), (models, theirs, keys))]  # fmt: skip
    if not only[0]:
        several = [name for own, mine in ((names, keys), (models, theirs)) for name, key in zip(own, mine, strict=True)
                   if Counter(mine)[key] > 1]  # fmt: skip
        return f"several classes are called {_listed(list(dict.fromkeys(several)))}"
    rest = f", which has {_listed(only[1])}" if only[1] else ""
    return f"{_listed(only[0])} {'is' if len(only[0]) == 1 else 'are'} unknown to the model{rest}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more
