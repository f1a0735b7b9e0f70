"""Scale of the norm after a channel: network slimming (Liu et al., 2017, arXiv 1708.06519)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from scap_hub.channels.decoding import is_norm, rows_of
from scap_hub.channels.groups import ChannelGroup
from scap_hub.criteria.base import Criterion, one_of
from scap_hub.criteria.rows import NORMALISATIONS, channel_means
from scap_hub.errors import ModelError
from scap_hub.scores import Scores


@dataclass(kw_only=True)
class BNScale(Criterion):
    """The mean, over the norms that a channel passes, of its layer-normalised |gamma|.

    Groups without a norm get no scores, and so stay whole.

    Attributes:
        normalisation: "mean", "minmax" or "rank", over the norm's channels.
    """

    name: ClassVar[str] = "bn_scale"
    passes: ClassVar[float | None] = 0.0
    normalisation: str = "mean"

    def __post_init__(self) -> None:
        one_of("normalisation", self.normalisation, NORMALISATIONS)

    def score(self, model: nn.Module, groups: Sequence[ChannelGroup], batches: Iterable[Any]) -> Scores:
        """See `Criterion.score`; the batches are not read.

        Raises:
            ModelError: No group passes a norm with a scale.
        """
        scales = {group.name: self._scales(model, group) for group in groups}
        importance = {name: values for name, values in scales.items() if values is not None}
        if groups and not importance:
            raise ModelError("criterion 'bn_scale': no channel passes a norm with a scale; use another, such as 'l2'")
        return Scores(importance, self.scope)

    def _scales(self, model: nn.Module, group: ChannelGroup) -> Tensor | None:
        total = torch.zeros(group.size, dtype=torch.float64)
        norms = torch.zeros(group.size, dtype=torch.float64)
        for tensor in dict.fromkeys(name for name, _ in group.members):
            path, _, leaf = tensor.rpartition(".")
            if leaf != "weight" or not is_norm(model.get_submodule(path)):
                continue
            gamma = model.get_parameter(tensor).detach().double().abs().cpu()
            channels, means = channel_means(gamma, torch.from_numpy(rows_of(group, tensor)))
            total[channels] += NORMALISATIONS[self.normalisation](means)
            norms[channels] += 1
        scaled = norms > 0
        if not scaled.any():
            return None
        # A channel that passes no norm, beside others that do, counts as an average one.
        mean = total / norms.clamp(min=1)
        return torch.where(scaled, mean, mean[scaled].mean())
