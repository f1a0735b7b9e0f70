"""Norms of the filters (Li et al., 2017, arXiv 1608.08710)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from scap_hub.channels.taps import Tap
from scap_hub.criteria.rows import RowCriterion


def filter_norm(model: nn.Module, tap: Tap, order: int) -> Tensor:
    """L1 or L2 norm of each filter of the layer, (O,) float64."""
    weight = model.get_parameter(tap.weight).detach()
    # In parts: a float64 copy of a whole fully connected layer would be the largest tensor of all.
    return torch.cat([rows.double().norm(order, dim=1) for rows in weight.flatten(1).split(64)])


@dataclass(kw_only=True)
class L1(RowCriterion):
    """L1 norm of the filter that computes the channel."""

    name: ClassVar[str] = "l1"
    passes: ClassVar[float | None] = 0.0

    def rows(self, model: nn.Module, taps: Sequence[Tap], batches: Iterable[Any]) -> list[Tensor]:
        """See `RowCriterion.rows`; the batches are not read."""
        return [filter_norm(model, tap, 1) for tap in taps]


@dataclass(kw_only=True)
class L2(RowCriterion):
    """L2 norm of the filter that computes the channel."""

    name: ClassVar[str] = "l2"
    passes: ClassVar[float | None] = 0.0

    def rows(self, model: nn.Module, taps: Sequence[Tap], batches: Iterable[Any]) -> list[Tensor]:
        """See `RowCriterion.rows`; the batches are not read."""
        return [filter_norm(model, tap, 2) for tap in taps]
