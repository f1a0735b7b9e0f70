"""Labels of elements.

Every tensor of the graph carries label arrays: integer arrays that broadcast to its shape. An element leaves the tensor
when its label in any of these arrays leaves the model. Rules relate the labels of an operator's inputs to those of its
outputs; a `Ledger` collects what they say, and solves it once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

STAYS = 0
"""The label of elements that never leave."""


@dataclass(frozen=True, eq=False)
class Labels:
    """The labels of one tensor's elements.

    Attributes:
        shape: Shape of the tensor.
        arrays: Integer arrays of `len(shape)` dimensions, each of size 1 (untracked) or the tensor's own size,
            at most one for each set of tracked dimensions.
    """

    shape: tuple[int, ...]
    arrays: tuple[np.ndarray, ...] = ()

    def along(self, dim: int) -> np.ndarray | None:
        """The labels along `dim` alone, (n,); None where that dimension is not tracked by itself."""
        dim %= len(self.shape)
        return next((array.reshape(-1) for array in self.arrays if support(array) == (dim,)), None)

    def lines(self) -> Iterator[tuple[int, np.ndarray]]:
        """The dimensions that are tracked by themselves, each with its labels."""
        for array in self.arrays:
            if len(support(array)) == 1:
                yield support(array)[0], array.reshape(-1)

    def only(self, *dims: int) -> Labels:
        """The part of the labels that varies along `dims` and nothing else."""
        wanted = {dim % len(self.shape) for dim in dims}
        return Labels(self.shape, tuple(array for array in self.arrays if set(support(array)) <= wanted))


def support(array: np.ndarray) -> tuple[int, ...]:
    """The dimensions along which a label array varies."""
    return tuple([dim for dim, size in enumerate(array.shape) if size > 1])


def line(labels: np.ndarray, dim: int, rank: int) -> np.ndarray:
    """One-dimensional labels laid along `dim` of a tensor with `rank` dimensions."""
    shape = [1] * rank
    shape[dim] = labels.size
    return labels.reshape(shape)


@dataclass(frozen=True, eq=False)
class Equal:
    """Blocks of labels that must keep equally many each."""

    blocks: tuple[np.ndarray, ...]
    reason: str


@dataclass
class Ledger:
    """What the rules said: fresh labels, equalities, pins and balances."""

    count: int = 1
    equal: list[Equal] = field(default_factory=list)
    made: list[np.ndarray] = field(default_factory=list)
    """Every array of fresh labels, in order."""
    _left: list[np.ndarray] = field(default_factory=list)
    _right: list[np.ndarray] = field(default_factory=list)
    _pins: list[tuple[np.ndarray, str]] = field(default_factory=list)

    def fresh(self, *shape: int) -> np.ndarray:
        """New labels, one an element."""
        size = math.prod(shape)
        labels = np.arange(self.count, self.count + size).reshape(shape)
        self.count += size
        self.made.append(labels)
        return labels

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

    def pin(self, labels: np.ndarray, reason: str) -> None:
        """These labels never leave."""
        if labels.size:
            self._pins.append((np.unique(labels), reason))

    def pin_all(self, tensors: Iterable[Labels], reason: str) -> None:
        """No element of these tensors ever leaves."""
        for tensor in tensors:
            for array in tensor.arrays:
                self.pin(array, reason)

    def balance(self, blocks: Sequence[np.ndarray], reason: str) -> None:
        """Each block keeps as many of its elements as every other."""
        if len(blocks) > 1:
            self.equal.append(Equal(tuple(block.ravel() for block in blocks), reason))

    def components(self) -> np.ndarray:
        """(count,) the equivalence class of every label; labels of one class leave together."""
        left = np.concatenate([*self._left, np.zeros(0, dtype=np.int64)])
        right = np.concatenate([*self._right, np.zeros(0, dtype=np.int64)])
        graph = coo_matrix((np.ones(left.size, dtype=np.int8), (left, right)), shape=(self.count, self.count))
        return connected_components(graph, directed=False)[1]

    def pins(self) -> Iterator[tuple[np.ndarray, str]]:
        """Pinned labels with the reason, in the order in which they were found."""
        yield np.array([STAYS]), "is not computed by a layer that can shrink"
        yield from self._pins


def merge(ledger: Ledger, shape: tuple[int, ...], arrays: Iterable[np.ndarray], reason: str) -> Labels:
    """One tensor's labels from any arrays: those that vary along the same dimensions are equated into one."""
    merged: dict[tuple[int, ...], np.ndarray] = {}
    for array in arrays:
        dims = support(array)
        if not dims:
            continue
        if dims in merged:
            ledger.equate(merged[dims], array, reason)
        else:
            merged[dims] = array
    return Labels(shape, tuple(merged.values()))


def broadcast(ledger: Ledger, operands: Sequence[Labels], shape: tuple[int, ...], reason: str) -> Labels:
    """Labels of an elementwise operator: what meets along the same dimensions leaves together.

    An operand that is broadcast along an array's dimensions puts no condition on it; one that fills them without
    being tracked in the same way pins it.
    """
    aligned = [_aligned(operand, len(shape)) for operand in operands]
    result: list[np.ndarray] = []
    for dims in dict.fromkeys(dims for _, arrays in aligned for dims in arrays):
        filled = [arrays.get(dims) for own, arrays in aligned if all(own[dim] > 1 for dim in dims)]
        present = [array for array in filled if array is not None]
        if len(present) < len(filled):
            for array in present:
                ledger.pin(array, reason)
            continue
        for array in present[1:]:
            ledger.equate(present[0], array, reason)
        result.append(present[0])
    return Labels(shape, tuple(result))


def _aligned(operand: Labels, rank: int) -> tuple[tuple[int, ...], dict[tuple[int, ...], np.ndarray]]:
    """An operand's shape and its label arrays by their dimensions, both of as many dimensions as the result."""
    missing = (1,) * (rank - len(operand.shape))
    arrays = [array.reshape(missing + array.shape) for array in operand.arrays]
    return missing + operand.shape, {support(array): array for array in arrays}


def restricted(labels: Labels, stays: np.ndarray) -> Labels:
    """The labels of the elements that stay, in the tensor that they make up.

    Args:
        labels: Of the whole tensor.
        stays: Of every label, whether it stays.

    Raises:
        ValueError: The elements that stay fill no rectangle.
    """
    shape, arrays = list(labels.shape), []
    kept = {dims[0]: stays[array.reshape(-1)] for array in labels.arrays if len(dims := support(array)) == 1}
    for dim, mask in kept.items():
        shape[dim] = int(mask.sum())
    for array in labels.arrays:
        dims = support(array)
        for dim in dims:
            if dim in kept:
                array = array.compress(kept[dim], dim)
        mask = stays[array]
        if not mask.all():
            array = _columns(array, mask, dims[-1])
            shape[dims[-1]] = array.shape[dims[-1]]
        arrays.append(array)
    return Labels(tuple(shape), tuple(arrays))


def _columns(array: np.ndarray, mask: np.ndarray, dim: int) -> np.ndarray:
    """What stays along `dim` in every row of an array of several tracked dimensions, equally much in each."""
    rows, keeps = np.moveaxis(array, dim, -1), np.moveaxis(mask, dim, -1)
    counts = keeps.sum(-1)
    if counts.min() != counts.max():
        raise ValueError("blocks of one tensor keep unequal numbers of elements")
    return np.moveaxis(rows[keeps].reshape(*rows.shape[:-1], -1), -1, dim)
