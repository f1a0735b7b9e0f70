"""Which channels stay, given how many of each group: the best ones with every balance kept.

Groups that share a balance are solved together, as a mixed-integer programme (scipy's HiGHS): the highest total score
with every block equally full, each group as near to its count as that allows, and none whole that was to lose any.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix, lil_matrix

from scap_hub.channels.groups import ChannelGroup
from scap_hub.channels.partition import Balance
from scap_hub.errors import TargetError

_SOLVER_SECONDS = 5.0


class Chooser:
    """Which channels stay, given how many of each group; solved once for each cluster and its counts."""

    def __init__(self, groups: Sequence[ChannelGroup], scores: dict[str, np.ndarray]) -> None:
        self.scores = scores
        self.groups = {group.name: group for group in groups if group.name in scores}
        self.space = groups[0].whole.partition
        self.clusters = _clusters(list(self.groups.values()))
        self._cache: dict[tuple[tuple[str, int], ...], dict[str, np.ndarray]] = {}

    def keep(self, counts: dict[str, int]) -> dict[str, list[int]]:
        """Kept channel numbers by group, for groups that lose any."""
        chosen: dict[str, list[int]] = {}
        for names, balances in self.clusters:
            wanted = tuple((name, counts.get(name, self.groups[name].size)) for name in names)
            if wanted not in self._cache:
                self._cache[wanted] = self._chosen(wanted, balances)
            chosen |= {name: kept.tolist() for name, kept in self._cache[wanted].items()}
        return {name: kept for name, kept in chosen.items() if len(kept) < self.groups[name].size}

    def stays(self, counts: dict[str, int]) -> np.ndarray:
        """(space.count,) whether each channel of the model stays."""
        return self.space.staying({name: group.channels for name, group in self.groups.items()}, self.keep(counts))

    def _chosen(self, wanted: tuple[tuple[str, int], ...], balances: list[Balance]) -> dict[str, np.ndarray]:
        if not balances:
            return {name: _best(self.scores[name], count) for name, count in wanted}
        return _solve([self.groups[name] for name, _ in wanted], self.scores, dict(wanted), balances, self.space.count)


def _best(scores: np.ndarray, count: int) -> np.ndarray:
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def _clusters(groups: list[ChannelGroup]) -> list[tuple[list[str], list[Balance]]]:
    """Groups that share a balance, directly or through others, with these balances."""
    clusters: list[tuple[list[str], list[Balance]]] = []
    for group in groups:
        own = list(group.constraint or ())
        touching = [cluster for cluster in clusters if any(balance in cluster[1] for balance in own)]
        names = [name for cluster in touching for name in cluster[0]] + [group.name]
        balances = list(dict.fromkeys([b for cluster in touching for b in cluster[1]] + own))
        clusters = [cluster for cluster in clusters if cluster not in touching] + [(names, balances)]
    return clusters


def _solve(
    groups: list[ChannelGroup],
    scores: dict[str, np.ndarray],
    counts: dict[str, int],
    balances: list[Balance],
    channels: int,
) -> dict[str, np.ndarray]:
    """Best total score with every balance kept and each group as near to its count as the balances allow.

    A group that is to lose any loses some, if at all possible.

    Channels of one group that the balances cannot tell apart form a cell. Only how many stay of each cell has to be an
    integer: which ones, their scores decide.
    """
    column = np.full(channels, -1)
    every = np.concatenate([group.channels for group in groups])
    column[every] = np.arange(every.size)
    x, many = every.size, len(groups)
    cell = _cells(groups, balances, column, x)
    cells = int(cell.max()) + 1
    # Columns: channels, how many stay of each cell and the level of each balance (integers), and each group's
    # shortfall and excess, of which what leaves it whole is one of its own.
    levels = x + cells
    missing = levels + len(balances)
    width = missing + 3 * many
    blocks = [(level, balance, i) for level, balance in enumerate(balances) for i in range(len(balance.blocks))]
    matrix, right = lil_matrix((cells + len(blocks) + many, width)), np.zeros(cells + len(blocks) + many)
    matrix[cell, np.arange(x)] = 1
    matrix[np.arange(cells), x + np.arange(cells)] = -1
    for row, (level, balance, i) in enumerate(blocks, start=cells):
        inside = column[balance.blocks[i]]
        right[row] = -float((inside < 0).sum()) - balance.offsets[i]
        members, often = np.unique(cell[inside[inside >= 0]], return_counts=True)
        # A channel that fills several places of a block counts as often.
        sizes = np.bincount(cell[np.unique(inside[inside >= 0])], minlength=cells)[members]
        matrix[row, x + members] = often / sizes
        matrix[row, levels + level] = -1
    for row, group in enumerate(groups, start=cells + len(blocks)):
        matrix[row, column[group.channels]] = 1
        matrix[row, missing + row - cells - len(blocks) + many * np.arange(3)] = 1, -1, -1
        right[row] = counts[group.name]
    value = np.concatenate([_scaled(scores[group.name]) for group in groups])
    lower = np.zeros(width)
    lower[levels : levels + len(balances)] = [1 + max(balance.offsets) for balance in balances]
    upper = np.full(width, np.inf)
    upper[:x] = 1
    spare = np.array([group.size - 1 - counts[group.name] for group in groups])
    upper[missing + many : missing + 2 * many] = np.maximum(spare, 0)
    penalty = np.repeat([2.0 * x, 2.0 * x, 2.0 * x * max(group.size for group in groups)], many)
    answer = milp(
        c=np.concatenate([-value, np.zeros(cells + len(balances)), penalty]),
        constraints=LinearConstraint(csr_matrix(matrix), right, right),
        integrality=np.concatenate([np.zeros(x), np.ones(cells + len(balances)), np.zeros(3 * many)]),
        bounds=Bounds(lower, upper),
        options={"time_limit": _SOLVER_SECONDS, "mip_rel_gap": 1e-3},
    )
    if answer.x is None:
        raise TargetError(
            f"no balanced choice found for {', '.join(group.name for group in groups[:3])} "
            f"({balances[0].reason}): {answer.message}; protect them, or ask for another target"
        )
    kept = np.zeros(x, dtype=bool)
    for number, count in enumerate(np.rint(answer.x[x:levels]).astype(int)):
        own = np.flatnonzero(cell == number)
        kept[own[_best(value[own], count)]] = True
    return {group.name: np.flatnonzero(kept[column[group.channels]]) for group in groups}


def _cells(groups: list[ChannelGroup], balances: list[Balance], column: np.ndarray, x: int) -> np.ndarray:
    """(x,) the cell of each channel: the same group, in the same blocks as often."""
    random = np.random.default_rng(0)
    signature = np.zeros(x, dtype=np.uint64)
    for group in groups:
        signature[column[group.channels]] = random.integers(1, 2**63, dtype=np.uint64)
    for balance in balances:
        for block in balance.blocks:
            inside = column[block]
            inside, often = np.unique(inside[inside >= 0], return_counts=True)
            signature[inside] += random.integers(1, 2**63, dtype=np.uint64) * often.astype(np.uint64)
    return np.unique(signature, return_inverse=True)[1].reshape(-1)


def _scaled(scores: np.ndarray) -> np.ndarray:
    """Scores on 0.01..1, so that no group's scale outweighs another's and every channel is worth keeping."""
    low, high = float(scores.min()), float(scores.max())
    return 0.01 + 0.99 * (scores - low) / (high - low) if high > low else np.full(scores.shape, 0.5)
