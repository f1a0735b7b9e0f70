"""Groups that share balances, and which of their channels can only leave together.

A balance asks that blocks of channels lose equally many. Channels of one group that no balance can tell apart form a
`Cell`. Cells that each fill a block of the same balance lose equally many: they form a bundle. The least important
channels of its cells are its first row, the next ones its second, and a bundle loses whole rows. What is left to choose
is then small: how many rows each bundle loses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from scap_hub.channels.groups import ChannelGroup
from scap_hub.channels.partition import Balance


@dataclass(frozen=True, eq=False)
class Cell:
    """Channels of one group that stand equally often in every block of every balance.

    Attributes:
        group: Name of the group.
        channels: (n,) channels within the group, the least important first.
        bundle: Number of its bundle.
    """

    group: str
    channels: np.ndarray
    bundle: int


@dataclass(frozen=True, eq=False)
class Cluster:
    """Groups whose numbers of channels depend on each other.

    Attributes:
        sizes: Number of channels by group.
        cells: All their channels.
        rows: (bundles,) how many rows each bundle has.
        group_loss: (groups, bundles) how many channels each group loses with one row of each bundle.
        block_loss: For each balance, (blocks, bundles) how many places each block loses with one row of each bundle.
        block_size: (balances,) places in the smallest block of each balance.
    """

    sizes: dict[str, int]
    cells: tuple[Cell, ...]
    rows: np.ndarray
    group_loss: np.ndarray
    block_loss: tuple[np.ndarray, ...]
    block_size: np.ndarray

    @classmethod
    def of(cls, groups: Sequence[ChannelGroup], balances: Sequence[Balance], scores: dict[str, np.ndarray]) -> Cluster:
        """Builds the cluster of groups that these balances, and no others, tie to each other."""
        places = [_places(groups, balance) for balance in balances]
        owner = np.repeat(np.arange(len(groups)), [group.size for group in groups])
        kinds, cell_of = np.unique(np.vstack([owner, *places]), axis=1, return_inverse=True)
        cell_of = cell_of.reshape(-1)
        cell_places = np.split(kinds[1:], np.cumsum([len(rows) for rows in places])[:-1])
        bundle_of = _bundles(cell_places, kinds.shape[1])
        within = np.concatenate([np.arange(group.size) for group in groups])
        cells = []
        for number, kind in enumerate(kinds.T):
            name, channels = groups[kind[0]].name, within[cell_of == number]
            cells.append(Cell(name, worst_first(scores[name], channels), int(bundle_of[number])))
        in_bundle = np.arange(bundle_of.max() + 1) == bundle_of[:, None]  # (cells, bundles)
        in_group = kinds[0] == np.arange(len(groups))[:, None]  # (groups, cells)
        length = np.array([cell.channels.size for cell in cells])
        return cls(
            {group.name: group.size for group in groups},
            tuple(cells),
            np.array([length[inside].min() for inside in in_bundle.T]),
            in_group.astype(int) @ in_bundle,
            tuple(rows @ in_bundle for rows in cell_places),
            np.array([min(block.size for block in balance.blocks) for balance in balances]),
        )

    def kept(self, lost: np.ndarray) -> dict[str, np.ndarray]:
        """Kept channels of each group, ascending, when each bundle loses so many rows, (bundles,)."""
        stays = {name: np.ones(size, dtype=bool) for name, size in self.sizes.items()}
        for cell in self.cells:
            stays[cell.group][cell.channels[: lost[cell.bundle]]] = False
        return {name: np.flatnonzero(mask) for name, mask in stays.items()}

    def row_values(self, values: dict[str, np.ndarray]) -> list[np.ndarray]:
        """For each bundle, (rows,) the value that goes with each of its rows, ascending."""
        totals = [np.zeros(rows) for rows in self.rows]
        for cell in self.cells:
            totals[cell.bundle] += values[cell.group][cell.channels[: self.rows[cell.bundle]]]
        return totals

    def free_rows(self, fixed: dict[str, np.ndarray]) -> np.ndarray:
        """(bundles,) how many rows each can lose with no channel of `fixed`, (group.size,) masks by group, in them."""
        free = self.rows.copy()
        for cell in self.cells:
            if cell.group in fixed:
                free[cell.bundle] = min(free[cell.bundle], cell.channels.size - fixed[cell.group][cell.channels].sum())
        return free


def worst_first(scores: np.ndarray, channels: np.ndarray) -> np.ndarray:
    """Channels by ascending score; of equal ones the last goes first, so that the result is the same everywhere."""
    return channels[np.argsort(-scores[channels], kind="stable")[::-1]]


def clustered(groups: Iterable[ChannelGroup]) -> list[tuple[list[ChannelGroup], list[Balance]]]:
    """Groups that share a balance, directly or through others, with these balances."""
    clusters: list[tuple[list[ChannelGroup], list[Balance]]] = []
    for group in groups:
        balances = list(group.constraint or ())
        touching = [cluster for cluster in clusters if any(balance in cluster[1] for balance in balances)]
        joined = [member for cluster in touching for member in cluster[0]] + [group]
        shared = list(dict.fromkeys([b for cluster in touching for b in cluster[1]] + balances))
        clusters = [cluster for cluster in clusters if cluster not in touching] + [(joined, shared)]
    return clusters


def _places(groups: Sequence[ChannelGroup], balance: Balance) -> np.ndarray:
    """(blocks, channels of all groups) how often each stands in each block; other channels stay and do not count."""
    channels = np.concatenate([group.channels for group in groups])
    count = 1 + max(channels.max(), *(block.max() for block in balance.blocks))
    return np.array([np.bincount(block, minlength=count)[channels] for block in balance.blocks])


def _bundles(places: Sequence[np.ndarray], cells: int) -> np.ndarray:
    """(cells,) the bundle of each cell: joins bundles as long as a balance makes two of them lose equally many.

    Args:
        places: For each balance, (blocks, cells) how often a block holds each channel of a cell.
        cells: How many there are.
    """
    bundle, count = np.arange(cells), cells
    while True:
        pairs = [(n, n) for n in range(count)]
        for rows in places:
            loss = rows @ (np.arange(count) == bundle[:, None])  # (blocks, bundles)
            alike: dict[int, int] = {}  # the first bundle that fills a block alone, by how often a row stands in it
            for block in loss:
                held = np.flatnonzero(block)
                if held.size == 1:
                    pairs.append((alike.setdefault(int(block[held[0]]), int(held[0])), int(held[0])))
        graph = coo_matrix((np.ones(len(pairs)), tuple(np.transpose(pairs))), shape=(count, count))
        fewer, label = connected_components(graph, directed=False)
        if fewer == count:
            return bundle
        bundle, count = label[bundle], fewer
