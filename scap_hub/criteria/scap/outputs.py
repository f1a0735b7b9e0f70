"""What the model's outputs lose when a group's channels leave one after the other: how wide a group should stay.

To first order, the outputs z change by J (W' - W) when the weights W of the layers that read a group become W'. The
length of that change is found without running the model again: for a vector v of random signs on the outputs,
E_v ⟨v, J (W' - W)⟩² = |J (W' - W)|², and ⟨v, J (W' - W)⟩ = ⟨g, W' - W⟩ with the gradient g = Jᵀ v, which one backward
pass gives for all groups and all of their widths at once.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import warnings
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.state import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn

from scap_hub.channels.decoding import staying
from scap_hub.channels.groups import ChannelGroup
from scap_hub.criteria.calibration import images_of
from scap_hub.criteria.frequencies import power_spectrum, summed
from scap_hub.criteria.obs.blocks import Compensated, ConsumerBlock, compensated_weight, weight_of
from scap_hub.criteria.obs.elimination import eliminate
from scap_hub.criteria.scap.spectra import spectrum
from scap_hub.criteria.variance import inverse_variances, outputs_of
from scap_hub.errors import CalibrationError
from scap_hub.graph.record import evaluating
from scap_hub.placement import fed, placement, raise_precision
from scap_hub.progress import track

WIDTHS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
VECTORS = 4  # of random signs, for each image; sixteen say little more
BYTES = 2**31  # of changes of weights that are held at a time; more take further passes over the images


@dataclass(frozen=True, eq=False)
class Elimination:
    """How a group's channels left, and what the layers that read it made of it.

    Attributes:
        group: The group.
        order: All of its channels, in the order in which they leave.
        gone: How many have left at each width that is looked at.
        changes: For each block that reads the group W' - W at each of these widths, (widths, O, m), the bias
            behind the weight where there is one.
    """

    group: ChannelGroup
    order: Sequence[int]
    gone: Sequence[int]
    changes: Sequence[tuple[ConsumerBlock, Tensor]]

    @property
    def bytes(self) -> int:
        """What the changes take."""
        return sum(change.nbytes for _, change in self.changes)


def eliminated(model: nn.Module, group: ChannelGroup, compensated: Compensated) -> Elimination:
    """Eliminates a group.

    Args:
        model: The dense model.
        group: All of its channels leave in the end.
        compensated: The blocks that read it, with all of its channels; used up.
    """
    one_class, weights = torch.zeros(group.size, dtype=torch.long), [weight for _, weight in compensated]
    changes: list[list[Tensor]] = [[] for _ in compensated]
    order: list[int] = []
    gone: list[int] = []
    for width in dict.fromkeys(max(1, round(share * group.size)) for share in WIDTHS):
        if width == group.size:
            continue
        order = eliminate(weights, one_class, [width], order)
        stays = staying([group], {group.name: sorted(set(range(group.size)) - set(order))})
        for found, (block, compensating) in zip(changes, compensated, strict=True):
            change = compensated_weight(model, block, compensating, stays) - weight_of(model, block)
            found.append(change.to(torch.promote_types(placement(model).dtype, torch.float32)))
        gone.append(len(order))
    order = eliminate(weights, one_class, [0], order)
    stacked = [(block, torch.stack(found)) for (block, _), found in zip(compensated, changes, strict=True) if found]
    return Elimination(group, order, gone, stacked)


def portions(eliminations: Iterator[Elimination]) -> Iterator[list[Elimination]]:
    """Eliminations whose changes take about `BYTES` together."""
    portion: list[Elimination] = []
    for elimination in eliminations:
        portion.append(elimination)
        if sum(held.bytes for held in portion) >= BYTES:
            yield portion
            portion = []
    if portion:
        yield portion


class Outputs:
    """A model's outputs on some of the calibration images; of outputs that are maps, the low-pass spectra."""

    def __init__(self, model: nn.Module, batches: Collection[Any], bins: int, probes: int, together: int = 1) -> None:
        """Runs the model.

        Args:
            model: The dense model.
            batches: This process's calibration images.
            bins: Frequencies kept on each axis of an output that is a map.
            probes: How many of the images, over all processes.
            together: How many of them run at once; `errors` needs each one's own gradients of the weights, so 1 there.
        """
        self._bins, self._together = bins, together
        self._model = copy.deepcopy(model).requires_grad_(False)
        raise_precision(self._model)
        self._probes = _probes(batches, probes)
        with evaluating(self._model), torch.no_grad():
            factors = inverse_variances(self._run(images) for images in self._batches())
        self._weights = [math.sqrt(factor) for factor in factors]

    def errors(self, eliminations: Sequence[Elimination]) -> list[list[tuple[int, float]] | None]:
        """What the outputs lose at each width of each elimination, to first order.

        Args:
            eliminations: The same ones on all processes.

        Returns:
            For each, how many channels have left, with the error of the outputs: their squared distance from the dense
            model's, relative to the variance over the images, mean over the outputs. None, with a warning, for a group
            that no gradient reaches.

        Raises:
            CalibrationError: A gradient is not finite.
        """
        read = _weights_read(self._model, eliminations)
        device = placement(self._model).device
        totals = [torch.zeros(len(own.gone), dtype=torch.float64, device=device) for own in eliminations]
        reached: set[str] = set()
        with evaluating(self._model), torch.enable_grad(), _trainable(read):
            for images in track(list(self._batches()), "output loss"):
                for gradients in self._gradients(images, read):
                    reached |= gradients.keys()
                    for total, elimination in zip(totals, eliminations, strict=True):
                        total += _change(elimination, gradients).square().double() / VECTORS
        everywhere = gather_object([(reached, [total.cpu() for total in totals])])
        reached = set().union(*(part for part, _ in everywhere))
        totals = [sum(parts) for parts in zip(*(part for _, part in everywhere), strict=True)]
        if not all(bool(total.isfinite().all()) for total in totals):
            raise CalibrationError(
                "NaN or Inf in the gradients of the model's outputs; check the images and the weights"
            )
        return [
            [(0, 0.0), *zip(elimination.gone, total.tolist(), strict=True)]
            if _is_reached(elimination, reached)
            else None
            for elimination, total in zip(eliminations, totals, strict=True)
        ]

    def powers(self, paths: Collection[str]) -> dict[str, Tensor]:
        """Power spectra of the outputs' gradients by what layers compute, over the images of all processes.

        Args:
            paths: Of the layers; a layer that runs several times has the sum.

        Returns:
            By path, see `power_spectrum`; none for a layer whose output is no map, or from which no gradient leads to
            the pixels.
        """
        found: dict[str, Tensor] = {}

        def after(path: str, layer: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
            # A hook on the tensor still has the gradient by this value when y is written to in place afterwards.
            if y.requires_grad:
                y.register_hook(partial(add, path, layer))

        def add(path: str, layer: nn.Module, gradient: Tensor) -> None:
            power = power_spectrum(layer, gradient)
            if power is not None:
                seen.append({path: power})

        seen: list[dict[str, Tensor]] = []
        with contextlib.ExitStack() as stack, evaluating(self._model), torch.enable_grad():
            for path in paths:
                layer = self._model.get_submodule(path)
                stack.callback(layer.register_forward_hook(partial(after, path)).remove)
            for images in track(list(self._batches()), "gradient spectra"):
                pixels = fed(self._model, images)
                if not pixels.is_floating_point():
                    continue
                pixels.requires_grad_()
                # Images do not see each other, so the gradients of a sum over them are each one's own.
                for projections in self._projections(images, self._run(pixels), 1):
                    torch.autograd.grad(projections, pixels, allow_unused=True)
                found, seen = summed([found, *seen]), []
        return summed(gather_object([found]))

    def _gradients(self, images: Tensor, read: Mapping[str, Sequence[Tensor]]) -> Iterator[dict[str, Tensor]]:
        """For each random vector, the gradients of ⟨v, outputs⟩: (O, m) for each layer that they reach."""
        tensors = list(itertools.chain(*read.values()))
        for number, projections in enumerate(self._projections(images, self._run(images), VECTORS), 1):
            retain = number < VECTORS
            found = torch.autograd.grad(projections, tensors, retain_graph=retain, allow_unused=True)
            by_tensor = dict(zip(map(id, tensors), found, strict=True))
            parts = {path: [by_tensor[id(tensor)] for tensor in own] for path, own in read.items()}
            yield {path: _beside(own) for path, own in parts.items() if all(part is not None for part in own)}

    def _projections(self, images: Tensor, outputs: Sequence[Tensor], vectors: int) -> Iterator[list[Tensor]]:
        """For each of so many random vectors v, ⟨v, outputs⟩ summed over images, by output, where it has a gradient."""
        # An image draws its own vectors, whichever process sees it.
        generators = [
            torch.Generator().manual_seed(zlib.crc32(image.float().cpu().numpy().tobytes())) for image in images
        ]
        for _ in range(vectors):
            projections = []
            for weight, z in zip(self._weights, outputs, strict=True):
                signs = [torch.randint(2, z.shape[1:], generator=generator) for generator in generators]
                projections.append(weight * (z * (torch.stack(signs) * 2 - 1).to(z)).sum())
            projections = [projection for projection in projections if projection.requires_grad]
            if projections:
                yield projections

    def _run(self, images: Tensor) -> list[Tensor]:
        """Every output for some images, (N, numbers)."""
        return [
            (spectrum(z, z.shape[2:], self._bins) if z.ndim > 2 else z.float()).flatten(1)
            for z in outputs_of(self._model, images)
        ]

    def _batches(self) -> Iterator[Tensor]:
        """The images, as many at a time as are to run at once, if they are alike."""
        for _, alike in itertools.groupby(self._probes, lambda image: (image.shape, image.dtype)):
            yield from torch.cat(list(alike)).split(self._together)


def _weights_read(model: nn.Module, eliminations: Iterable[Elimination]) -> dict[str, list[Tensor]]:
    """Weight and bias of the layers that read the groups, by path."""
    paths = sorted({block.path for elimination in eliminations for block, _ in elimination.changes})
    layers = {path: model.get_submodule(path) for path in paths}
    return {
        path: [tensor for tensor in (layer.weight, layer.bias) if tensor is not None]  # type: ignore[misc]
        for path, layer in layers.items()
    }


@contextlib.contextmanager
def _trainable(read: Mapping[str, Sequence[Tensor]]) -> Iterator[None]:
    """Gradients for these tensors alone."""
    tensors = list(itertools.chain(*read.values()))
    for tensor in tensors:
        tensor.requires_grad_(True)
    yield
    for tensor in tensors:
        tensor.requires_grad_(False)


def _is_reached(elimination: Elimination, reached: Collection[str]) -> bool:
    paths = {block.path for block, _ in elimination.changes}
    if paths and paths.isdisjoint(reached):
        warnings.warn(
            f"no gradient of the outputs reaches {', '.join(sorted(paths))}, which read channel group "
            f"{elimination.group.name!r}: how wide it stays is a guess",
            stacklevel=2,
        )
        return False
    return True


def _beside(gradients: Sequence[Tensor]) -> Tensor:
    """Gradients of a weight and its bias as `weight_of` has the two, (O, m)."""
    return torch.cat([gradient.reshape(len(gradient), -1) for gradient in gradients], 1)


def _change(elimination: Elimination, gradients: Mapping[str, Tensor]) -> Tensor:
    """⟨g, W' - W⟩ summed over the blocks that read the group, at each width, (widths,)."""
    parts = []
    for block, change in elimination.changes:
        if block.path in gradients:
            height = change.shape[1]
            gradient = gradients[block.path][block.number * height : (block.number + 1) * height]
            parts.append(change.flatten(1) @ gradient.flatten())
    return torch.stack(parts).sum(0) if parts else torch.zeros(())


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
    """This process's part of `count` calibration images, spread evenly over all of them; (1, C, H, W) each.

    Images that are dealt to the processes in turns are the same ones on any number of processes.
    """
    own = [image for batch in batches for image in images_of(batch).split(1)]
    rank = PartialState().process_index
    held = gather_object([len(own)])
    everyone = sorted((place, other) for other, images in enumerate(held) for place in range(images))
    spread = np.linspace(0, len(everyone) - 1, min(count, len(everyone))).round().astype(int)
    return [own[place] for place, holder in (everyone[index] for index in spread) if holder == rank]
