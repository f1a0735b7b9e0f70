"""How many channels each group keeps, so that the whole model costs what a budget allows."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np

from scap_hub.selection.choice import Chooser
from scap_hub.selection.limits import Limits
from scap_hub.selection.target import ModelCost, Target

TOLERANCE = 0.01
"""A budget is met when what stays is this near to it, as a fraction of it."""
_BISECTIONS = 24

Counts = dict[str, int]
"""How many channels stay, by group name."""


@dataclass(frozen=True, eq=False)
class BudgetSearch:
    """Finds the numbers of channels that meet a budget.

    One knob from 0 to 1 sets them all: as the fraction of each group with scope "uniform", else as the fraction of all
    channels whose worth lies above one bar. It is bisected; then what is left of the budget is given out.

    Attributes:
        chooser: Which channels stay, given their numbers.
        limits: Which numbers are allowed.
        scope: "global", "cost-aware" or "uniform", see `select`.
        cost: What the model costs.
    """

    chooser: Chooser
    limits: Limits
    scope: str
    cost: ModelCost
    _known: dict[tuple[int, ...], float] = field(default_factory=dict, init=False)
    """What numbers cost that were asked for before: the last bisections of a search ask for the same again."""

    def counts(self, target: Target) -> Counts:
        """How many channels each group keeps.

        Raises:
            TargetError: Every group at its floor costs more.
        """
        everything = self.cost(self.chooser.partition.everything())
        least = self._spent(self.smallest())
        budget = target.number * everything
        if least > budget * (1 + 1e-9):
            raise target.unreachable(least / everything)
        worth = self._worth
        under, over = self._bisected(worth, budget)
        return self._topped_up(worth, self._filled(worth, under, over, budget), budget)

    def smallest(self) -> Counts:
        """Every group at its floor."""
        return {name: self.limits.nearest(group.size, 0) for name, group in self.chooser.groups.items()}

    def _spent(self, counts: Counts) -> float:
        numbers = tuple(counts[name] for name in self.chooser.groups)
        if numbers not in self._known:
            self._known[numbers] = self.cost(self.chooser.stays(counts))
        return self._known[numbers]

    def _bisected(self, worth: dict[str, np.ndarray], budget: float) -> tuple[Counts, Counts]:
        """The numbers at the highest knob within the budget, and at the lowest above it."""
        ascending = np.sort(np.concatenate(list(worth.values())))
        low, high = 0.0, 1.0
        under, over = self.smallest(), {name: group.size for name, group in self.chooser.groups.items()}
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            counts = self._at(middle, worth, ascending)
            if self._spent(counts) <= budget:
                low, under = middle, counts
            else:
                high, over = middle, counts
        return under, over

    def _at(self, knob: float, worth: dict[str, np.ndarray], ascending: np.ndarray) -> Counts:
        """The numbers at one position of the knob.

        Args:
            knob: Above 0 and below 1.
            worth: (group.size,) by group.
            ascending: All of it, sorted.
        """
        groups = self.chooser.groups
        if self.scope == "uniform":
            return {name: self.limits.nearest(group.size, knob * group.size) for name, group in groups.items()}
        bar = ascending[int((1 - knob) * ascending.size)]
        return {name: self.limits.nearest(groups[name].size, (own >= bar).sum()) for name, own in worth.items()}

    def _filled(self, worth: dict[str, np.ndarray], under: Counts, over: Counts, budget: float) -> Counts:
        """Many groups may step at the same knob: gives the larger number to one after the other while they fit."""
        for name in _by_next_channel(worth, under):
            larger = under | {name: over[name]}
            if over[name] > under[name] and self._spent(larger) <= budget:
                under = larger
        return under

    def _topped_up(self, worth: dict[str, np.ndarray], counts: Counts, budget: float) -> Counts:
        """Steps may be wide: while more than 1 % is unspent, gives one more step to the groups in which it fits."""
        for name in _by_next_channel(worth, counts):
            if self.scope == "uniform" or self._spent(counts) >= (1 - TOLERANCE) * budget:
                break
            size = self.chooser.groups[name].size
            larger = counts | {name: min(size, counts[name] + self.limits.step(size))}
            if self._spent(larger) <= budget:
                counts = larger
        return counts

    @functools.cached_property
    def _worth(self) -> dict[str, np.ndarray]:
        """What is compared between groups: scores, or with "cost-aware" scores for what one channel costs."""
        if self.scope != "cost-aware":
            return self.chooser.scores
        prices = {name: self._price(group.channels) for name, group in self.chooser.groups.items()}
        least = 1e-3 * max(prices.values())
        return {name: scores / max(prices[name], least) for name, scores in self.chooser.scores.items()}

    def _price(self, channels: np.ndarray) -> float:
        """What one channel of a group costs; from half of them, because one alone may save no measurable time."""
        stays = self.chooser.partition.everything()
        whole = self.cost(stays)
        stays[channels[::2]] = False
        return (whole - self.cost(stays)) / len(channels[::2])


def _by_next_channel(worth: dict[str, np.ndarray], counts: Counts) -> list[str]:
    """Group names by the worth of the best channel that does not stay, highest first."""

    def following(name: str) -> float:
        descending = np.sort(worth[name])[::-1]
        return float(descending[min(counts[name], descending.size - 1)])

    return sorted(counts, key=following, reverse=True)
