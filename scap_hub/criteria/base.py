"""One interface for every importance criterion, and the registry of their names."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from scap_hub.channels.groups import ChannelGroup
from scap_hub.errors import RecipeError

_CRITERIA: dict[str, type[Criterion]] = {}


class Criterion(ABC):
    """Scores the channels of groups; a higher importance is kept.

    A subclass is a keyword-only dataclass of its options with a `name`; defining it registers it.
    """

    name: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            _CRITERIA[cls.name] = cls

    @abstractmethod
    def score(self, model: nn.Module, groups: Sequence[ChannelGroup], batches: Iterable[Any]) -> dict[str, Tensor]:
        """Returns {group.name: (group.size,) float tensor of importances} for the given groups.

        Args:
            model: The dense model, in eval mode, unchanged on return.
            groups: Prunable groups of that model.
            batches: Calibration batches; this rank's shard when several processes run.
        """


def criterion(name: str, options: Mapping[str, Any] | None = None) -> Criterion:
    """Builds a registered criterion by name.

    Raises:
        RecipeError: Unknown name or option.
    """
    if name not in _CRITERIA:
        near = difflib.get_close_matches(name, _CRITERIA, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RecipeError(f"unknown criterion {name!r}{hint} (known: {', '.join(sorted(_CRITERIA))})")
    try:
        return _CRITERIA[name](**(options or {}))
    except TypeError as error:
        raise RecipeError(f"criterion {name!r}: {error}") from None


def fuse_rows(rows: Tensor, channel_of_row: Tensor, size: int) -> Tensor:
    """Mean importance of the producer's rows that make up each channel of a group; (size,)."""
    held = channel_of_row >= 0
    index = channel_of_row[held]
    total = torch.zeros(size, dtype=rows.dtype).index_add_(0, index, rows[held])
    return total / torch.bincount(index, minlength=size).clamp(min=1)
