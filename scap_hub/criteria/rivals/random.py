"""Random importances: the floor every criterion must beat."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from scap_hub.channels.groups import ChannelGroup
from scap_hub.criteria.base import Criterion
from scap_hub.scores import Scores


def generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on the seed and the name only, not on the order of calls."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))


@dataclass(kw_only=True)
class Random(Criterion):
    """Uniform importances in [0, 1).

    Attributes:
        seed: Draws of a group depend on this and on the group's name.
    """

    name: ClassVar[str] = "random"
    passes: ClassVar[float | None] = 0.0
    seed: int = 0

    def score(self, model: nn.Module, groups: Sequence[ChannelGroup], batches: Iterable[Any]) -> Scores:
        """See `Criterion.score`; neither the model nor the batches are read."""
        draws = {
            group.name: torch.rand(group.size, generator=generator(self.seed, group.name), dtype=torch.float64)
            for group in groups
        }
        return Scores(draws, self.scope)
