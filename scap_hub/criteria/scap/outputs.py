"""What the model's outputs lose when a group's channels leave one after the other: how wide a group should stay."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.state import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn

from scap_hub.channels.decoding import staying
from scap_hub.channels.groups import ChannelGroup
from scap_hub.criteria.calibration import images_of
from scap_hub.criteria.obs.blocks import Compensated, write_compensated
from scap_hub.criteria.obs.elimination import eliminate
from scap_hub.criteria.scap.spectra import spectrum
from scap_hub.graph.record import evaluating
from scap_hub.placement import fed
from scap_hub.private import tree_leaves

WIDTHS = (0.75, 0.5, 0.25, 0.1)


class Outputs:
    """A model's outputs on some of the calibration images; of outputs that are maps, the low-pass spectra."""

    def __init__(self, model: nn.Module, batches: Collection[Any], bins: int, probes: int) -> None:
        """Runs the model.

        Args:
            model: The dense model.
            batches: This process's calibration images.
            bins: Frequencies kept on each axis of an output that is a map.
            probes: How many of the images, over all processes.
        """
        self._bins = bins
        self._model = copy.deepcopy(model)
        self._images = _probes(batches, probes)
        self._dense = list(self._run())
        self._variances = _variances(self._dense)

    def curve(self, group: ChannelGroup, compensated: Compensated) -> tuple[list[int], list[tuple[int, float]]]:
        """Eliminates a group, and looks at the outputs whenever its width is one of `WIDTHS`.

        Args:
            group: All of its channels leave in the end.
            compensated: The blocks that read it, with all of its channels; used up.

        Returns:
            The channels in the order in which they leave; and how many have left, with the error of the outputs: their
            squared distance from the dense model's, relative to the variance over the images, mean over the outputs.
        """
        one_class, weights = torch.zeros(group.size, dtype=torch.long), [weight for _, weight in compensated]
        layers = [self._model.get_submodule(path) for path in {block.path for block, _ in compensated}]
        dense = [copy.deepcopy(layer.state_dict()) for layer in layers]
        gone: list[int] = []
        errors = [(0, 0.0)]
        for width in dict.fromkeys(max(1, round(share * group.size)) for share in WIDTHS):
            if width == group.size:
                continue
            gone = eliminate(weights, one_class, [width], gone)
            left = sorted(set(range(group.size)) - set(gone))
            write_compensated(self._model, compensated, staying([group], {group.name: left}))
            errors.append((len(gone), self._error()))
            for layer, state in zip(layers, dense, strict=True):
                layer.load_state_dict(state)
        return eliminate(weights, one_class, [0], gone), errors

    def _error(self) -> float:
        """Squared distance from the dense outputs, relative to their variance, mean over the outputs."""
        found = [
            [float((z - dense).square().sum()) for z, dense in zip(leaves, kept, strict=True)]
            for leaves, kept in zip(self._run(), self._dense, strict=True)
        ]
        leaves = [leaves for part in gather_object([found]) for leaves in part]
        totals = [sum(values) for values in zip(*leaves, strict=True)]
        shares = [total / max(variance, 1e-30) for total, variance in zip(totals, self._variances, strict=True)]
        return sum(shares) / max(len(shares), 1)

    def _run(self) -> Iterator[list[Tensor]]:
        """For each batch, every output as (N, q)."""
        with evaluating(self._model), torch.no_grad():
            for images in self._images:
                leaves = tree_leaves(self._model(fed(self._model, images)))
                yield [
                    (spectrum(leaf, leaf.shape[2:], self._bins) if leaf.ndim > 2 else leaf.float()).flatten(1)
                    for leaf in leaves
                    if isinstance(leaf, Tensor) and leaf.is_floating_point() and len(leaf) == len(images)
                ]


def _variances(outputs: Sequence[Sequence[Tensor]]) -> list[float]:
    """Of each output, its variance over the images of all processes, times their number, summed over its elements."""
    sums = [[(len(z), z.sum(0).double().cpu(), z.square().sum().double().cpu()) for z in leaves] for leaves in outputs]
    batches = [leaves for part in gather_object([sums]) for leaves in part]
    variances = []
    for leaf in zip(*batches, strict=True):
        count, total, square = (sum(values) for values in zip(*leaf, strict=True))
        variances.append(float(square - total.square().sum() / count))
    return variances


def marginal(order: Sequence[int], errors: Sequence[tuple[int, float]]) -> Tensor:
    """What the outputs lose for each channel, on the convex hull of the errors, so that it grows from one to the next.

    Args:
        order: The channels in the order in which they leave.
        errors: How many have left, with the error; without any channel left, all of the variance is lost at least.

    Returns:
        (size,) float64.
    """
    hull: list[tuple[int, float]] = []
    for point in [*errors, (len(order), max(1.0, 2 * errors[-1][1]))]:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    values = torch.zeros(len(order), dtype=torch.float64)
    for start, end in itertools.pairwise(hull):
        values[start[0] : end[0]] = max(_slope(start, end), 1e-12)
    values *= 1 + 1e-6 * torch.arange(len(order))  # within a segment, the order decides
    return torch.zeros_like(values).index_copy_(0, torch.tensor(order), values)


def _slope(start: tuple[int, float], end: tuple[int, float]) -> float:
    return (end[1] - start[1]) / (end[0] - start[0])


def _probes(batches: Collection[Any], count: int) -> list[Tensor]:
    """This process's part of `count` calibration images, spread evenly over all of them.

    Images that are dealt to the processes in turns are the same ones on any number of processes.
    """
    images = [images_of(batch) for batch in batches]
    rank, own = PartialState().process_index, sum(map(len, images))
    everyone = sorted((place, other) for other, held in enumerate(gather_object([own])) for place in range(held))
    spread = np.linspace(0, len(everyone) - 1, min(count, len(everyone))).round().astype(int)
    chosen = torch.zeros(own, dtype=torch.bool)
    chosen[[place for place, holder in (everyone[index] for index in spread) if holder == rank]] = True
    parts = chosen.split([len(batch) for batch in images])
    probes = [batch[part.to(batch.device)] for batch, part in zip(images, parts, strict=True)]
    return [batch for batch in probes if len(batch)]
