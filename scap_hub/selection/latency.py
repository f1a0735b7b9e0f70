"""Plans for a latency budget: proposed by a table of layer times, decided by measuring the pruned model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from scap_hub.channels.groups import ChannelGroup
from scap_hub.plan import PruningPlan
from scap_hub.selection.budget import TOLERANCE
from scap_hub.selection.select import select, smallest_plan
from scap_hub.selection.target import Target
from scap_hub.surgery import apply_plan
from scap_hub.timing.clock import Timer, milliseconds
from scap_hub.timing.table import LatencyTable, latency_table

_ROUNDS = 6
"""Plans to measure."""


@dataclass(frozen=True)
class LatencyChoice:
    """What `select_latency` found.

    Attributes:
        plan: What stays.
        share: Of the reference's time, as measured.
        target: What makes `select` choose this plan, given the table.
        table: Of the model's layers.
        wanted: The budget.
    """

    plan: PruningPlan
    share: float
    target: Target
    table: LatencyTable
    wanted: Target

    @property
    def miss(self) -> float:
        """How far the share is from the budget, as a fraction of the budget."""
        return abs(self.share / self.wanted.number - 1)

    @property
    def met(self) -> bool:
        """Whether the budget is met within 1 %."""
        return self.miss <= TOLERANCE


def select_latency(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, Tensor],
    fraction: float,
    images: Tensor,
    round_to: int = 8,
    *,
    floor: float = 0.05,
    scope: str | None = None,
    reference: nn.Module | None = None,
    timer: Timer | None = None,
    built: Callable[[nn.Module], nn.Module] | None = None,
) -> LatencyChoice:
    """Chooses the channels that stay so that the pruned model, measured here, takes `fraction` of the time.

    The table of layer times proposes plans; each is measured in turns with the reference, beginning with the smallest
    there can be, and what to ask of the table next is interpolated between what was measured. Warns where the nearest
    plan found misses the budget by more than 1 %.

    Args:
        model: The model to prune, where it is to run.
        groups: As for `select`.
        scores: As for `select`.
        fraction: What stays of the reference's time.
        images: As many images as will be run at once, (N, C, H, W).
        round_to: As for `select`.
        floor: As for `select`.
        scope: As for `select`.
        reference: What the fraction is of; the model itself if left out.
        timer: Measures calls that take turns; by default `scap_hub.timing.clock.milliseconds`.
        built: Gives what runs in the end, such as an exported file, of a model; by default the model itself.

    Raises:
        TargetError: Even the smallest model takes longer (says how long), or as for `select`.
    """
    target = Target("latency", fraction)
    built = built or (lambda module: module)
    dense = built(model if reference is None else reference)
    shares = _Shares(model, dense, images, timer or milliseconds, built, reference is None or reference is model)
    smallest = smallest_plan(groups, scores, round_to, floor)
    least = shares.of(smallest)
    if too_slow(least, target):
        raise target.unreachable(least)
    table = latency_table(model, groups, images, timer)
    ask = _predicted_share(table, groups, smallest)
    best = LatencyChoice(smallest, least, Target("latency", ask), table, target)
    asked, measured = [ask, 1.0], [least, shares.of_the_unpruned()]
    for _ in range(_ROUNDS):
        # Sorted each, because what is noise in a time must not turn more channels into less.
        ask = float(np.interp(fraction, sorted(measured), sorted(asked)))
        proposed = Target("latency", ask)
        plan = select(groups, scores, proposed, round_to, floor=floor, scope=scope, latency=table)
        choice = LatencyChoice(plan, shares.of(plan), proposed, table, target)
        best = min(best, choice, key=lambda own: own.miss)
        if best.met:
            return best
        asked.append(ask)
        measured.append(choice.share)
    warnings.warn(
        f"{target} is missed: the nearest plan that was found takes {best.share:.3f} of the time; a smaller round_to "
        "gives more plans to choose from, a quieter machine steadier times",
        stacklevel=2,
    )
    return best


def least_share(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, Tensor],
    images: Tensor,
    round_to: int = 8,
    *,
    floor: float = 0.05,
    timer: Timer | None = None,
    built: Callable[[nn.Module], nn.Module] | None = None,
) -> float:
    """The share of a model's time that the smallest one takes, measured here; arguments as for `select_latency`.

    It depends on how many channels stay, not on which: equal scores will do.
    """
    built = built or (lambda module: module)
    shares = _Shares(model, built(model), images, timer or milliseconds, built, True)
    return shares.of(smallest_plan(groups, scores, round_to, floor))


def too_slow(least: float, target: Target) -> bool:
    """Whether a budget of latency is out of reach, if the smallest model takes this share of the time."""
    return least > target.number * (1 + TOLERANCE)


@dataclass(frozen=True, eq=False)
class _Shares:
    """Measures what share of the reference's time a model takes, in turns with it.

    Attributes:
        model: What is pruned.
        reference: What times are compared with, as it runs in the end.
        images: What both are fed.
        timer: Measures calls that take turns.
        built: Gives what runs in the end.
        first: Whether the reference is the model that is pruned.
    """

    model: nn.Module
    reference: nn.Module
    images: Tensor
    timer: Timer
    built: Callable[[nn.Module], nn.Module]
    first: bool

    def of(self, plan: PruningPlan) -> float:
        """The share of the pruned model."""
        pruned = self.built(apply_plan(self.model, plan))
        dense, small = self.timer([(self.reference, self.images), (pruned, self.images)])
        return small / dense

    def of_the_unpruned(self) -> float:
        """The share of the model that is pruned; the reference may be larger."""
        if self.first:
            return 1.0
        dense, unpruned = self.timer([(self.reference, self.images), (self.built(self.model), self.images)])
        return unpruned / dense


def _predicted_share(table: LatencyTable, groups: Sequence[ChannelGroup], plan: PruningPlan) -> float:
    """What share of the model's time a plan takes, as the table says."""
    partition = groups[0].whole.partition
    kept = {name: plan.kept(name) for name in plan.groups}
    stays = partition.staying({group.name: group.channels for group in groups}, kept)
    return table.ms(stays) / table.ms(partition.everything())
