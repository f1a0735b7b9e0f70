"""Rank of the feature maps (Lin et al., 2020, arXiv 2002.10179)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from scap_hub.channels.taps import Tap
from scap_hub.criteria.calibration import image_means
from scap_hub.criteria.layouts import on_grid
from scap_hub.criteria.rows import RowCriterion


@dataclass(kw_only=True)
class HRank(RowCriterion):
    """Mean over images of the matrix rank of the channel's map; without two axes it is 0 or 1."""

    name: ClassVar[str] = "hrank"
    passes: ClassVar[float | None] = 4.0

    def rows(self, model: nn.Module, taps: Sequence[Tap], batches: Iterable[Any]) -> list[Tensor]:
        """See `RowCriterion.rows`."""
        return image_means(model, taps, batches, _ranks)


def _ranks(grid: Sequence[int], y: Tensor) -> Tensor:
    maps = on_grid(y, grid).float().nan_to_num()  # `watch` refuses what is not finite, and names it
    # A vector becomes a column; windows, (N, O, windows, places), are the rows of one map.
    maps = maps.reshape(*maps.shape[:2], -1, maps.shape[-1] if maps.ndim > 3 else 1)
    return torch.linalg.matrix_rank(maps)
