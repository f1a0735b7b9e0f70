"""Block optimal brain surgeon on the layers that read a group: the set that can be spared, not single channels."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from torch import Tensor, nn

from scap_hub.channels.groups import ChannelGroup
from scap_hub.channels.labels import support
from scap_hub.criteria.base import Criterion, fuse, rank
from scap_hub.criteria.calibration import Reached, enough, images_of, input_of, sized
from scap_hub.criteria.obs.elimination import Reading, eliminate
from scap_hub.criteria.patches import Reader, patches
from scap_hub.criteria.rivals.magnitude import filter_norm
from scap_hub.errors import CalibrationError, RecipeError
from scap_hub.graph.record import evaluating
from scap_hub.plan import PruningPlan
from scap_hub.progress import track

PATCHES = 4  # for each column of a layer's weight, over all images
PLACES = 16  # of each image, at least
COLUMNS = 4608  # of a layer; of more, each channel keeps those with the largest weights


@dataclass(frozen=True)
class Consumer:
    """The rows of one layer that read the same columns: all of them, or one group of a convolution.

    Attributes:
        path: Of the layer.
        block: Number of the group.
        channel: (m,) the channel, numbered as in the group's `space`, of each column of the weight, (O / groups, m); -1
            for the bias, which stands last where there is one.
        columns: (n,) the columns that are looked at.
    """

    path: str
    block: int
    channel: np.ndarray
    columns: np.ndarray


Readings = list[tuple[Consumer, Reading]]
Judge = Callable[[ChannelGroup, Readings], Tensor]
"""What turns a group and the layers that read it into importances, (size,)."""


@dataclass(kw_only=True)
class OBS(Criterion):
    """Channels leave in the order in which the layers that read the group miss them least.

    A group's importances are the ranks of that order, as computed on the dense model. `refine` eliminates group after
    group to the planned widths, each on the input that the groups before it leave.

    Attributes:
        ridge: Added to the patches' second moment, relative to its mean diagonal.
        sequential: Whether `refine` does so, or leaves the plan as it is.
    """

    name: ClassVar[str] = "obs"
    ridge: float = 1e-2
    sequential: bool = True

    def __post_init__(self) -> None:
        if self.ridge <= 0:
            raise RecipeError(f"ridge = {self.ridge}: give a positive number, such as 0.01")

    def score(self, model: nn.Module, groups: Sequence[ChannelGroup], batches: Iterable[Any]) -> dict[str, Tensor]:
        """See `Criterion.score`; a group that no convolution or linear layer reads is ranked by its L1 norms.

        Raises:
            CalibrationError: NaN or Inf in a layer's input, or fewer than 2 images over all processes.
        """
        batches = sized(batches)
        return self._judged(model, groups, batches, self._judge(model, batches))

    def ranking(self, model: nn.Module, groups: Sequence[ChannelGroup], batches: Iterable[Any]) -> dict[str, Tensor]:
        """See `Criterion.ranking`."""
        return self._judged(model, groups, sized(batches), _ranks)

    def _judged(
        self, model: nn.Module, groups: Sequence[ChannelGroup], batches: Collection[Any], judge: Judge
    ) -> dict[str, Tensor]:
        consumers = {group.name: consumers_of(model, group) for group in groups}
        grams = self._grams(model, groups, [c for group in groups for c in consumers[group.name]], batches)
        scores = {}
        for group in track(groups, "elimination"):
            if readings := self._readings(model, group, consumers[group.name], grams):
                scores[group.name] = judge(group, readings)
        typical = torch.cat(list(scores.values())).median() if scores else 0.5
        for group in groups:
            if group.name not in scores:
                norms = fuse(group, [filter_norm(model, tap, 1) for tap in group.taps], rank)
                scores[group.name] = norms * typical / 0.5  # which is the mean of ranks
        return scores

    def refine(
        self, model: nn.Module, groups: Sequence[ChannelGroup], batches: Iterable[Any], plan: PruningPlan
    ) -> PruningPlan:
        """See `Criterion.refine`. Channels that balances tell apart keep their numbers, so the plan stays balanced."""
        if not self.sequential:
            return plan
        batches = sized(batches)
        work = copy.deepcopy(model)
        keep = {name: plan.kept(name) for name in plan.groups}
        stays: np.ndarray | None = None
        for group in track([group for group in groups if group.name in keep], "elimination"):
            assert group.space is not None
            stays = np.ones(group.space.count, dtype=bool) if stays is None else stays
            consumers = consumers_of(work, group, stays)
            readings = self._readings(work, group, consumers, self._grams(work, [group], consumers, batches))
            if readings:
                kind = kinds(group)
                quota = torch.bincount(kind[keep[group.name]], minlength=int(kind.max()) + 1).tolist()
                gone = eliminate([reading for _, reading in readings], kind, quota)
                keep[group.name] = sorted(set(range(group.size)) - set(gone))
            stays[np.delete(group.channels, keep[group.name])] = False
            for consumer, reading in readings:
                write(work, consumer, reading, stays)
        return PruningPlan.from_keep(groups, keep)

    def _judge(self, model: nn.Module, batches: Collection[Any]) -> Judge:
        """What turns a group and its readings into importances."""
        return _ranks

    def _grams(
        self, model: nn.Module, groups: Sequence[ChannelGroup], consumers: Sequence[Consumer], batches: Collection[Any]
    ) -> dict[tuple[str, int], Tensor]:
        """What stands for the second moment of each consumer's patches, (n, n) float64, the same on all processes."""
        moments = PatchMoments(consumers, enough(sum(len(images_of(batch)) for batch in batches)))
        read_inputs(model, moments.consumers, batches, moments.add)
        return moments.means()

    def _readings(
        self,
        model: nn.Module,
        group: ChannelGroup,
        consumers: Sequence[Consumer],
        grams: dict[tuple[str, int], Tensor],
    ) -> Readings:
        assert group.space is not None
        place = np.full(group.space.count + 1, -1)
        place[group.channels] = np.arange(group.size)
        return [
            (
                consumer,
                Reading(
                    weight_of(model, consumer, torch.from_numpy(consumer.columns)),
                    grams[consumer.path, consumer.block],
                    torch.from_numpy(place[consumer.channel[consumer.columns]]),
                    self.ridge,
                ),
            )
            for consumer in consumers
            if (consumer.path, consumer.block) in grams
        ]


def _ranks(group: ChannelGroup, readings: Readings) -> Tensor:
    order = eliminate([reading for _, reading in readings], torch.zeros(group.size, dtype=torch.long), [0])
    return (torch.tensor(order).argsort().double() + 0.5) / group.size


def kinds(group: ChannelGroup) -> Tensor:
    """(size,) channels of the same kind are in the same blocks of every balance, so one may leave for the other."""
    assert group.space is not None
    rows = [
        np.bincount(block, minlength=group.space.count)[group.channels]
        for balance in group.constraint or ()
        for block in balance.blocks
    ]
    if not rows:
        return torch.zeros(group.size, dtype=torch.long)
    return torch.from_numpy(np.unique(np.stack(rows), axis=1, return_inverse=True)[1].reshape(-1))


def consumers_of(model: nn.Module, group: ChannelGroup, stays: np.ndarray | None = None) -> list[Consumer]:
    """The convolutions and linear layers that read a group, block by block, with their columns that stay."""
    assert group.space is not None
    own = np.zeros(group.space.count, dtype=bool)
    own[group.channels] = True
    consumers = []
    for path in group.consumers:
        layer, ids = model.get_submodule(path), group.space.tensors.get(f"{path}.weight")
        if ids is None or not isinstance(layer, Reader):
            continue
        groups = getattr(layer, "groups", 1)
        rows, width = layer.weight.shape[:2]
        window = layer.weight[0, 0].numel()
        for line in ids.layers:
            if 1 not in support(line):
                continue  # depthwise: the columns are the rows, and leave with them
            blocks = np.broadcast_to(line.reshape(*line.shape[:2]), (rows, width))[:: rows // groups]
            for block, channels in enumerate(blocks):
                bias = np.full(int(layer.bias is not None), -1)
                channel = np.concatenate([channels.repeat(window), bias])
                columns = np.flatnonzero(channel >= 0 if stays is None else (channel >= 0) & stays[channel])
                if not own[channel[columns]].any():
                    continue
                if columns.size > COLUMNS:
                    columns = _heaviest(layer, block, columns, channel)
                consumers.append(Consumer(path, block, channel, np.append(columns, np.flatnonzero(channel < 0))))
    return consumers


def _heaviest(layer: Reader, block: int, columns: np.ndarray, channel: np.ndarray) -> np.ndarray:
    """Of each channel's columns, those with the largest weights, so that there are about `COLUMNS` in all."""
    weight = layer.weight.detach().flatten(1).double().chunk(getattr(layer, "groups", 1))[block]
    energy = weight.square().sum(0).cpu().numpy()[columns]
    order = np.lexsort((-energy, channel[columns]))
    ordered = channel[columns][order]
    start = np.searchsorted(ordered, ordered)
    share = max(1, COLUMNS // np.unique(ordered).size)
    return np.sort(columns[order[np.arange(order.size) - start < share]])


def weight_of(model: nn.Module, consumer: Consumer, columns: Any) -> Tensor:
    """Columns of the block's weight with the bias behind it, (O / groups, n) float64."""
    layer: Any = model.get_submodule(consumer.path)
    weight = layer.weight.detach().double().flatten(1)
    if layer.bias is not None:
        weight = torch.cat([weight, layer.bias.detach().double()[:, None]], 1)
    return weight.chunk(getattr(layer, "groups", 1))[consumer.block][:, columns]


def write(model: nn.Module, consumer: Consumer, reading: Reading, stays: np.ndarray) -> None:
    """Puts the compensated weights into the model, and zero where channels left."""
    reading.compact()
    layer: Any = model.get_submodule(consumer.path)
    rows = len(layer.weight) // getattr(layer, "groups", 1)
    own = slice(consumer.block * rows, (consumer.block + 1) * rows)
    with torch.no_grad():
        weight = weight_of(model, consumer, slice(None))
        weight[:, torch.from_numpy((consumer.channel >= 0) & ~stays[consumer.channel])] = 0
        weight[:, torch.from_numpy(consumer.columns)[reading.columns.cpu()]] = reading.weight
        if layer.bias is not None:
            layer.bias[own] = weight[:, -1].to(layer.bias)
            weight = weight[:, :-1]
        layer.weight[own] = weight.reshape(layer.weight[own].shape).to(layer.weight)


class PatchMoments:
    """Second moments of the patches of some consumers, p pᵀ with a 1 behind p where the layer has a bias."""

    def __init__(self, consumers: Sequence[Consumer], images: int) -> None:
        """Starts empty.

        Args:
            consumers: Whose patches.
            images: How many images will be seen, over all processes.
        """
        self.consumers = by_path(consumers)
        self.images = images
        self.sums: dict[tuple[str, int], Tensor] = {}
        self.count: dict[str, int] = {}

    def add(self, path: str, layer: Reader, x: Tensor, images: int) -> None:
        """Adds the input of a layer."""
        widest = max(consumer.columns.size for consumer in self.consumers[path])
        rows = patches(layer, x, images, max(PLACES, ceil(PATCHES * widest / self.images)))
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if layer.bias is not None:
            rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], 2)
        for consumer in self.consumers[path]:
            own = rows[consumer.block][:, torch.from_numpy(consumer.columns).to(rows.device)]
            accumulate(self.sums, (path, consumer.block), own.T @ own)
        self.count[path] = self.count.get(path, 0) + rows.shape[1]

    def means(self) -> dict[tuple[str, int], Tensor]:
        """{(path, block): (n, n) float64} over all processes; layers that did not run have none."""
        counts: Counter[str] = Counter()
        for part in gather_object([self.count]):
            counts.update(part)
        sums = over_processes(self.sums, self.consumers)
        return {key: value / counts[key[0]] for key, value in sums.items() if counts[key[0]]}


def by_path(consumers: Sequence[Consumer]) -> dict[str, list[Consumer]]:
    """Distinct consumers by layer."""
    paths: dict[str, list[Consumer]] = {}
    for consumer in {(c.path, c.block): c for c in consumers}.values():
        paths.setdefault(consumer.path, []).append(consumer)
    return paths


def accumulate(sums: dict[Any, Tensor], key: Any, value: Tensor) -> None:
    """Adds to a float64 sum."""
    sums[key] = sums[key] + value if key in sums else value.double()


def over_processes(sums: dict[tuple[str, int], Tensor], consumers: Mapping[str, list[Consumer]]) -> dict[Any, Tensor]:
    """Sums over all processes, of which some may have seen no images."""
    if PartialState().num_processes == 1:
        return sums
    totals = {}
    for own in consumers.values():
        for c in own:
            empty = torch.zeros(c.columns.size, c.columns.size, dtype=torch.float64, device=PartialState().device)
            totals[c.path, c.block] = reduce(sums.get((c.path, c.block), empty), reduction="sum")
    return totals


def read_inputs(
    model: nn.Module,
    paths: Collection[str],
    batches: Collection[Any],
    read: Callable[[str, Reader, Tensor, int], None],
) -> None:
    """Calls `read(path, layer, input, images)` for each layer and batch, in eval mode; the rest is not computed.

    Raises:
        CalibrationError: NaN or Inf in a layer's input.
    """
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    images = number = 0
    running: set[str] = set()

    def hook(path: str) -> Callable[..., None]:
        def before(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = input_of(args, kwargs)
            if not x.sum(dtype=torch.float32).isfinite():
                raise CalibrationError(
                    f"NaN or Inf in the input of layer {path!r}, batch {number}; check the images and the weights"
                )
            read(path, layer, x, images)
            running.discard(path)
            if not running:
                raise Reached

        return before

    handles = [model.get_submodule(path).register_forward_pre_hook(hook(path), with_kwargs=True) for path in paths]
    try:
        with evaluating(model), torch.no_grad():
            for number, batch in enumerate(track(batches, "patches")):  # noqa: B007, the hooks name the batch
                pixels = images_of(batch).to(parameter.device, parameter.dtype)
                images, running = len(pixels), set(paths)
                with contextlib.suppress(Reached):
                    model(pixels)
    finally:
        for handle in handles:
            handle.remove()
