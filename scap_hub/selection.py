"""Scores and a target become a PruningPlan, jointly over groups that must stay balanced.

How many channels each group keeps follows from one number, a score threshold or a fraction, that is searched until
the target is met. Which ones they are, `scap_hub.channels.choice` says.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from scap_hub.channels.choice import Chooser
from scap_hub.channels.groups import ChannelGroup
from scap_hub.channels.space import ChannelSpace
from scap_hub.errors import TargetError
from scap_hub.plan import PruningPlan

BUDGETS: dict[str, Callable[[ChannelSpace, np.ndarray], int]] = {
    "macs": ChannelSpace.macs,
    "params": ChannelSpace.params,
}
_SEARCH_STEPS = 24


def select(
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, Tensor],
    target: str | Mapping[str, float] = "macs=0.5",
    round_to: int = 8,
    *,
    floor: float = 0.05,
    scope: str = "global",
) -> PruningPlan:
    """Chooses the channels that stay.

    Args:
        groups: Result of `scap_hub.channel_groups`.
        scores: Importances by group name, (group.size,), higher stays; groups without any are kept whole.
        target: What stays: "macs=0.5" or "params=0.3" of the whole model, "ratio=0.5" of each group's channels,
            "threshold=0.6" every channel with at least that score, or a fraction for each named group.
        round_to: Channel counts are multiples of this; of half of it, a quarter and so on in groups with fewer than
            four such steps.
        floor: Smallest fraction of a group's channels that stays, and never fewer than 4; 0 allows a single channel.
        scope: For "macs" and "params": "global" compares scores across groups, "uniform" keeps the same fraction of
            each.

    Raises:
        TargetError: The target is malformed or cannot be reached; says what can.
    """
    candidates = [group for group in groups if group.prunable and group.name in scores]
    kind, value = _parsed(target, candidates)
    if not candidates:
        raise TargetError("nothing can be pruned: no channel group is prunable; `scap-hub inspect` lists the reasons")
    chooser = Chooser(groups, {g.name: scores[g.name].detach().double().cpu().numpy() for g in candidates})
    limits = _Limits(round_to, floor)

    if kind == "ratio":
        fractions = value if isinstance(value, Mapping) else {group.name: value for group in candidates}
        counts = {g.name: limits.count(g, fractions[g.name] * g.size) for g in candidates if g.name in fractions}
        return PruningPlan.from_keep(groups, chooser.keep(counts))
    if kind == "threshold":
        above = {g.name: int((chooser.scores[g.name] >= value).sum()) for g in candidates}
        return PruningPlan.from_keep(groups, chooser.keep({g.name: limits.count(g, above[g.name]) for g in candidates}))
    return _within_budget(groups, candidates, chooser, limits, kind, float(value), scope)  # type: ignore[arg-type]


def _within_budget(
    groups: Sequence[ChannelGroup],
    candidates: list[ChannelGroup],
    chooser: Chooser,
    limits: _Limits,
    kind: str,
    fraction: float,
    scope: str,
) -> PruningPlan:
    """Searches the knob between nothing and everything, then fills what is left of the budget group by group."""
    space = chooser.space
    whole = BUDGETS[kind](space, np.ones(space.count, dtype=bool))
    budget = fraction * whole
    ordered = np.sort(np.concatenate(list(chooser.scores.values())))

    def counts(knob: float) -> dict[str, int]:
        if scope == "uniform":
            return {g.name: limits.count(g, knob * g.size) for g in candidates}
        threshold = ordered[min(int((1 - knob) * ordered.size), ordered.size - 1)] if knob < 1 else -np.inf
        if knob <= 0:
            threshold = np.inf
        return {g.name: limits.count(g, int((chooser.scores[g.name] >= threshold).sum())) for g in candidates}

    def cost(own: dict[str, int]) -> int:
        return BUDGETS[kind](space, chooser.stays(own))

    low, high = 0.0, 1.0
    under, over = counts(low), counts(high)
    if cost(under) > budget:
        raise TargetError(
            f"{kind}={fraction:g} cannot be reached: with every prunable group at its floor "
            f"{cost(under) / whole:.3f} of the {kind} stay; ask for at least that, or lower the floor"
        )
    for _ in range(_SEARCH_STEPS):
        middle = (low + high) / 2
        own = counts(middle)
        if cost(own) <= budget:
            low, under = middle, own
        else:
            high, over = middle, own
    # Many groups step at the same knob: give the larger counts to one group after the other while they fit.
    gains = {name: _next_score(chooser.scores[name], under[name]) for name in under if over[name] > under[name]}
    for name in sorted(gains, key=lambda name: gains[name], reverse=True):
        larger = under | {name: over[name]}
        if cost(larger) <= budget:
            under = larger
    return PruningPlan.from_keep(groups, chooser.keep(under))


def _next_score(scores: np.ndarray, count: int) -> float:
    """Score of the best channel that does not fit into `count`."""
    return float(np.sort(scores)[::-1][min(count, scores.size - 1)])


@dataclass(frozen=True)
class _Limits:
    round_to: int
    floor: float

    def count(self, group: ChannelGroup, wanted: float) -> int:
        """The allowed count nearest to `wanted`."""
        quantum = max(1, self.round_to)
        while quantum > 1 and group.size < 4 * quantum:
            quantum //= 2
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
