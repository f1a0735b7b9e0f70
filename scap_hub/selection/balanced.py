"""How many rows each bundle of a cluster loses: a small mixed-integer programme, solved exactly.

The result does not depend on the machine or its load, because a number of nodes limits the solver, not of seconds.
Where it gives up, all bundles lose the same fraction, which needs no solver.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from scap_hub.selection.cluster import Cluster

_NODES = 1000
"""Branch-and-bound nodes; the networks tried (DPN, MixNet) need one."""


def rows_to_lose(cluster: Cluster, scores: Mapping[str, np.ndarray], counts: Mapping[str, int],
                 free: np.ndarray) -> np.ndarray:  # fmt: skip
    """How many rows each bundle loses, (bundles,) integers, so that every balance is kept.

    In this order: a group that is to lose channels loses some; each group keeps nearly as many as it is to keep; the
    least important channels go.

    Args:
        cluster: The groups and their balances.
        scores: (group.size,) importances by group.
        counts: How many channels each group is to keep.
        free: (bundles,) how many rows may go.
    """
    # A single bundle leaves one number to choose: all fractions are tried.
    lost = _programme(cluster, scores, counts, free) if len(cluster.rows) > 1 else None
    return _same_fraction(cluster, counts, free) if lost is None else lost


class _Columns:
    """Numbers the variables of the programme; each is a slice of its columns."""

    def __init__(self, cluster: Cluster) -> None:
        ends = [0, *itertools.accumulate([
            int(cluster.rows.sum()), len(cluster.rows), len(cluster.block_size), *[len(cluster.sizes)] * 3
        ])]  # fmt: skip
        # Whether each row goes; how many go of each bundle; places that a block of each balance loses.
        self.row, self.lost, self.places = map(slice, ends[0:3], ends[1:4])
        # How far each group is below its count, and above it; `whole` is what is above all but one of its channels.
        self.below, self.above, self.whole = map(slice, ends[3:6], ends[4:7])
        self.width = ends[-1]


def _programme(
    cluster: Cluster, scores: Mapping[str, np.ndarray], counts: Mapping[str, int], free: np.ndarray
) -> np.ndarray | None:
    """The optimum, or the best found when the nodes were used up; None if none was found."""
    columns = _Columns(cluster)
    integral = np.zeros(columns.width)
    integral[columns.lost] = 1
    answer = milp(
        c=_objective(cluster, columns, scores),
        constraints=[_rows_add_up(cluster, columns), _blocks_lose_alike(cluster, columns),
                     _groups_meet_counts(cluster, columns, counts)],
        integrality=integral,
        bounds=_bounds(cluster, columns, counts, free),
        options={"node_limit": _NODES, "mip_rel_gap": 0.0},
    )  # fmt: skip
    return None if answer.x is None else np.rint(answer.x[columns.lost]).astype(int)


def _objective(cluster: Cluster, columns: _Columns, scores: Mapping[str, np.ndarray]) -> np.ndarray:
    """What goes, after how far the groups are from their counts, after whether any is left whole."""
    values = cluster.row_values({name: _scaled(scores[name]) for name in cluster.sizes})
    channels = sum(cluster.sizes.values())
    weights = np.zeros(columns.width)
    weights[columns.row] = np.concatenate(values)
    # A channel is worth 1 at most, so these outweigh all that can be won by other means.
    weights[columns.below] = weights[columns.above] = 2.0 * channels
    weights[columns.whole] = 2.0 * channels * max(cluster.sizes.values())
    return weights


def _scaled(scores: np.ndarray) -> np.ndarray:
    """Scores on 0.01..1, so that no group's scale outweighs another's and every channel is worth keeping."""
    low, high = float(scores.min()), float(scores.max())
    return 0.01 + 0.99 * (scores - low) / (high - low) if high > low else np.full(scores.shape, 0.5)


def _rows_add_up(cluster: Cluster, columns: _Columns) -> LinearConstraint:
    """The rows that go of a bundle are as many as it loses; the objective takes the least important ones first."""
    matrix = np.zeros((len(cluster.rows), columns.width))
    matrix[:, columns.row] = np.repeat(np.eye(len(cluster.rows)), cluster.rows, axis=1)
    matrix[:, columns.lost] = -np.eye(len(cluster.rows))
    return LinearConstraint(csr_matrix(matrix), 0, 0)


def _blocks_lose_alike(cluster: Cluster, columns: _Columns) -> LinearConstraint:
    """Every block of a balance loses the same number of places."""
    parts = []
    for number, loss in enumerate(cluster.block_loss):
        loss = np.unique(loss, axis=0)
        part = np.zeros((len(loss), columns.width))
        part[:, columns.lost] = loss
        part[:, columns.places.start + number] = -1
        parts.append(part)
    return LinearConstraint(csr_matrix(np.concatenate(parts)), 0, 0)


def _groups_meet_counts(cluster: Cluster, columns: _Columns, counts: Mapping[str, int]) -> LinearConstraint:
    """What a group keeps is its count, less what it is below, plus what it is above that."""
    matrix = np.zeros((len(cluster.sizes), columns.width))
    matrix[:, columns.lost] = -cluster.group_loss
    matrix[:, columns.below] = np.eye(len(cluster.sizes))
    matrix[:, columns.above] = matrix[:, columns.whole] = -np.eye(len(cluster.sizes))
    right = np.array([counts[name] - size for name, size in cluster.sizes.items()])
    return LinearConstraint(csr_matrix(matrix), right, right)


def _bounds(cluster: Cluster, columns: _Columns, counts: Mapping[str, int], free: np.ndarray) -> Bounds:
    """What each variable may be; something stays of every block and of every group."""
    upper = np.full(columns.width, np.inf)
    upper[columns.row] = 1
    upper[columns.lost] = free
    upper[columns.places] = cluster.block_size - 1
    upper[columns.below] = [counts[name] - 1 for name in cluster.sizes]
    upper[columns.above] = [max(size - 1 - counts[name], 0) for name, size in cluster.sizes.items()]
    return Bounds(np.zeros(columns.width), upper)


def _same_fraction(cluster: Cluster, counts: Mapping[str, int], free: np.ndarray) -> np.ndarray:
    """(bundles,) rows to lose if all bundles lose the same fraction: as many as come nearest to the counts.

    To lose nothing is among the choices, so there is always one.
    """
    parts = math.gcd(*cluster.rows.tolist())
    choices = np.arange(parts)[:, None] * (cluster.rows // parts)  # (parts, bundles)
    allowed = (choices <= free).all(axis=1)
    for loss, size in zip(cluster.block_loss, cluster.block_size, strict=True):
        places = choices @ loss.T  # (parts, blocks)
        allowed &= (places == places[:, :1]).all(axis=1) & (places[:, 0] < size)
    sizes = np.array(list(cluster.sizes.values()))
    wanted = sizes - [counts[name] for name in cluster.sizes]
    gone = choices @ cluster.group_loss.T  # (parts, groups)
    allowed &= (gone < sizes).all(axis=1)
    left_whole = ((wanted > 0) & (gone == 0)).sum(axis=1)
    best_first = np.lexsort((np.abs(gone - wanted).sum(axis=1), left_whole))
    return choices[best_first[allowed[best_first]][0]]
