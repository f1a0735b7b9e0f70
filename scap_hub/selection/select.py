"""Scores and a target become a PruningPlan, jointly over groups that must stay balanced.

How many channels each group keeps follows from one number, a score threshold or a fraction, that is searched until
the target is met. Which ones they are, `scap_hub.selection.choice` says.
"""

from __future__ import annotations

import difflib
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from scap_hub.channels.groups import ChannelGroup
from scap_hub.channels.partition import Partition
from scap_hub.errors import TargetError
from scap_hub.plan import PruningPlan
from scap_hub.selection.choice import Chooser
from scap_hub.surgery import apply_plan
from scap_hub.timing.clock import Timer, milliseconds
from scap_hub.timing.table import LatencyTable, latency_table

Cost = Callable[[np.ndarray], float]
"""What a model costs of which these channels (of `Partition.count`) stay."""

BUDGETS = ("macs", "params", "latency")
TOLERANCE = 0.01
"""A budget is met when what stays is this near to it, as a fraction of it."""
_SEARCH_STEPS = 24
_ROUNDS = 6
"""Plans to measure for a latency budget."""


def select(
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, Tensor],
    target: str | Mapping[str, float] = "macs=0.5",
    round_to: int = 8,
    *,
    floor: float = 0.05,
    scope: str = "global",
    latency: LatencyTable | None = None,
) -> PruningPlan:
    """Chooses the channels that stay.

    Args:
        groups: Result of `scap_hub.channel_groups`.
        scores: Importances by group name, (group.size,), higher stays; groups without any are kept whole.
        target: What stays: "macs=0.5", "params=0.3" or "latency=0.6" of the whole model, "ratio=0.5" of each group's
            channels, "threshold=0.6" every channel with at least that score, or a fraction for each named group.
        round_to: Channel counts are multiples of this; of half of it, a quarter and so on in groups with fewer than
            four such steps.
        floor: Smallest fraction of a group's channels that stays, and never fewer than 4; 0 allows a single channel.
        scope: For "macs", "params" and "latency": "global" compares scores across groups, "cost-aware" scores for what
            a channel costs (importance per MAC, parameter or millisecond), "uniform" keeps the same fraction of each.
        latency: What "latency" is predicted from, result of `scap_hub.latency_table`; see also `select_latency`.

    Raises:
        TargetError: The target is malformed or cannot be reached; says what can.
    """
    candidates = [group for group in groups if group.prunable and group.name in scores]
    kind, value = _parsed(target, candidates)
    search = _Search.of(groups, candidates, scores, _Limits(round_to, floor), scope)
    if isinstance(value, Mapping):
        return search.plan(
            {g.name: search.limits.count(g, value[g.name] * g.size) for g in candidates if g.name in value}
        )
    if kind == "ratio":
        return search.plan({g.name: search.limits.count(g, value * g.size) for g in candidates})
    if kind == "threshold":
        above = {g.name: int((search.chooser.scores[g.name] >= value).sum()) for g in candidates}
        return search.plan({g.name: search.limits.count(g, above[g.name]) for g in candidates})
    cost = _cost(kind, search.chooser.space, latency)
    whole = cost(np.ones(search.chooser.space.count, dtype=bool))
    least = cost(search.chooser.stays(search.smallest()))
    if least > value * whole * (1 + 1e-9):
        raise _unreachable(kind, value, least / whole)
    return search.plan(search.within(cost, value * whole))


@dataclass(frozen=True)
class LatencyChoice:
    """What `select_latency` found.

    Attributes:
        plan: What stays.
        share: Of the reference's time, as measured.
        target: What makes `select` choose this plan, given the table.
        table: Of the model's layers.
    """

    plan: PruningPlan
    share: float
    target: str
    table: LatencyTable


def select_latency(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, Tensor],
    fraction: float,
    images: Tensor,
    round_to: int = 8,
    *,
    floor: float = 0.05,
    scope: str = "global",
    reference: nn.Module | None = None,
    timer: Timer | None = None,
) -> LatencyChoice:
    """Chooses the channels that stay so that the pruned model, measured here, takes `fraction` of the time.

    The table of layer times proposes plans; each is measured in turns with the reference, beginning with the smallest
    there can be, and what to ask of the table next is interpolated between what was measured.

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

    Raises:
        TargetError: Even the smallest model takes longer; says how long.
    """
    time = timer or milliseconds
    reference = model if reference is None else reference

    def measured(plan: PruningPlan) -> tuple[float, np.ndarray]:
        """The pruned model's share of the reference's time, and the channels that stay."""
        dense, small = time([(reference, images), (apply_plan(model, plan), images)])
        channels = {group.name: group.channels for group in groups}
        kept = {name: plan.kept(name) for name in plan.groups}
        return small / dense, groups[0].whole.partition.staying(channels, kept)

    smallest = select(groups, scores, {g.name: 1e-9 for g in groups if g.prunable and g.name in scores}, round_to,
                      floor=floor)  # fmt: skip
    least, stays = measured(smallest)
    if least > fraction * (1 + TOLERANCE):
        raise _unreachable("latency", fraction, least)
    table = latency_table(model, groups, images, timer)
    everything = np.ones(len(stays), dtype=bool)
    # What to ask of the table for a share of the reference's time: interpolated between what was measured.
    asked = [table.ms(stays) / table.ms(everything), 1.0]
    shares = [least, 1.0 if reference is model else operator.truediv(*time([(model, images), (reference, images)]))]
    best = LatencyChoice(smallest, least, f"latency={asked[0]}", table)
    for _ in range(_ROUNDS):
        # Sorted each, because what is noise in a time must not turn more channels into less.
        ask = float(np.interp(fraction, sorted(shares), sorted(asked)))
        plan = select(groups, scores, f"latency={ask}", round_to, floor=floor, scope=scope, latency=table)
        share, _ = measured(plan)
        best = min(
            best, LatencyChoice(plan, share, f"latency={ask}", table), key=lambda found: abs(found.share - fraction)
        )
        if abs(best.share - fraction) <= TOLERANCE * fraction:
            break
        asked.append(ask)
        shares.append(share)
    return best


def kept_importance(plan: PruningPlan, scores: Mapping[str, Tensor]) -> float:
    """Share of all importance that a plan keeps, 0 to 1."""
    kept = sum(
        float(values[plan.kept(name)].sum()) if name in plan.groups else float(values.sum())
        for name, values in scores.items()
    )
    return kept / max(sum(float(values.sum()) for values in scores.values()), 1e-30)


def _cost(kind: str, space: Partition, latency: LatencyTable | None) -> Cost:
    if kind == "latency":
        if latency is None:
            raise TargetError(
                "a latency target needs this device's layer times: pass latency=scap_hub.latency_table(model, groups, "
                "images), or use scap_hub.prune, which measures them"
            )
        return latency.ms
    return space.macs if kind == "macs" else space.params


def _unreachable(kind: str, fraction: float, least: float) -> TargetError:
    return TargetError(
        f"{kind}={fraction:g} cannot be reached: with every prunable group at its floor "
        f"{least:.3f} of the {kind} stay; ask for at least that, or lower the floor"
    )


@dataclass(frozen=True, eq=False)
class _Search:
    """Counts for every group that meet a budget, found with one knob."""

    groups: Sequence[ChannelGroup]
    candidates: list[ChannelGroup]
    chooser: Chooser
    limits: _Limits
    scope: str

    @classmethod
    def of(
        cls,
        groups: Sequence[ChannelGroup],
        candidates: list[ChannelGroup],
        scores: Mapping[str, Tensor],
        limits: _Limits,
        scope: str,
    ) -> _Search:
        if not candidates:
            raise TargetError(
                "nothing can be pruned: no channel group is prunable; `scap-hub inspect` lists the reasons"
            )
        chooser = Chooser(groups, {g.name: scores[g.name].detach().double().cpu().numpy() for g in candidates})
        return cls(groups, candidates, chooser, limits, scope)

    def plan(self, counts: dict[str, int]) -> PruningPlan:
        return PruningPlan.from_keep(self.groups, self.chooser.keep(counts))

    def smallest(self) -> dict[str, int]:
        """Every group at its floor."""
        return {g.name: self.limits.count(g, 0) for g in self.candidates}

    def within(self, cost: Cost, budget: float) -> dict[str, int]:
        """Searches the knob between the floors and everything, then fills what is left of the budget group by group."""
        worth = self._worth(cost)
        ordered = np.sort(np.concatenate(list(worth.values())))

        def counts(knob: float) -> dict[str, int]:
            if self.scope == "uniform":
                return {g.name: self.limits.count(g, knob * g.size) for g in self.candidates}
            threshold = ordered[min(int((1 - knob) * ordered.size), ordered.size - 1)] if knob < 1 else -np.inf
            if knob <= 0:
                threshold = np.inf
            return {g.name: self.limits.count(g, int((worth[g.name] >= threshold).sum())) for g in self.candidates}

        def spent(own: dict[str, int]) -> float:
            return cost(self.chooser.stays(own))

        low, high = 0.0, 1.0
        under, over = counts(low), counts(high)
        for _ in range(_SEARCH_STEPS):
            middle = (low + high) / 2
            own = counts(middle)
            if spent(own) <= budget:
                low, under = middle, own
            else:
                high, over = middle, own
        # Many groups step at the same knob: give the larger counts to one group after the other while they fit.
        gains = {name: _next_score(worth[name], under[name]) for name in under if over[name] > under[name]}
        for name in sorted(gains, key=lambda name: gains[name], reverse=True):
            larger = under | {name: over[name]}
            if spent(larger) <= budget:
                under = larger
        # Steps may be wide: while more than 1 % is unspent, one more for the best channels that fit.
        steps = {g.name: min(g.size, under[g.name] + self.limits.quantum(g)) for g in self.candidates}
        for name in sorted(steps, key=lambda name: _next_score(worth[name], under[name]), reverse=True):
            if self.scope == "uniform" or spent(under) >= (1 - TOLERANCE) * budget:
                break
            larger = under | {name: steps[name]}
            if spent(larger) <= budget:
                under = larger
        return under

    def _worth(self, cost: Cost) -> dict[str, np.ndarray]:
        """What is compared across groups: scores, or scores for what a channel of the group costs."""
        if self.scope != "cost-aware":
            return self.chooser.scores
        prices = {}
        everything = np.ones(self.chooser.space.count, dtype=bool)
        for group in self.candidates:
            # Half of the channels, because one alone may save no measurable time.
            stays = everything.copy()
            stays[group.channels[::2]] = False
            prices[group.name] = (cost(everything) - cost(stays)) / len(group.channels[::2])
        least = 1e-3 * max(prices.values())
        return {name: scores / max(prices[name], least) for name, scores in self.chooser.scores.items()}


def _next_score(scores: np.ndarray, count: int) -> float:
    """Score of the best channel that does not fit into `count`."""
    return float(np.sort(scores)[::-1][min(count, scores.size - 1)])


@dataclass(frozen=True)
class _Limits:
    round_to: int
    floor: float

    def quantum(self, group: ChannelGroup) -> int:
        """What the group's counts are multiples of."""
        quantum = max(1, self.round_to)
        while quantum > 1 and group.size < 4 * quantum:
            quantum //= 2
        return quantum

    def count(self, group: ChannelGroup, wanted: float) -> int:
        """The allowed count nearest to `wanted`."""
        quantum = self.quantum(group)
        least = min(group.size, max(4, int(np.ceil(self.floor * group.size)))) if self.floor else 1
        rounded = int(wanted / quantum + 0.5) * quantum
        if rounded < least:
            rounded = -(-least // quantum) * quantum
        return min(group.size, rounded)


def _parsed(
    target: str | Mapping[str, float], candidates: list[ChannelGroup]
) -> tuple[str, float | Mapping[str, float]]:
    if isinstance(target, Mapping):
        names = [group.name for group in candidates]
        for name, fraction in target.items():
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                raise TargetError(
                    f"target names {name!r}, which is no prunable channel group"
                    + (f"; did you mean {near[0]!r}?" if near else "")
                )
            _fraction(f"target of {name!r}", fraction)
        return "ratio", target
    kind, _, text = target.partition("=")
    kinds = (*BUDGETS, "ratio", "threshold")
    try:
        value = float(text)
    except ValueError:
        kind = ""
    if kind not in kinds:
        raise TargetError(f"target {target!r} is not understood; write one of {', '.join(f'{k}=0.5' for k in kinds)}")
    return kind, value if kind == "threshold" else _fraction(f"target {kind}", value)


def _fraction(what: str, value: float) -> float:
    if not 0 < value <= 1:
        raise TargetError(f"{what} is {value:g}; give the fraction that stays, above 0 and at most 1")
    return value
