"""From values of a layer's output rows to importances of a group's channels."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scap_hub.channels.groups import ChannelGroup
from scap_hub.channels.taps import Tap
from scap_hub.criteria.base import Criterion, one_of
from scap_hub.errors import ModelError
from scap_hub.scores import Scores


def rank(values: Tensor) -> Tensor:
    """Mid-ranks over the layer as quantiles in (0, 1), mean 1/2; differences below 1e-7 are ties."""
    from scipy.stats import rankdata  # takes a second to import

    return torch.from_numpy((rankdata(values.round(decimals=7).numpy()) - 0.5) / len(values))


def minmax(values: Tensor) -> Tensor:
    """The layer's smallest value becomes 0, its largest 1; a constant layer is 0."""
    spread = values - values.min()
    return spread / spread.max().clamp(min=torch.finfo(values.dtype).tiny)


def mean(values: Tensor) -> Tensor:
    """Values relative to the layer's mean; a layer of zeros stays 0."""
    return values / values.mean().clamp(min=torch.finfo(values.dtype).tiny)


NORMALISATIONS: dict[str, Callable[[Tensor], Tensor]] = {"rank": rank, "minmax": minmax, "mean": mean}


def channel_means(values: Tensor, channel_of_row: Tensor) -> tuple[Tensor, Tensor]:
    """Means over the rows of each channel.

    Args:
        values: (O,) a value for each output row.
        channel_of_row: (O,) which channel each row belongs to, -1 for none.

    Returns:
        The channels that have rows, ascending, and their means, float64 on the CPU.
    """
    held = channel_of_row >= 0
    channels, index, count = channel_of_row[held].unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(channels), dtype=torch.float64)
    sums.index_add_(0, index, values.detach().to("cpu", torch.float64)[held])
    return channels, sums / count


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
    producers = torch.zeros(group.size, dtype=torch.float64)
    for tap, values in zip(group.taps, rows, strict=True):
        channels, means = channel_means(values, torch.as_tensor(tap.channel_of_row))
        total[channels] += normalise(means)
        producers[channels] += 1
    if not producers.all():
        orphan = int(producers.argmin())
        raise ModelError(f"group {group.name!r}: no producer to watch for channel {orphan}; protect this group")
    return total / producers


@dataclass(kw_only=True)
class RowCriterion(Criterion):
    """A criterion that values each producer's output rows by themselves; a group takes the mean over its producers.

    Attributes:
        normalisation: What makes the values of layers comparable: "mean" (relative to the layer's mean), "minmax" or
            "rank".
    """

    normalisation: str = "mean"

    def __post_init__(self) -> None:
        one_of("normalisation", self.normalisation, NORMALISATIONS)

    @abstractmethod
    def rows(self, model: nn.Module, taps: Sequence[Tap], batches: Iterable[Any]) -> list[Tensor]:
        """For each tap a value for each row of its weight, (O,), higher is kept."""

    def score(self, model: nn.Module, groups: Sequence[ChannelGroup], batches: Iterable[Any]) -> Scores:
        """See `Criterion.score`."""
        values = iter(self.rows(model, [tap for group in groups for tap in group.taps], batches))
        normalise = NORMALISATIONS[self.normalisation]
        importance = {group.name: fuse(group, [next(values) for _ in group.taps], normalise) for group in groups}
        return Scores(importance, self.scope)
