"""A model's outputs, and how much each varies over the images: the unit in which its errors are measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from scap_hub.placement import fed
from scap_hub.private import tree_leaves

_ROUNDING = 1e-9  # of the mean square; less is not told from an output that never changes
_TINY = torch.finfo(torch.float32).tiny  # the inverse of less is infinite in single precision


def outputs_of(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Every floating-point output of a model that has a row for each image."""
    return floating_outputs(model(fed(model, images)), len(images))


def floating_outputs(result: Any, images: int) -> list[Tensor]:
    """The floating-point tensors in what a model returned that have a row for each of so many images."""
    return [
        leaf
        for leaf in tree_leaves(result)
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim and len(leaf) == images
    ]


class Spread:
    """How much outputs vary over images, batch by batch."""

    def __init__(self) -> None:
        self._count = 0
        self._sums: list[Tensor] = []
        self._squares: list[Tensor] = []

    def add(self, leaves: Sequence[Tensor]) -> None:
        """Counts one batch of this process: the outputs, each (N, ...)."""
        values = [leaf.double().flatten(1) for leaf in leaves]
        self._count += len(values[0]) if values else 0
        totals, energies = [z.sum(0).cpu() for z in values], [z.square().sum().cpu() for z in values]
        self._sums = [a + b for a, b in zip(self._sums, totals, strict=True)] if self._sums else totals
        self._squares = [a + b for a, b in zip(self._squares, energies, strict=True)] if self._squares else energies

    def inverse_variances(self) -> list[float]:
        """See `inverse_variances`; over the batches of all processes."""
        parts = [part for part in gather_object([(self._count, self._sums, self._squares)]) if part[0]]
        images = sum(part[0] for part in parts)
        variances = []
        for own in zip(*(zip(part[1], part[2], strict=True) for part in parts), strict=True):
            total, square = (sum(values) for values in zip(*own, strict=True))
            variance = float(square - total.square().sum() / images)
            variances.append(variance if variance > max(_ROUNDING * float(square), _TINY) else 0.0)
        changing = sum(variance > 0 for variance in variances)
        return [1 / (variance * changing) if variance > 0 else 0.0 for variance in variances]


def inverse_variances(outputs: Iterable[Sequence[Tensor]]) -> list[float]:
    """Factors that make squared distances of outputs, summed over all images, relative to their variance.

    Args:
        outputs: Batches of this process: the outputs, each (N, ...).

    Returns:
        For each output a factor; with them the distances of the outputs add up to their mean relative error. 0 for an
        output that does not change but for rounding.
    """
    spread = Spread()
    for leaves in outputs:
        spread.add(leaves)
    return spread.inverse_variances()
