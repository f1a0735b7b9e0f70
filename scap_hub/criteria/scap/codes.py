"""Spectral codes of what layers read: what the autoencoder of a channel's field keeps of the channel's spectrum."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scap_hub.channels.groups import ChannelGroup
from scap_hub.channels.taps import Tap
from scap_hub.criteria.obs.blocks import BlockKey, ConsumerBlock, blocks_of
from scap_hub.criteria.obs.moments import BlockSums
from scap_hub.criteria.patches import PatchLayer, views
from scap_hub.criteria.scap.autoencoder import pca
from scap_hub.criteria.scap.field import Field
from scap_hub.criteria.scap.spectra import spectrum
from scap_hub.criteria.scap.sweep import fields


class CodeMoments:
    """Second moments, over images, of the codes of what some blocks see at each place of their kernels.

    Codes have the columns that patches have: one for each channel and place of the kernel.
    """

    def __init__(self, blocks: Iterable[ConsumerBlock], encoders: Mapping[str, Tensor], bins: int) -> None:
        """Starts empty.

        Args:
            blocks: Whose codes.
            encoders: For each layer E, (P, r): the code of a spectrum s in the order of `spectrum` is Eᵀ s.
            bins: Frequencies kept on each axis.
        """
        self._sums, self._encoders, self._bins = BlockSums(blocks), encoders, bins

    def add(self, path: str, layer: PatchLayer, x: Tensor, images: int) -> None:
        """Adds the input of a layer; one without axes, or with windows in its batch, has no spectrum."""
        if x.ndim < 3 or len(x) != images:
            return
        codes = torch.stack([self._codes(path, view) for view in views(layer, x)], 2)  # (N, C, window, r)
        codes = codes.flatten(1, 2).transpose(1, 2)  # (N, r, columns)
        in_blocks = codes.chunk(blocks_of(layer), 2)
        for block in self._sums.blocks[path]:
            columns = in_blocks[block.number]
            if layer.bias is not None:
                columns = torch.cat([columns, columns.new_zeros(*columns.shape[:2], 1)], 2)
            self._sums.add(block, columns.flatten(0, 1))

    def _codes(self, path: str, maps: Tensor) -> Tensor:
        spectra = spectrum(maps, maps.shape[2:], self._bins)
        encoder = self._encoders.get(path)
        # A map of another shape than the field has other bins; there the low-pass itself is the code.
        fits = encoder is not None and len(encoder) == spectra.shape[2]
        return spectra @ encoder.to(spectra) if fits else spectra  # type: ignore[union-attr]

    def totals(self) -> dict[BlockKey, Tensor]:
        """(n, n) float64 for each block that has any codes, over all processes."""
        return {key: total for key, total in self._sums.total().items() if total.trace() > 0}


def encoders(
    model: nn.Module, groups: Sequence[ChannelGroup], batches: Collection[Any], bins: int, latent: int
) -> dict[str, Tensor]:
    """Encoders of what layers read of some groups.

    Args:
        model: The model.
        groups: Its groups.
        batches: Calibration batches.
        bins: Frequencies kept on each axis.
        latent: Dimension of each producer's code.

    Returns:
        By path of the layer that reads, E (P, r) with E Eᵀ = V Vᵀ, summed over the producers that it reads, see
        `_projector`; the inner products of codes are thus those of the producers' codes.
    """

    def measure(tap: Tap, samples: Field) -> Tensor:
        return _projector(samples, latent)

    taps = [tap for group in groups for tap in group.taps]
    readers = {tap.weight: group.consumers for group in groups for tap in group.taps}
    projectors: dict[str, Tensor] = {}
    for tap, projector in fields(model, taps, batches, bins, True, measure):
        for path in readers[tap.weight]:
            if path not in projectors:
                projectors[path] = projector
            elif len(projectors[path]) == len(projector):
                projectors[path] = projectors[path] + projector
    return {path: _root(projector) for path, projector in projectors.items()}


def _projector(samples: Field, latent: int) -> Tensor:
    """V Vᵀ, (P, P), where V is the part of the principal directions that lies in a channel's spectrum."""
    directions = pca(samples, latent).decoder
    directions = directions / torch.linalg.vector_norm(directions, dim=0).clamp(min=1e-30)
    in_channel = directions[samples.x.shape[1] :]
    return (in_channel @ in_channel.T).cpu()


def _root(symmetric: Tensor) -> Tensor:
    value, vector = torch.linalg.eigh(symmetric)
    return vector * value.clamp(min=0).sqrt()
