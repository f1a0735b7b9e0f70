"""The classes of torch data sets and loaders, and the model's number of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.utils.data import ChainDataset, ConcatDataset, DataLoader, Subset, default_collate
from torch.utils.data.dataloader import default_convert

from scap_hub.errors import DataError
from scap_hub.private import column_types
from scap_hub.tasks import Task
from scap_hub.training.data.classes import Classes, NewHead, agreed_classes, matched
from scap_hub.training.data.sources import is_rows


@dataclass(frozen=True)
class Named:
    """How a data set calls its classes.

    Attributes:
        source: What the data set is.
        names: By the data set's own number.
        certain: Whether its labels are these numbers, with nothing in between that may change them.
    """

    source: str
    names: Mapping[int, str]
    certain: bool

    @property
    def in_order(self) -> list[str]:
        """The names, by ascending number."""
        return [self.names[number] for number in sorted(self.names)]

    @property
    def gapless(self) -> bool:
        """Whether each number from 0 on has a name."""
        return sorted(self.names) == list(range(len(self.names)))


def named_classes(dataset: Any, task: Task) -> Named | None:
    """The classes that a data set names, as torchvision's do: `class_to_idx` or `classes`; None if it names none.

    Args:
        dataset: Also a loader, a part or a chain of others, or anything around one, which it has as `dataset`.
        task: Knows which columns of `datasets` name classes.

    Raises:
        DataError: Chained data sets give one number to several names.
    """
    if isinstance(dataset, (ConcatDataset, ChainDataset)):
        return _joined([named_classes(part, task) for part in dataset.datasets])
    own = _own_names(dataset)
    if own:
        return Named(type(dataset).__name__, own, getattr(dataset, "target_transform", None) is None)
    if is_rows(dataset):
        known = [names for kind in column_types(dataset).values() if (names := task.class_names(kind))]
        # Which column a collate function makes labels of is unknown.
        return Named(type(dataset).__name__, dict(enumerate(known[0])), False) if len(known) == 1 else None
    inner = getattr(dataset, "dataset", None)
    found = None if inner is None else named_classes(inner, task)
    # What stands around a data set may change its labels.
    as_is = (
        dataset.collate_fn in (default_collate, default_convert)
        if isinstance(dataset, DataLoader)
        else type(dataset) is Subset
    )
    return found and replace(found, certain=found.certain and as_is)


def _own_names(dataset: Any) -> dict[int, str]:
    """Names by number. The labels of torchvision's data sets follow `class_to_idx`; synonyms share a number."""
    numbers, classes = getattr(dataset, "class_to_idx", None), getattr(dataset, "classes", None)
    pairs: list[tuple[int, Any]] = []
    if isinstance(numbers, Mapping) and all(isinstance(number, int) for number in numbers.values()):
        pairs = [(number, name) for name, number in numbers.items()]
    elif isinstance(classes, (list, tuple)):
        pairs = [
            (number, name)
            for number, names in enumerate(classes)
            for name in (names if isinstance(names, (list, tuple)) else [names])
        ]
    if not all(isinstance(name, str) for _, name in pairs):
        return {}
    joined: dict[int, str] = {}
    for number, name in pairs:
        joined[number] = f"{joined[number]}, {name}" if number in joined else name
    return joined


def _joined(parts: Sequence[Named | None]) -> Named | None:
    found = [part for part in parts if part is not None]
    names: dict[int, str] = {}
    for part in found:
        for number, name in part.names.items():
            if names.setdefault(number, name) != name:
                raise DataError(
                    f"chained data sets number their classes differently: {number} is {names[number]!r} in one and "
                    f"{name!r} in another; give them the same class_to_idx"
                )
    certain = len(found) == len(parts) and all(part.certain for part in found)
    return Named(found[0].source, names, certain) if found else None


def handed_classes(named: Named | None, model: Classes, new_head: NewHead) -> Classes:
    """The classes that the targets of torch data sets are numbered by.

    Args:
        named: How the data set calls its classes; None where it has no names, so that its labels are the model's.
        model: The model's, and whether names count.
        new_head: As for `agreed_classes`.

    Raises:
        DataError: As `agreed_classes`.
    """
    if named is None or not named.gapless or not (model.by_name or new_head):
        return model
    return agreed_classes(
        named.in_order, model.names, model.count, new_head=new_head, by_name=model.by_name, name=named.source
    )


def handed_numbers(named: Named | None, classes: Classes, where: str) -> Tensor | None:
    """The number of each class of a split, int64 (classes of the split,); None if that is its own number.

    Args:
        named: How the split calls its classes.
        classes: From `handed_classes`.
        where: The split in words.

    Raises:
        DataError: A name is unknown, or the numbers differ and it is uncertain what the labels mean.
    """
    if named is None or classes.names is None or not classes.by_name:
        return None
    if not named.gapless and matched(named.in_order, classes.names) == sorted(named.names):
        return None
    numbers = classes.numbers(named.in_order, where)
    if not named.gapless or (numbers is not None and not named.certain):
        because = (
            "what a target_transform, a collate_fn or a class around the data set makes of its labels is unknown"
            if named.gapless
            else "its class_to_idx leaves out numbers"
        )
        raise DataError(
            f"{where} numbers its classes otherwise than the model, and {because}: give the {named.source} itself with "
            "its own labels, or set data.match_classes=false if the labels are the model's numbers already"
        )
    return numbers
