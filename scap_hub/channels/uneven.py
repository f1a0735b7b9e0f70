"""Uneven balanced plans, to try whether a model can be pruned: few channels leave, and different ones everywhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from scap_hub.channels.partition import Balance

_REPAIRS = 256
"""Further channels that may have to leave with a first one until all balances hold."""
_ROUNDS = 6
"""How many channels of a balanced group are taken out at most, each with those that must go with it."""


def uneven(
    groups: Sequence[np.ndarray], balances: Sequence[Balance], share: tuple[float, float], seed: int
) -> np.ndarray:
    """Which channels leave: of each group a random share, more or less, with every balance kept.

    Args:
        groups: Channel numbers of each group that may be pruned.
        balances: What must stay balanced.
        share: Least and largest share of a group that leaves.
        seed: Of what is drawn.

    Returns:
        The channels that leave, (n,).
    """
    generator = np.random.default_rng(seed)
    gone = [np.zeros(0, dtype=np.int64)]
    for own, bound in clusters(groups, balances):
        # Two stay at least: of a single one no rule can tell which it is.
        wanted = [min(max(group.size - 2, 1), max(1, round(generator.uniform(*share) * group.size))) for group in own]
        if bound:
            gone.append(_Cluster(own, bound, generator).without(wanted))
        else:
            gone += [generator.choice(group, count, replace=False) for group, count in zip(own, wanted, strict=True)]
    return np.concatenate(gone)


def clusters(
    groups: Sequence[np.ndarray], balances: Sequence[Balance]
) -> Iterator[tuple[list[np.ndarray], list[list[np.ndarray]]]]:
    """Groups that share a balance, directly or through others, with the blocks of these balances."""
    count = 1 + max([0, *(int(group.max()) for group in groups), *(int(b.max()) for x in balances for b in x.blocks)])
    group_of = np.full(count, -1)
    for number, group in enumerate(groups):
        group_of[group] = number
    touched = [np.unique(group_of[np.concatenate(balance.blocks)]) for balance in balances]
    touched = [numbers[numbers >= 0] for numbers in touched]
    pairs = np.array([(numbers[0], other) for numbers in touched for other in numbers], dtype=int).reshape(-1, 2)
    graph = coo_matrix((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(len(groups), len(groups)))
    cluster_of = connected_components(graph, directed=False)[1]
    for cluster in range(cluster_of.max() + 1 if len(groups) else 0):
        members = np.flatnonzero(cluster_of == cluster)
        bound = [
            list(balance.blocks)
            for balance, numbers in zip(balances, touched, strict=True)
            if numbers.size and cluster_of[numbers[0]] == cluster
        ]
        yield [groups[int(number)] for number in members], bound


class _Cluster:
    """Groups that are balanced with each other."""

    def __init__(
        self, groups: Sequence[np.ndarray], balances: Sequence[Sequence[np.ndarray]], generator: np.random.Generator
    ) -> None:
        self.channels = np.concatenate(groups)
        self.group_of = np.repeat(np.arange(len(groups)), [group.size for group in groups])
        self.left = np.array([group.size for group in groups])
        self.generator = generator
        column = np.full(int(max(self.channels.max(), *(b.max() for blocks in balances for b in blocks))) + 1, -1)
        column[self.channels] = np.arange(self.channels.size)
        blocks = [block for own in balances for block in own]
        # How often each channel fills a place in each block.
        self.places = np.zeros((len(blocks), self.channels.size), dtype=np.int32)
        for row, block in zip(self.places, blocks, strict=True):
            np.add.at(row, column[block][column[block] >= 0], 1)
        self.start = np.cumsum([0, *(len(own) for own in balances)])[:-1]
        self.balance_of = np.repeat(np.arange(len(balances)), [len(own) for own in balances])

    def without(self, wanted: Sequence[int]) -> np.ndarray:
        """The channels that leave if each group is to lose about so many."""
        gone = np.zeros(self.channels.size, dtype=bool)
        for number, count in enumerate(wanted):
            before = self.left[number]
            for _ in range(min(count, _ROUNDS)):
                own = np.flatnonzero((self.group_of == number) & ~gone)
                if own.size < 3 or before - own.size >= count:
                    break
                chosen = self._completed(int(self.generator.choice(own)), gone)
                if chosen is not None:
                    gone[chosen] = True
                    np.subtract.at(self.left, self.group_of[chosen], 1)
        return self.channels[gone]

    def _completed(self, first: int, gone: np.ndarray) -> list[int] | None:
        """A channel with those that must leave with it so that all balances hold; None if none are found."""
        chosen, taken, left = [first], gone.copy(), self.left.copy()
        taken[first] = True
        left[self.group_of[first]] -= 1
        lost = self.places[:, taken].sum(1)
        noise = self.generator.random(taken.size)
        for _ in range(_REPAIRS):
            behind = lost < np.maximum.reduceat(lost, self.start)[self.balance_of]
            if not behind.any():
                return chosen
            # Each block that is behind needs a channel: the first of them is served first.
            useful = self.places[np.argmax(behind)]
            candidates = np.flatnonzero((useful > 0) & ~taken & (left[self.group_of] > 2))
            if not candidates.size:
                return None
            best = candidates[np.lexsort((noise[candidates], self._harm(lost, candidates)))[0]]
            chosen.append(int(best))
            taken[best] = True
            left[self.group_of[best]] -= 1
            lost = lost + self.places[:, best]
        return None

    def _harm(self, lost: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """For each candidate, how many places would still have to leave after it."""
        after = lost[:, None] + self.places[:, candidates]
        most = np.maximum.reduceat(after, self.start, axis=0)
        return (most[self.balance_of] - after).sum(0)
