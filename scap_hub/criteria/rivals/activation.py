"""Mean magnitude of the activations (Molchanov et al., 2017, arXiv 1611.06440, section 2.2)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from scap_hub.channels.taps import Tap
from scap_hub.criteria.calibration import image_means
from scap_hub.criteria.rows import RowCriterion


@dataclass(kw_only=True)
class Activation(RowCriterion):
    """Mean absolute activation of the channel, as the next layer sees it, over images and places."""

    name: ClassVar[str] = "activation"
    passes: ClassVar[float | None] = 1.0

    def rows(self, model: nn.Module, taps: Sequence[Tap], batches: Iterable[Any]) -> list[Tensor]:
        """See `RowCriterion.rows`."""
        return image_means(model, taps, batches, lambda grid, y: y.abs().reshape(*y.shape[:2], -1).mean(2))
