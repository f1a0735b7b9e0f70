"""One interface for every importance criterion, the registry of their names, and the fusion of layers."""

from __future__ import annotations

import difflib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from scipy.stats import rankdata
from torch import Tensor, nn

from scap_hub.channels.groups import ChannelGroup, Tap
from scap_hub.errors import ModelError, RecipeError
from scap_hub.plan import PruningPlan

_CRITERIA: dict[str, type[Criterion]] = {}


class Criterion(ABC):
    """Scores the channels of groups; a higher importance is kept.

    A subclass is a keyword-only dataclass of its options with a `name`; defining it registers it.

    Attributes:
        name: Of the criterion.
        scope: How `target.scope: auto` compares its scores across groups, see `select`.
    """

    name: ClassVar[str]
    scope: ClassVar[str] = "global"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            _CRITERIA[cls.name] = cls

    @abstractmethod
    def score(self, model: nn.Module, groups: Sequence[ChannelGroup], batches: Iterable[Any]) -> dict[str, Tensor]:
        """Returns {group.name: (group.size,) float tensor of importances} for the given groups.

        Args:
            model: The dense model, unchanged on return.
            groups: Prunable groups of that model.
            batches: Calibration batches; this rank's shard when several processes run.
        """

    def ranking(self, model: nn.Module, groups: Sequence[ChannelGroup], batches: Iterable[Any]) -> dict[str, Tensor]:
        """Scores that order the channels of each group as `score` does; for criteria where that alone is cheaper."""
        return self.score(model, groups, batches)

    def refine(
        self, model: nn.Module, groups: Sequence[ChannelGroup], batches: Iterable[Any], plan: PruningPlan
    ) -> PruningPlan:
        """Chooses anew which channels stay, at the numbers that a plan gives every group; by default, the same ones.

        For criteria that judge sets of channels, and need to know how many will stay.

        Args:
            model: As for `score`.
            groups: As for `score`.
            batches: As for `score`.
            plan: What `select` made of the scores; the same on all processes.
        """
        return plan


def known(kind: str, name: str, names: Iterable[str]) -> str:
    """Returns `name` if it is one of `names`.

    Raises:
        RecipeError: It is not; the message offers the nearest one.
    """
    names = sorted(names)
    if name not in names:
        near = difflib.get_close_matches(str(name), names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RecipeError(f"unknown {kind} {name!r}{hint} (known: {', '.join(names)})")
    return name


def known_criteria() -> list[str]:
    """Names of all registered criteria."""
    return sorted(_CRITERIA)


def criterion(name: str, options: Mapping[str, Any] | None = None, seed: int | None = None) -> Criterion:
    """Builds a registered criterion by name.

    Args:
        name: Of the criterion.
        options: Its own.
        seed: Of what it draws, for one that has a seed among its options and is given none there.

    Raises:
        RecipeError: Unknown name or option, or a value out of range.
    """
    kind, given = _CRITERIA[known("criterion", name, _CRITERIA)], dict(options or {})
    if seed is not None and "seed" in inspect.signature(kind).parameters:
        given.setdefault("seed", seed)
    try:
        return kind(**given)
    except TypeError as error:
        raise RecipeError(f"criterion {name!r}: {error}") from None


def rank(values: Tensor) -> Tensor:
    """Mid-ranks over the layer as quantiles in (0, 1), mean 1/2; differences below 1e-7 are ties."""
    return torch.from_numpy((rankdata(values.round(decimals=7).numpy()) - 0.5) / len(values))


def minmax(values: Tensor) -> Tensor:
    """The layer's smallest value becomes 0, its largest 1; a constant layer is 0."""
    spread = values - values.min()
    return spread / spread.max().clamp(min=torch.finfo(values.dtype).tiny)


def mean(values: Tensor) -> Tensor:
    """Values relative to the layer's mean; a layer of zeros stays 0."""
    return values / values.mean().clamp(min=torch.finfo(values.dtype).tiny)


NORMALISATIONS: dict[str, Callable[[Tensor], Tensor]] = {"rank": rank, "minmax": minmax, "mean": mean}


def fuse(group: ChannelGroup, rows: Sequence[Tensor], normalise: Callable[[Tensor], Tensor]) -> Tensor:
    """Importances of a group's channels from those of its producers' output rows.

    A channel's value in a layer is the mean over its rows; values are normalised over the layer's channels, then
    averaged over the layers that compute the channel.

    Args:
        group: The group.
        rows: For each of `group.taps`, a value for each of its weight's rows, (O,); rows of no channel are not read.
        normalise: Maps the values of one layer's channels to values that are comparable between layers.

    Returns:
        (group.size,) float64 on the CPU.

    Raises:
        ModelError: The group has a channel that none of its taps computes.
    """
    total = torch.zeros(group.size, dtype=torch.float64)
    layers = torch.zeros(group.size, dtype=torch.float64)
    for tap, values in zip(group.taps, rows, strict=True):
        channel = torch.as_tensor(tap.channel_of_row)
        held = channel >= 0
        present, index, count = channel[held].unique(return_inverse=True, return_counts=True)
        sums = torch.zeros(len(present), dtype=torch.float64)
        sums.index_add_(0, index, values.detach().to("cpu", torch.float64)[held])
        total[present] += normalise(sums / count)
        layers[present] += 1
    if not layers.all():
        orphan = int(layers.argmin())
        raise ModelError(f"group {group.name!r}: no producer to watch for channel {orphan}; protect this group")
    return total / layers


@dataclass(kw_only=True)
class RowCriterion(Criterion):
    """A criterion that values each producer's output rows by themselves; a group takes the mean over its producers.

    Attributes:
        normalisation: What makes the values of layers comparable: "mean" (relative to the layer's mean), "minmax" or
            "rank".
    """

    normalisation: str = "mean"

    def __post_init__(self) -> None:
        known("normalisation", self.normalisation, NORMALISATIONS)

    @abstractmethod
    def rows(self, model: nn.Module, taps: Sequence[Tap], batches: Iterable[Any]) -> list[Tensor]:
        """For each tap a value for each row of its weight, (O,), higher is kept."""

    def score(self, model: nn.Module, groups: Sequence[ChannelGroup], batches: Iterable[Any]) -> dict[str, Tensor]:
        """See `Criterion.score`."""
        values = iter(self.rows(model, [tap for group in groups for tap in group.taps], batches))
        normalise = NORMALISATIONS[self.normalisation]
        return {group.name: fuse(group, [next(values) for _ in group.taps], normalise) for group in groups}
