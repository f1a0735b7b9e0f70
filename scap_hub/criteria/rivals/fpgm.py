"""Filter pruning via geometric median (He et al., 2019, arXiv 1811.00250)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from scap_hub.channels.taps import Tap
from scap_hub.criteria.rows import RowCriterion


@dataclass(kw_only=True)
class FPGM(RowCriterion):
    """Sum of the filter's Euclidean distances to its layer's filters: those near all others are said by them."""

    name: ClassVar[str] = "fpgm"
    passes: ClassVar[float | None] = 0.0

    def rows(self, model: nn.Module, taps: Sequence[Tap], batches: Iterable[Any]) -> list[Tensor]:
        """See `RowCriterion.rows`; the batches are not read."""
        filters = [model.get_parameter(tap.weight).detach().double().flatten(1) for tap in taps]
        return [torch.cdist(own, own, compute_mode="donot_use_mm_for_euclid_dist").sum(1) for own in filters]
