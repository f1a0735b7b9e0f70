"""Magnitude of the filters (Li et al., 2017, arXiv 1608.08710)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from scap_hub.channels.groups import ChannelGroup, Tap
from scap_hub.criteria.base import NORMALISATIONS, Criterion, fuse, known


def l1_norm(model: nn.Module, tap: Tap) -> Tensor:
    """L1 norm of each filter of the layer, (O,) float64."""
    return model.get_parameter(tap.weight).detach().double().abs().flatten(1).sum(1)


@dataclass(kw_only=True)
class L1(Criterion):
    """The mean, over the layers that compute a channel, of its filter's layer-normalised L1 norm.

    Attributes:
        normalisation: "mean" (relative to the layer's mean filter), "minmax" or "rank".
    """

    name: ClassVar[str] = "l1"
    normalisation: str = "mean"

    def __post_init__(self) -> None:
        known("normalisation", self.normalisation, NORMALISATIONS)

    def score(self, model: nn.Module, groups: Sequence[ChannelGroup], batches: Iterable[Any]) -> dict[str, Tensor]:
        """See `Criterion.score`; the batches are not read."""
        normalise = NORMALISATIONS[self.normalisation]
        return {group.name: fuse(group, [l1_norm(model, tap) for tap in group.taps], normalise) for group in groups}
