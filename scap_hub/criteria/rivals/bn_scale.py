"""Scale of the norm after a channel: network slimming (Liu et al., 2017, arXiv 1708.06519)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from scap_hub.channels.groups import ChannelGroup
from scap_hub.criteria.base import NORMALISATIONS, Criterion, known
from scap_hub.errors import ModelError
from scap_hub.private import NormBase

_NORMS = (NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


@dataclass(kw_only=True)
class BNScale(Criterion):
    """The mean, over the norms that a channel passes, of its layer-normalised |gamma|.

    Groups without a norm get no scores, and so stay whole.

    Attributes:
        normalisation: "mean", "minmax" or "rank", over the norm's channels.
    """

    name: ClassVar[str] = "bn_scale"
    normalisation: str = "mean"

    def __post_init__(self) -> None:
        known("normalisation", self.normalisation, NORMALISATIONS)

    def score(self, model: nn.Module, groups: Sequence[ChannelGroup], batches: Iterable[Any]) -> dict[str, Tensor]:
        """See `Criterion.score`; the batches are not read.

        Raises:
            ModelError: No group passes a norm with a scale.
        """
        scores = {group.name: self._scales(model, group) for group in groups}
        scaled = {name: values for name, values in scores.items() if values is not None}
        if groups and not scaled:
            raise ModelError("criterion 'bn_scale': no channel passes a norm with a scale; use another, such as 'l2'")
        return scaled

    def _scales(self, model: nn.Module, group: ChannelGroup) -> Tensor | None:
        assert group.space is not None
        total = torch.zeros(group.size, dtype=torch.float64)
        norms = torch.zeros(group.size, dtype=torch.float64)
        place = torch.full((group.space.count,), -1)
        place[torch.from_numpy(group.channels)] = torch.arange(group.size)
        for tensor in dict.fromkeys(name for name, _ in group.members):
            path, _, leaf = tensor.rpartition(".")
            if leaf != "weight" or not isinstance(model.get_submodule(path), _NORMS):
                continue
            ids = group.space.tensors[tensor].layers[0].reshape(-1)
            gamma = model.get_parameter(tensor).detach().double().abs().cpu()
            own = place[torch.from_numpy(ids)]
            held = own >= 0
            present, index, count = own[held].unique(return_inverse=True, return_counts=True)
            sums = torch.zeros(len(present), dtype=torch.float64).index_add_(0, index, gamma[held])
            total[present] += NORMALISATIONS[self.normalisation](sums / count)
            norms[present] += 1
        # A channel that passes no norm, beside others that do, counts as an average one.
        known_ones = norms > 0
        if not known_ones.any():
            return None
        return torch.where(known_ones, total / norms.clamp(min=1), (total / norms.clamp(min=1))[known_ones].mean())
