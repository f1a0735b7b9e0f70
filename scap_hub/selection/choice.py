"""Which channels stay, given how many of each group: the most important ones that keep every balance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from scap_hub.channels.groups import ChannelGroup
from scap_hub.selection.balanced import rows_to_lose
from scap_hub.selection.cluster import Cluster, clustered, worst_first


class Chooser:
    """Chooses channels by their scores; each cluster of groups is solved once for the same counts.

    Attributes:
        groups: The groups that have scores, by name.
        scores: (group.size,) importances by group name.
        partition: The channels of the whole model.
    """

    def __init__(self, groups: Sequence[ChannelGroup], scores: Mapping[str, np.ndarray]) -> None:
        self.groups = {group.name: group for group in groups if group.name in scores}
        self.scores = dict(scores)
        self.partition = groups[0].whole.partition
        self._alone: list[str] = []
        self._clusters: list[Cluster] = []
        for members, balances in clustered(self.groups.values()):
            if balances:
                self._clusters.append(Cluster.of(members, balances, self.scores))
            else:
                self._alone += [group.name for group in members]
        self._solved: dict[tuple[int, tuple[int, ...]], dict[str, np.ndarray]] = {}

    def keep(self, counts: Mapping[str, int]) -> dict[str, list[int]]:
        """Kept channels by group, for groups that lose any.

        Args:
            counts: How many stay, by group; groups left out stay whole. Balanced groups come as near to it as the
                balances allow.
        """
        chosen = self._best(counts)
        for number, cluster in enumerate(self._clusters):
            wanted = tuple(counts.get(name, size) for name, size in cluster.sizes.items())
            if (number, wanted) not in self._solved:
                own = dict(zip(cluster.sizes, wanted, strict=True))
                lost = rows_to_lose(cluster, self.scores, own, cluster.rows)
                self._solved[number, wanted] = cluster.kept(lost)
            chosen |= self._solved[number, wanted]
        return self._without_whole(chosen)

    def keep_above(self, counts: Mapping[str, int], reach: dict[str, np.ndarray]) -> dict[str, list[int]]:
        """The same, but no channel goes that reaches a threshold, (group.size,) bool, whatever the balances ask for."""
        chosen = self._best(counts)
        for cluster in self._clusters:
            lost = rows_to_lose(cluster, self.scores, counts, cluster.free_rows(reach))
            chosen |= cluster.kept(lost)
        return self._without_whole(chosen)

    def stays(self, counts: Mapping[str, int]) -> np.ndarray:
        """(partition.count,) whether each channel of the model stays."""
        return self.partition.staying({name: group.channels for name, group in self.groups.items()}, self.keep(counts))

    def _best(self, counts: Mapping[str, int]) -> dict[str, np.ndarray]:
        """The best channels of each group that no balance ties."""
        chosen = {}
        for name in self._alone:
            size = self.groups[name].size
            chosen[name] = np.sort(worst_first(self.scores[name], np.arange(size))[size - counts.get(name, size) :])
        return chosen

    def _without_whole(self, kept: Mapping[str, np.ndarray]) -> dict[str, list[int]]:
        return {name: kept[name].tolist() for name, group in self.groups.items() if kept[name].size < group.size}
