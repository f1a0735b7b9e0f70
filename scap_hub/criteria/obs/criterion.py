"""Block optimal brain surgeon on the layers that read a group: the set that can be spared, not single channels."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from scap_hub.channels.decoding import balance_classes, staying
from scap_hub.channels.groups import ChannelGroup
from scap_hub.criteria.base import Criterion
from scap_hub.criteria.calibration import count_images, rereadable
from scap_hub.criteria.obs.blocks import (
    BlockKey,
    Compensated,
    ConsumerBlock,
    consumer_blocks,
    weight_of,
    write_compensated,
)
from scap_hub.criteria.obs.cost import elimination_seconds
from scap_hub.criteria.obs.elimination import CompensatedWeight, eliminate
from scap_hub.criteria.obs.inputs import read_inputs
from scap_hub.criteria.obs.moments import PatchMoments
from scap_hub.criteria.rivals.magnitude import filter_norm
from scap_hub.criteria.rows import fuse, rank
from scap_hub.errors import RecipeError
from scap_hub.plan import PruningPlan
from scap_hub.progress import track
from scap_hub.scores import Scores

Readable = Iterable[tuple[ChannelGroup, Compensated]]
"""Groups that convolutions or linear layers read, with the blocks that do; made, and used up, one after the other."""

Importances = Callable[[Readable], dict[str, Tensor]]
"""Gives the importances, (size,), of groups by name; a group that it can say nothing of is left out."""


@dataclass(kw_only=True)
class OBS(Criterion):
    """Channels leave in the order in which the layers that read the group miss them least.

    A group's importances are the ranks of that order, as computed on the dense model. On request `refine` eliminates
    group after group to the planned widths, each on the input that the groups before it leave.

    Attributes:
        ridge: Added to the patches' second moment, relative to its mean diagonal.
        sequential: Whether `refine` does so, or leaves the plan as it is. It takes a partial pass over the calibration
            images for each group.
    """

    name: ClassVar[str] = "obs"
    passes: ClassVar[float | None] = 6.0
    ridge: float = 1e-2
    sequential: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.ridge < math.inf:
            raise RecipeError(f"ridge = {self.ridge}: give a positive number, such as 0.01")

    def score(self, model: nn.Module, groups: Sequence[ChannelGroup], batches: Iterable[Any]) -> Scores:
        """See `Criterion.score`; a group that no convolution or linear layer reads is ranked by its L1 norms.

        Raises:
            CalibrationError: NaN or Inf in a layer's input, or fewer than 2 images over all processes.
            RecipeError: The ridge is too small for the second moment of a layer's patches.
        """
        batches = rereadable(batches)
        return self._scores(model, groups, batches, self._importances)

    def seconds_beside(self, model: nn.Module) -> float:
        """See `Criterion.seconds_beside`."""
        return elimination_seconds(model)

    def ranking(self, model: nn.Module, groups: Sequence[ChannelGroup], batches: Iterable[Any]) -> Scores:
        """See `Criterion.ranking`."""
        return self._scores(model, groups, rereadable(batches), lambda *_: elimination_ranks)

    def refine(
        self, model: nn.Module, groups: Sequence[ChannelGroup], batches: Iterable[Any], plan: PruningPlan
    ) -> PruningPlan:
        """See `Criterion.refine`. Channels that balances tell apart keep their numbers, so the plan stays balanced."""
        if not self.sequential:
            return plan
        batches = rereadable(batches)
        compensated_model = copy.deepcopy(model)
        keep: dict[str, list[int]] = {}
        for group in track([group for group in groups if group.name in plan.groups], "elimination"):
            blocks = consumer_blocks(compensated_model, group, staying(groups, keep))
            moments = self._moments(compensated_model, [group], blocks, batches)
            compensated = self._compensated(compensated_model, group, blocks, moments)
            planned = plan.kept(group.name)
            keep[group.name] = _spared(group, compensated, planned) if compensated else planned
            write_compensated(compensated_model, compensated, staying(groups, keep))
        return PruningPlan.from_keep(groups, {name: plan.kept(name) for name in plan.groups} | keep)

    def _importances(self, model: nn.Module, batches: Collection[Any]) -> Importances:
        """What `score` values channels by."""
        return elimination_ranks

    def _scores(
        self,
        model: nn.Module,
        groups: Sequence[ChannelGroup],
        batches: Collection[Any],
        importances: Callable[[nn.Module, Collection[Any]], Importances],
    ) -> Scores:
        if not groups:
            return Scores({}, self.scope)
        count_images(batches)
        importances_of = importances(model, batches)
        everything = staying(groups, {})
        blocks = {group.name: consumer_blocks(model, group, everything) for group in groups}
        moments = self._moments(model, groups, [block for some in blocks.values() for block in some], batches)
        compensated = (
            (group, self._compensated(model, group, blocks[group.name], moments))
            for group in track(groups, "elimination")
        )
        importance = importances_of((group, found) for group, found in compensated if found)
        typical = torch.cat(list(importance.values())).median() if importance else 0.5
        for group in groups:
            if group.name not in importance:
                ranks = fuse(group, [filter_norm(model, tap, 1) for tap in group.taps], rank)
                importance[group.name] = ranks * typical / 0.5  # which is the mean of ranks
        return Scores(importance, self.scope)

    def _moments(
        self,
        model: nn.Module,
        groups: Sequence[ChannelGroup],
        blocks: Sequence[ConsumerBlock],
        batches: Collection[Any],
    ) -> dict[BlockKey, Tensor]:
        """What stands for the second moment of each block's patches, (n, n) float64, the same on all processes."""
        moments = PatchMoments(blocks, count_images(batches), self._powers(model, blocks, batches))
        read_inputs(model, moments.paths, batches, moments.add)
        return moments.means()

    def _powers(
        self, model: nn.Module, blocks: Sequence[ConsumerBlock], batches: Collection[Any]
    ) -> Mapping[str, Tensor]:
        """How much errors of layers count at each frequency, by path, see `PatchMoments`."""
        return {}

    def _compensated(
        self, model: nn.Module, group: ChannelGroup, blocks: Sequence[ConsumerBlock], moments: dict[BlockKey, Tensor]
    ) -> Compensated:
        """The blocks that ran, with weights from which no channel has left yet."""
        compensated = []
        for block in blocks:
            if block.key in moments:
                weight = weight_of(model, block)[:, torch.from_numpy(block.columns)]
                channels = block.group_channels(group)
                compensated.append((block, CompensatedWeight(weight, moments[block.key], channels, self.ridge)))
        return compensated


def elimination_ranks(groups: Readable) -> dict[str, Tensor]:
    """Ranks of each group's channels in the order in which they leave, as quantiles in (0, 1)."""
    ranks = {}
    for group, compensated in groups:
        one_class = torch.zeros(group.size, dtype=torch.long)
        order = eliminate([weight for _, weight in compensated], one_class, [0])
        ranks[group.name] = (torch.tensor(order).argsort().double() + 0.5) / group.size
    return ranks


def _spared(group: ChannelGroup, compensated: Compensated, planned: Sequence[int]) -> list[int]:
    """The channels that are left after elimination to the planned numbers of each class."""
    class_of = torch.from_numpy(balance_classes(group))
    numbers = torch.bincount(class_of[list(planned)], minlength=int(class_of.max()) + 1).tolist()
    gone = eliminate([weight for _, weight in compensated], class_of, numbers)
    return sorted(set(range(group.size)) - set(gone))
