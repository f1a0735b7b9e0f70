"""SCAP on sets of channels: elimination on spectral codes and patches."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from scap_hub.channels.groups import ChannelGroup, Tap
from scap_hub.criteria.calibration import enough, images_of
from scap_hub.criteria.obs.criterion import OBS, Consumer, Judge, PatchMoments, accumulate, over_processes, read_inputs
from scap_hub.criteria.patches import Reader, padded
from scap_hub.criteria.scap.autoencoder import pca
from scap_hub.criteria.scap.criterion import check_size
from scap_hub.criteria.scap.field import Field
from scap_hub.criteria.scap.outputs import Outputs, marginal
from scap_hub.criteria.scap.spectra import spectrum
from scap_hub.criteria.scap.sweep import fields
from scap_hub.errors import RecipeError


@dataclass(kw_only=True)
class ScapSet(OBS):
    """OBS in which codes say, with the patches, how far the channels that stay can stand in for one that leaves.

    A code is what the autoencoder of a channel's field keeps of the channel's spectrum. It is taken of what the layer
    that reads the group sees at each offset of its kernel, so that codes have the columns that patches have, and a
    second moment Z Zᵀ over the images, which is blended with the patches' P Pᵀ.

    A channel's importance is what the model's outputs lose when it leaves, after those of its group that left before
    it, and with the layers that read it compensated. Between groups, it is compared for what their channels cost.

    Attributes:
        bins: As for `Scap`.
        latent: As for `Scap`; the autoencoder is PCA.
        blend: Share of the codes, 0 to 1.
        probes: Calibration images on which it is measured what the outputs lose.
    """

    name: ClassVar[str] = "scap-set"
    scope: ClassVar[str] = "cost-aware"
    bins: int = 7
    latent: int = 16
    blend: float = 0.5
    probes: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size(self.bins, self.latent)
        if not 0 <= self.blend <= 1:
            raise RecipeError(f"blend = {self.blend}: give the share of the codes, from 0 to 1")
        if self.probes < 2:
            raise RecipeError(f"probes = {self.probes}: a loss is measured against the variance over 2 images or more")

    def _judge(self, model: nn.Module, batches: Collection[Any]) -> Judge:
        outputs = Outputs(model, batches, self.bins, self.probes)
        return lambda group, readings: marginal(*outputs.curve(group, readings))

    def _grams(
        self, model: nn.Module, groups: Sequence[ChannelGroup], consumers: Sequence[Consumer], batches: Collection[Any]
    ) -> dict[tuple[str, int], Tensor]:
        patches = PatchMoments(consumers, enough(sum(len(images_of(batch)) for batch in batches)))
        codes = CodeMoments(consumers, self._metrics(model, groups, batches), self.bins)

        def read(path: str, layer: Reader, x: Tensor, images: int) -> None:
            patches.add(path, layer, x, images)
            codes.add(path, layer, x, images)

        read_inputs(model, patches.consumers, batches, read)
        grams, others = patches.means(), codes.moments()
        for key, other in others.items():
            # Both get the same mean diagonal before they are blended.
            scale = grams[key].trace() / other.trace().clamp(min=torch.finfo(other.dtype).tiny)
            grams[key] = (1 - self.blend) * grams[key] + self.blend * scale * other
        return grams

    def _metrics(self, model: nn.Module, groups: Sequence[ChannelGroup], batches: Collection[Any]) -> dict[str, Tensor]:
        """For each layer that reads a group, roots of V Vᵀ, summed over the producers it reads: (P, P)."""
        taps = [tap for group in groups for tap in group.taps]
        readers = {tap.weight: group.consumers for group in groups for tap in group.taps}
        metrics: dict[str, Tensor] = {}
        for tap, projector in fields(model, taps, batches, self.bins, True, self._projector):
            for path in readers[tap.weight]:
                if path not in metrics or len(metrics[path]) == len(projector):
                    accumulate(metrics, path, projector)
        return {path: _root(metric) for path, metric in metrics.items()}

    def _projector(self, tap: Tap, samples: Field) -> Tensor:
        """The projection of a channel's spectrum on the space of codes, V Vᵀ, (P, P)."""
        encoder = pca(samples, self.latent).decoder
        directions = encoder / torch.linalg.vector_norm(encoder, dim=0).clamp(min=1e-30)
        own = directions[samples.x.shape[1] :]
        return (own @ own.T).cpu()


def _root(metric: Tensor) -> Tensor:
    value, vector = torch.linalg.eigh(metric)
    return vector * value.clamp(min=0).sqrt()


class CodeMoments:
    """Second moments, over images, of the codes of what some consumers see at the offsets of their kernels."""

    def __init__(self, consumers: Sequence[Consumer], metrics: Mapping[str, Tensor], bins: int) -> None:
        """Starts empty; `metrics` are V in the order of `spectrum`, (P, r), by layer."""
        self.consumers = {(c.path, c.block): c for c in consumers}
        self.metrics, self.bins = metrics, bins
        self.sums: dict[tuple[str, int], Tensor] = {}

    def add(self, path: str, layer: Reader, x: Tensor, images: int) -> None:
        """Adds the input of a layer; one without axes, or with windows in its batch, has no spectrum."""
        if x.ndim < 3 or len(x) != images:
            return
        codes = torch.stack([self._codes(path, view) for view in offsets(layer, x)], 2)  # (N, C, window, r)
        codes = codes.flatten(1, 2).transpose(1, 2)  # (N, r, columns)
        for block, own in enumerate(codes.chunk(getattr(layer, "groups", 1), 2)):
            consumer = self.consumers.get((path, block))
            if consumer is not None:
                if layer.bias is not None:
                    own = torch.cat([own, own.new_zeros(*own.shape[:2], 1)], 2)
                own = own[:, :, torch.from_numpy(consumer.columns).to(own.device)].flatten(0, 1)
                accumulate(self.sums, (path, block), own.T @ own)

    def _codes(self, path: str, maps: Tensor) -> Tensor:
        spectra = spectrum(maps, maps.shape[2:], self.bins)
        root = self.metrics.get(path)
        # A map of another shape than the field has other bins; there the low-pass itself is the code.
        return spectra @ root.to(spectra) if root is not None and len(root) == spectra.shape[2] else spectra

    def moments(self) -> dict[tuple[str, int], Tensor]:
        """{(path, block): (n, n) float64} over all processes, for the layers that have any."""
        sums = over_processes(self.sums, _grouped(self.consumers))
        return {key: value for key, value in sums.items() if value.trace() > 0}


def _grouped(consumers: Mapping[tuple[str, int], Consumer]) -> dict[str, list[Consumer]]:
    paths: dict[str, list[Consumer]] = {}
    for (path, _), consumer in consumers.items():
        paths.setdefault(path, []).append(consumer)
    return paths


def offsets(layer: Reader, x: Tensor) -> list[Tensor]:
    """What each place of the layer's kernel sees, (N, C, *grid) each, in the order of the weight's window."""
    if isinstance(layer, nn.Linear):
        return [x.movedim(-1, 1)]
    x = padded(layer, x)
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    grid = [
        (size - gap * (width - 1) - 1) // step + 1
        for size, width, step, gap in zip(x.shape[2:], kernel, stride, dilation, strict=True)
    ]
    return [x[_window(offset, dilation, stride, grid)] for offset in product(*(range(width) for width in kernel))]


def _window(offset: Sequence[int], dilation: Sequence[int], stride: Sequence[int], grid: Sequence[int]) -> Any:
    """Indices of the input that one place of the kernel sees."""
    axes = [
        slice(place * gap, place * gap + (count - 1) * step + 1, step)
        for place, gap, step, count in zip(offset, dilation, stride, grid, strict=True)
    ]
    return (slice(None), slice(None), *axes)
