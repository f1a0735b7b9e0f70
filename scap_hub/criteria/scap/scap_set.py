"""SCAP on sets of channels: elimination on spectral codes and patches."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from scap_hub.channels.groups import ChannelGroup
from scap_hub.criteria.base import share, whole_number
from scap_hub.criteria.calibration import count_images
from scap_hub.criteria.obs.blocks import BlockKey, ConsumerBlock, by_layer
from scap_hub.criteria.obs.criterion import OBS, Importances, Readable
from scap_hub.criteria.obs.inputs import read_inputs
from scap_hub.criteria.obs.moments import PatchMoments
from scap_hub.criteria.patches import PatchLayer
from scap_hub.criteria.scap.codes import CodeMoments, encoders
from scap_hub.criteria.scap.criterion import check_size
from scap_hub.criteria.scap.outputs import Outputs, eliminated, marginal, portions

_TOGETHER = 4  # images that run at once while gradients of outputs are measured


@dataclass(kw_only=True)
class ScapSet(OBS):
    """OBS whose importances say what the model's outputs lose, so that groups can be compared and widths follow.

    On request, spectral codes say, with the patches, how far the channels that stay can stand in for one that leaves. A
    code is what the autoencoder of a channel's field keeps of the channel's spectrum. It is taken of what the layer
    that reads the group sees at each place of its kernel, so that codes have the columns that patches have, and a
    second moment Z Zᵀ over the images, which is blended with the patches' P Pᵀ.

    A channel's importance is what the model's outputs lose when it leaves, after those of its group that left before
    it, and with the layers that read it compensated. Between groups, it is compared for what their channels cost.

    Attributes:
        bins: As for `Scap`.
        latent: As for `Scap`; the autoencoder is PCA.
        blend: Share of the codes, 0 to 1. At equal widths they gave nothing that shows, so by default there are none.
        frequency_weights: Whether errors of a layer count at each frequency of its map as the gradients of the model's
            outputs do there, see `scap_hub.criteria.frequencies`, or all alike.
        probes: Calibration images on which it is measured what the outputs lose.
    """

    name: ClassVar[str] = "scap-set"
    passes: ClassVar[float | None] = 6.0
    scope: ClassVar[str] = "cost-aware"
    bins: int = 7
    latent: int = 16
    blend: float = 0.0
    frequency_weights: bool = True
    probes: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size(self.bins, self.latent)
        share("blend", self.blend, "the codes")
        whole_number("probes", self.probes, 2, ", because a loss is measured against the variance over images")

    def _importances(self, model: nn.Module, batches: Collection[Any]) -> Importances:
        outputs = Outputs(model, batches, self.bins, self.probes)

        def lost(groups: Readable) -> dict[str, Tensor]:
            importance = {}
            for portion in portions(eliminated(model, group, compensated) for group, compensated in groups):
                for elimination, errors in zip(portion, outputs.errors(portion), strict=True):
                    if errors is not None:
                        importance[elimination.group.name] = marginal(elimination.order, errors)
            return importance

        return lost

    def _powers(
        self, model: nn.Module, blocks: Sequence[ConsumerBlock], batches: Collection[Any]
    ) -> Mapping[str, Tensor]:
        if not self.frequency_weights:
            return {}
        return Outputs(model, batches, self.bins, self.probes, _TOGETHER).powers(by_layer(blocks))

    def _moments(
        self,
        model: nn.Module,
        groups: Sequence[ChannelGroup],
        blocks: Sequence[ConsumerBlock],
        batches: Collection[Any],
    ) -> dict[BlockKey, Tensor]:
        if not self.blend:
            return super()._moments(model, groups, blocks, batches)
        patches = PatchMoments(blocks, count_images(batches), self._powers(model, blocks, batches))
        codes = CodeMoments(blocks, encoders(model, groups, batches, self.bins, self.latent), self.bins)

        def read(path: str, layer: PatchLayer, x: Tensor, images: int) -> None:
            patches.add(path, layer, x, images)
            codes.add(path, layer, x, images)

        read_inputs(model, patches.paths, batches, read)
        moments = patches.means()
        for key, code in codes.totals().items():
            # Both get the same trace before they are blended.
            scale = moments[key].trace() / code.trace().clamp(min=torch.finfo(code.dtype).tiny)
            moments[key] = (1 - self.blend) * moments[key] + self.blend * scale * code
        return moments
