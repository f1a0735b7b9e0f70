"""Element-level channel identities.

Every tensor of the graph carries id layers: integer arrays that broadcast to its shape. An element leaves
the tensor when the id of any of its layers leaves the model. Rules relate the layers of an operator's inputs to
those of its outputs; `Ledger` collects what they say and solves it once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

STAYS = 0
"""The id of elements that never leave."""


@dataclass(frozen=True, eq=False)
class Ids:
    """The identities of one tensor's elements.

    Attributes:
        shape: Shape of the tensor.
        layers: Integer arrays of `len(shape)` dimensions, each of size 1 (untracked) or the tensor's own size,
            at most one for each set of tracked dimensions.
    """

    shape: tuple[int, ...]
    layers: tuple[np.ndarray, ...] = ()

    def along(self, dim: int) -> np.ndarray | None:
        """The one-dimensional ids of `dim` alone, None where that dimension is not tracked by itself."""
        dim %= len(self.shape)
        return next((layer.reshape(-1) for layer in self.layers if support(layer) == (dim,)), None)

    def lines(self) -> Iterator[tuple[int, np.ndarray]]:
        """The dimensions that are tracked by themselves, each with its ids."""
        for layer in self.layers:
            if len(support(layer)) == 1:
                yield support(layer)[0], layer.reshape(-1)

    def only(self, *dims: int) -> Ids:
        """The part of the ids that varies along `dims` and nothing else."""
        wanted = {dim % len(self.shape) for dim in dims}
        return Ids(self.shape, tuple(layer for layer in self.layers if set(support(layer)) <= wanted))


def support(layer: np.ndarray) -> tuple[int, ...]:
    """The dimensions along which a layer varies."""
    return tuple(dim for dim, size in enumerate(layer.shape) if size > 1)


def line(ids: np.ndarray, dim: int, rank: int) -> np.ndarray:
    """One-dimensional ids laid along `dim` of a tensor with `rank` dimensions."""
    shape = [1] * rank
    shape[dim] = ids.size
    return ids.reshape(shape)


@dataclass(frozen=True, eq=False)
class Equal:
    """Blocks of ids that must keep equally many each."""

    blocks: tuple[np.ndarray, ...]
    reason: str


@dataclass
class Ledger:
    """What the rules said: fresh ids, equalities, pins and balances."""

    count: int = 1
    equal: list[Equal] = field(default_factory=list)
    _left: list[np.ndarray] = field(default_factory=list)
    _right: list[np.ndarray] = field(default_factory=list)
    _pins: list[tuple[np.ndarray, str]] = field(default_factory=list)

    def fresh(self, *shape: int) -> np.ndarray:
        """New ids, one an element."""
        size = math.prod(shape)
        ids = np.arange(self.count, self.count + size).reshape(shape)
        self.count += size
        return ids

    def equate(self, left: np.ndarray, right: np.ndarray, reason: str) -> None:
        """Elements of `left` leave together with those of `right` (broadcast); meeting STAYS pins."""
        if left.shape != right.shape:
            left, right = np.broadcast_arrays(left, right)
        left, right = left.ravel(), right.ravel()
        stays = (left == STAYS) | (right == STAYS)
        if stays.any():
            self.pin(np.maximum(left, right)[stays], reason)
            left, right = left[~stays], right[~stays]
        self._left.append(left)
        self._right.append(right)

    def pin(self, ids: np.ndarray, reason: str) -> None:
        """These ids never leave."""
        if ids.size:
            self._pins.append((np.unique(ids), reason))

    def pin_all(self, tensors: Iterable[Ids], reason: str) -> None:
        """No element of these tensors ever leaves."""
        for tensor in tensors:
            for layer in tensor.layers:
                self.pin(layer, reason)

    def balance(self, blocks: Sequence[np.ndarray], reason: str) -> None:
        """Each block keeps as many of its elements as every other."""
        if len(blocks) > 1:
            self.equal.append(Equal(tuple(block.ravel() for block in blocks), reason))

    def components(self) -> np.ndarray:
        """(count,) the equivalence class of every id; ids of one class leave together."""
        left = np.concatenate([*self._left, np.zeros(0, dtype=np.int64)])
        right = np.concatenate([*self._right, np.zeros(0, dtype=np.int64)])
        graph = coo_matrix((np.ones(left.size, dtype=np.int8), (left, right)), shape=(self.count, self.count))
        return connected_components(graph, directed=False)[1]

    def pins(self) -> Iterator[tuple[np.ndarray, str]]:
        """Pinned ids with the reason, in the order in which they were found."""
        yield np.array([STAYS]), "is not computed by a layer that can shrink"
        yield from self._pins


def merge(ledger: Ledger, shape: tuple[int, ...], layers: Iterable[np.ndarray], reason: str) -> Ids:
    """One tensor's ids from any layers: those that vary along the same dimensions are equated into one."""
    merged: dict[tuple[int, ...], np.ndarray] = {}
    for layer in layers:
        dims = support(layer)
        if not dims:
            continue
        if dims in merged:
            ledger.equate(merged[dims], layer, reason)
        else:
            merged[dims] = layer
    return Ids(shape, tuple(merged.values()))


def broadcast(ledger: Ledger, operands: Sequence[Ids], shape: tuple[int, ...], reason: str) -> Ids:
    """Ids of an elementwise operator: what meets along the same dimensions leaves together.

    An operand that is broadcast along a layer's dimensions puts no condition on it; one that fills them without
    being tracked in the same way pins it.
    """
    aligned = [
        (
            (1,) * (len(shape) - len(operand.shape)) + operand.shape,
            {
                support(layer): layer
                for layer in (layer.reshape((1,) * (len(shape) - layer.ndim) + layer.shape) for layer in operand.layers)
            },
        )
        for operand in operands
    ]
    result: list[np.ndarray] = []
    for dims in dict.fromkeys(dims for _, layers in aligned for dims in layers):
        filled = [(layers.get(dims), own) for own, layers in aligned if all(own[dim] > 1 for dim in dims)]
        present = [layer for layer, _ in filled if layer is not None]
        if len(present) < len(filled):
            for layer in present:
                ledger.pin(layer, reason)
            continue
        for layer in present[1:]:
            ledger.equate(present[0], layer, reason)
        result.append(present[0])
    return Ids(shape, tuple(result))
