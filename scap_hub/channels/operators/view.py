"""Views: permutations, reshapes, slices, splits, repeats. Labels move exactly as the elements do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from scap_hub.channels.labels import Labels, line, merge, support
from scap_hub.channels.operators.table import Call, Size, operator, out_sizes

_NOTHING = 2**31 - 1
"""Stands for a size of 0, see `_counted`."""


@operator("permute", role="layout")
def permute(call: Call) -> Labels:
    """Dimensions in another order."""
    return moved(call, lambda array: array.transpose([dim % array.ndim for dim in call["dims"]]))


@operator("transpose", "swapaxes", "swapdims", role="layout")
def transpose(call: Call) -> Labels:
    """Two dimensions swapped."""
    names = ("dim0", "dim1") if "dim0" in call.args else ("axis0", "axis1")
    return moved(call, lambda array: np.swapaxes(array, *(call[name] for name in names)))


@operator("numpy_T")
def reversed_dimensions(call: Call) -> Labels:
    """All dimensions in reverse order."""
    return moved(call, np.transpose)


@operator("t", "mT")
def matrix_transpose(call: Call) -> Labels:
    """Last two dimensions swapped."""
    return moved(call, lambda array: array.swapaxes(-1, -2) if array.ndim > 1 else array)


@operator("movedim", "moveaxis")
def movedim(call: Call) -> Labels:
    """One dimension, or several, moved."""
    return moved(call, lambda array: np.moveaxis(array, call["source"], call["destination"]))


@operator("flip")
def flip(call: Call) -> Labels:
    """Reversed along dimensions."""
    return moved(call, lambda array: np.flip(array, tuple(call["dims"])))


@operator("view_as_real")
def as_real(call: Call) -> Labels:
    """Real and imaginary parts along a new last dimension."""
    return moved(call, lambda array: array[..., None])


@operator("view_as_complex")
def as_complex(call: Call) -> Labels:
    """The last dimension holds real and imaginary parts, so it stays."""
    free = call.free_along(call.labels("self"), -1, "is one of two parts of a complex number")
    return Labels(call.shape, tuple(array[..., 0] for array in free))


def _unflattened(call: Call) -> Iterator[Size]:
    """Sizes that a dimension is split into."""
    return out_sizes("sizes", call.dim())(call)  # type: ignore[return-value]


def _any_sizes(call: Call) -> Iterator[Size]:
    """`view`, `reshape` and the like name all sizes of their result."""
    argument = next((name for name in ("size", "shape") if isinstance(call.args.get(name), list)), None)
    return iter(out_sizes(argument)(call) if argument else ())


@operator(
    "view", "reshape", "_unsafe_view", "flatten", "ravel", "squeeze", "unsqueeze", "view_as", "reshape_as",
    sizes=_any_sizes,
)  # fmt: skip
def reshape(call: Call) -> Labels:
    """Same elements in the same order, in another shape.

    Dimensions are matched in the smallest runs of equal size, so untracked ones stay untracked. Where one tracked
    dimension is split, the same column of every row leaves together: a rectangle stays a rectangle, whatever
    permutation follows.
    """
    x, shape = call.tensors[0], call.shape
    if math.prod(_counted(x.shape)) != math.prod(_counted(shape)):
        call.ledger.pin_all([x], f"is read as numbers of another size ({call.place})")
        return Labels(shape)
    runs = _runs(_counted(x.shape), _counted(shape))
    moved = []
    for array in x.arrays:
        new = array
        for old, _ in runs:
            if any(array.shape[dim] > 1 for dim in old):
                new = _fill(new, old, x.shape)
        sizes: list[int] = []
        for old, dims in runs:
            tracked = any(array.shape[dim] > 1 for dim in old)
            sizes += [shape[dim] if tracked else 1 for dim in dims]
        new = _constant_to_one(new.reshape(sizes))
        if len(support(new)) > len(support(array)):
            new = _couple_rows(call, new, runs)
        moved.append(new)
    return merge(call.ledger, shape, moved, f"is reshaped ({call.place})")


@operator("unflatten", sizes=_unflattened)
def unflatten(call: Call) -> Labels:
    """One dimension split into several."""
    return reshape(call)


Runs = list[tuple[list[int], list[int]]]


def _couple_rows(call: Call, array: np.ndarray, runs: Runs) -> np.ndarray:
    """Couples each run of new dimensions that came from one tracked dimension, keeping the last of the run.

    Where dimension 1 becomes three that end in a square, this is a map or a window of each channel, as in
    `linear(x).view(-1, 16, 4, 4)` and in pixel shuffles by hand: there the first is kept. How many channels there are
    must not matter, as they become fewer.
    """
    more = array.ndim - sum(len(old) for old, _ in runs)
    for _, new in runs:
        varying = [dim for dim in new if array.shape[dim] > 1]
        square = more == 2 and new == [1, 2, 3] and array.shape[2] == array.shape[3] > 1
        for dim in varying[-2:] if square else varying[:-1]:
            first = array.take([0], axis=dim)
            call.ledger.equate(array, first, f"is split into rows ({call.place})")
            array = first
    return array


def _counted(shape: Iterable[int]) -> tuple[int, ...]:
    """A shape in which a size of 0 is told from the others, by a prime that no size is: of 0, any shape can be made."""
    return tuple(size or _NOTHING for size in shape)


def _runs(old: tuple[int, ...], new: tuple[int, ...]) -> Runs:
    """Smallest runs of old and of new dimensions that hold the same number of elements."""
    runs: Runs = []
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = [i] if i < len(old) else [], [j] if j < len(new) else []
        a, b = (old[i] if left else 1), (new[j] if right else 1)
        i, j = i + len(left), j + len(right)
        while a != b:
            if a < b:
                left.append(i)
                a *= old[i]
                i += 1
            else:
                right.append(j)
                b *= new[j]
                j += 1
        runs.append((left, right))
    return runs


def _fill(array: np.ndarray, dims: list[int], shape: tuple[int, ...]) -> np.ndarray:
    target = [shape[dim] if dim in dims else size for dim, size in enumerate(array.shape)]
    return np.broadcast_to(array, target)


def _constant_to_one(array: np.ndarray) -> np.ndarray:
    """Dimensions along which nothing changes become size 1."""
    for dim in support(array):
        first = array.take([0], axis=dim)
        if (array == first).all():
            array = first
    return array


@operator("expand", "broadcast_to", sizes=_any_sizes)
def expand(call: Call) -> Labels:
    """Where a dimension of size 1 is stretched all elements are alike, and any of them can go."""
    x, rank = call.tensors[0], len(call.shape)
    arrays = [array.reshape((1,) * (rank - array.ndim) + array.shape) for array in x.arrays]
    before = (1,) * (rank - len(x.shape)) + x.shape
    for dim, (old, new) in enumerate(zip(before, call.shape, strict=True)):
        if old < new:
            arrays.append(line(call.ledger.fresh(new), dim, rank))
    return Labels(call.shape, tuple(arrays))


@operator("expand_as")
def expand_as(call: Call) -> Labels:
    """As `expand`, to the shape of another tensor: what is stretched follows that one."""
    stretched, other = expand(call), call.labels("other")
    arrays = list(stretched.arrays)
    for index, array in enumerate(arrays):
        dims = support(array)
        if len(dims) != 1 or (wanted := other.along(dims[0])) is None:
            continue
        call.ledger.equate(array.reshape(-1), wanted, f"is stretched to another tensor ({call.place})")
        arrays[index] = array
    return Labels(call.shape, tuple(arrays))


def _repeats(call: Call) -> Iterator[Size]:
    """A dimension of size 1 that is repeated counts what it is repeated for."""
    times = call.args.get("repeats") or call.args["dims"]
    name = "repeats" if "repeats" in call.args else "dims"
    for index, count in enumerate(times):
        labels = call.results[0].along(index)
        if labels is not None and 1 < count == labels.size:
            yield Size(name, index, labels)


@operator("repeat", "tile", sizes=_repeats)
def repeat(call: Call) -> Labels:
    """Whole tensor repeated along dimensions; where all elements are alike, any of them can go."""
    times = call.args.get("repeats") or call.args["dims"]
    x, rank = call.tensors[0], len(call.shape)
    times = [1] * (rank - len(times)) + list(times)
    arrays = []
    for array in x.arrays:
        laid = array.reshape((1,) * (rank - array.ndim) + array.shape)
        arrays.append(np.tile(laid, [count if laid.shape[dim] > 1 else 1 for dim, count in enumerate(times)]))
    before = (1,) * (rank - len(x.shape)) + x.shape
    for dim, count in enumerate(times):
        if before[dim] == 1 and count > 1:
            arrays.append(line(call.ledger.fresh(count), dim, rank))
    return Labels(call.shape, tuple(arrays))


@operator("repeat_interleave.self_int")
def repeat_interleave(call: Call) -> Labels:
    """Each element repeated along one dimension."""
    x = call.labels("self")
    if call["dim"] is None:
        call.ledger.pin_all([x], f"is flattened and repeated ({call.place})")
        return Labels(call.shape)
    dim = call.dim()
    return moved(call, lambda array: np.repeat(array, call["repeats"], dim) if array.shape[dim] > 1 else array)


def moved(call: Call, function: Callable[[np.ndarray], np.ndarray]) -> Labels:
    """The labels of a result whose elements are moved by a function of arrays."""
    return Labels(call.shape, tuple(function(array) for array in call.tensors[0].arrays))
