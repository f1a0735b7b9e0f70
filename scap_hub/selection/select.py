"""Scores and a target become a PruningPlan, jointly over groups that must stay balanced.

A target says how many channels each group keeps; which ones they are, `scap_hub.selection.choice` says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from scap_hub.channels.groups import ChannelGroup
from scap_hub.plan import PruningPlan
from scap_hub.selection.budget import BudgetSearch
from scap_hub.selection.choice import Chooser
from scap_hub.selection.inputs import checked_scope, checked_scores
from scap_hub.selection.limits import Limits
from scap_hub.selection.target import BUDGETS, Target
from scap_hub.timing.table import LatencyTable


def select(
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, Tensor],
    target: str | Mapping[str, float] | Target = "macs=0.5",
    round_to: int = 8,
    *,
    floor: float = 0.05,
    scope: str | None = None,
    latency: LatencyTable | None = None,
) -> PruningPlan:
    """Chooses the channels that stay.

    Args:
        groups: Result of `scap_hub.channel_groups`.
        scores: Importances by group name, (group.size,), higher stays; groups without any are kept whole.
        target: What stays: "macs=0.5", "params=0.3" or "latency=0.6" of the whole model, "ratio=0.5" of each group's
            channels, "threshold=0.6" every channel with at least that score, or a fraction for each named group.
        round_to: Channel counts are multiples of this; of half of it, a quarter and so on in groups with fewer than
            four such steps. With a threshold they are rounded up, so that no channel that reaches it goes.
        floor: Smallest fraction of a group's channels that stays, and never fewer than 4; 0 allows a single channel.
        scope: For "macs", "params" and "latency": "global" compares scores across groups, "cost-aware" scores for what
            a channel costs (importance per MAC, parameter or millisecond), "uniform" keeps the same fraction of each.
            None takes the scope that the scores carry, and "global" for a plain dict.
        latency: What "latency" is predicted from, result of `scap_hub.latency_table`; see also `select_latency`.

    Raises:
        TargetError: The target is malformed or cannot be reached (says what can), or the groups, scores or options
            cannot be used.
    """
    return PruningPlan.from_keep(groups, chosen(groups, scores, target, round_to, floor, scope, latency))


def chosen(
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, Tensor],
    target: str | Mapping[str, float] | Target,
    round_to: int,
    floor: float,
    scope: str | None,
    latency: LatencyTable | None = None,
) -> dict[str, list[int]]:
    """What `select` keeps of each group that loses any, without the plan; arguments and errors as there."""
    target = Target.of(target)
    return Choosing(groups, scores, round_to, floor, scope, latency)(target)


class Choosing:
    """`chosen` for one target after another; what they have in common is computed once."""

    def __init__(
        self,
        groups: Sequence[ChannelGroup],
        scores: Mapping[str, Tensor],
        round_to: int,
        floor: float,
        scope: str | None,
        latency: LatencyTable | None = None,
    ) -> None:
        """Arguments and errors as for `select`."""
        self._limits, self._scope, self._latency = Limits(round_to, floor), checked_scope(scope, scores), latency
        self._scores = scores
        self._chooser = Chooser(groups, checked_scores(groups, scores))
        self._searches: dict[str, BudgetSearch] = {}

    def __call__(self, target: Target) -> dict[str, list[int]]:
        """What is kept of each group that loses any."""
        limits, chooser = self._limits, self._chooser
        sizes = {name: group.size for name, group in chooser.groups.items()}
        if target.kind in BUDGETS:
            if target.kind not in self._searches:
                cost = target.cost(chooser.partition, self._latency)
                self._searches[target.kind] = BudgetSearch(chooser, limits, self._scope, cost)
            return chooser.keep(self._searches[target.kind].counts(target))
        if target.kind == "threshold":
            scores = self._scores
            reach = {name: own >= _as_scored(target.number, scores[name]) for name, own in chooser.scores.items()}
            counts = {name: limits.at_least(sizes[name], int(own.sum())) for name, own in reach.items()}
            return chooser.keep_above(counts, reach)
        fractions = target.fractions(sizes)
        return chooser.keep({name: limits.nearest(sizes[name], fractions[name] * sizes[name]) for name in fractions})


def _as_scored(threshold: float, scores: Tensor) -> float:
    """A threshold in the precision of the scores: in float32, a score of 0.7 is a little less than the number 0.7."""
    given = torch.as_tensor(scores)
    return float(torch.tensor(threshold, dtype=given.dtype)) if given.is_floating_point() else threshold


def smallest_plan(
    groups: Sequence[ChannelGroup], scores: Mapping[str, Tensor], round_to: int = 8, floor: float = 0.05
) -> PruningPlan:
    """The plan with every group at its floor; arguments and errors as for `select`."""
    limits = Limits(round_to, floor)
    chooser = Chooser(groups, checked_scores(groups, scores))
    counts = {name: limits.at_least(group.size, 0) for name, group in chooser.groups.items()}
    return PruningPlan.from_keep(groups, chooser.keep(counts))


def kept_importance(plan: PruningPlan, scores: Mapping[str, Tensor]) -> float:
    """Share of all importance that a plan keeps, 0 to 1."""
    return importance_of({name: plan.kept(name) for name in plan.groups}, scores)


def importance_of(keep: Mapping[str, Sequence[int]], scores: Mapping[str, Tensor]) -> float:
    """The same for a keep of some groups; all of the others stays."""
    kept = sum(
        float(values[keep[name]].sum()) if name in keep else float(values.sum()) for name, values in scores.items()
    )
    return kept / max(sum(float(values.sum()) for values in scores.values()), 1e-30)
