"""Views: permutations, reshapes, slices, splits, repeats. Labels move exactly as the elements do."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from scap_hub.channels.labels import Labels, line, merge, support
from scap_hub.channels.operators.table import Call, Size, operator, out_sizes
from scap_hub.graph.node import Node


@operator("permute", role="layout")
def permute(call: Call) -> Labels:
    """Dimensions in another order."""
    return _mapped(call, lambda array: array.transpose([dim % array.ndim for dim in call["dims"]]))


@operator("transpose", "swapaxes", role="layout")
def transpose(call: Call) -> Labels:
    """Two dimensions swapped."""
    names = ("dim0", "dim1") if "dim0" in call.args else ("axis0", "axis1")
    return _mapped(call, lambda array: np.swapaxes(array, *(call[name] for name in names)))


@operator("numpy_T")
def reversed_dimensions(call: Call) -> Labels:
    """All dimensions in reverse order."""
    return _mapped(call, np.transpose)


@operator("t", "mT", "adjoint")
def matrix_transpose(call: Call) -> Labels:
    """Last two dimensions swapped."""
    return _mapped(call, lambda array: array.swapaxes(-1, -2) if array.ndim > 1 else array)


@operator("movedim")
def movedim(call: Call) -> Labels:
    """One dimension, or several, moved."""
    return _mapped(call, lambda array: np.moveaxis(array, call["source"], call["destination"]))


@operator("flip")
def flip(call: Call) -> Labels:
    """Reversed along dimensions."""
    return _mapped(call, lambda array: np.flip(array, tuple(call["dims"])))


def _unflattened(call: Call) -> Iterator[Size]:
    """Sizes that a dimension is split into."""
    return out_sizes("sizes", call.dim())(call)  # type: ignore[return-value]


def _any_sizes(call: Call) -> Iterator[Size]:
    """`view`, `reshape` and the like name all sizes of their result."""
    argument = next((name for name in ("size", "shape") if isinstance(call.args.get(name), list)), None)
    return iter(out_sizes(argument)(call) if argument else ())


@operator(
    "view", "reshape", "_unsafe_view", "flatten", "squeeze", "unsqueeze", "view_as", "reshape_as",
    sizes=_any_sizes,
)  # fmt: skip
def reshape(call: Call) -> Labels:
    """Same elements in the same order, in another shape.

    Dimensions are matched in the smallest runs of equal size, so untracked ones stay untracked. Where one tracked
    dimension is split, the same column of every row leaves together: a rectangle stays a rectangle, whatever
    permutation follows.
    """
    x, shape = call.tensors[0], call.shape
    runs = _runs(x.shape, shape)
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
    """Couples each run of new dimensions that came from one tracked dimension, keeping the last of the run."""
    for _, new in runs:
        varying = [dim for dim in new if array.shape[dim] > 1]
        for dim in varying[:-1]:
            first = array.take([0], axis=dim)
            call.ledger.equate(array, first, f"is split into rows ({call.place})")
            array = first
    return array


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
    return _mapped(call, lambda array: np.repeat(array, call["repeats"], dim) if array.shape[dim] > 1 else array)


def _bounds(call: Call) -> Iterator[Size]:
    """Where a slice starts and ends counts the elements before."""
    whole = call.labels("self").along(call.dim())
    if whole is not None and call["step"] == 1:
        for name in ("start", "end"):
            bound = call[name]
            if bound is not None and 0 < abs(bound) <= whole.size:
                yield Size(name, None, whole[:bound] if bound > 0 else whole[bound:])


@operator("slice", sizes=_bounds)
def slice_(call: Call) -> Labels:
    """A range along one dimension, or every so manyth of it."""
    x, dim = call.labels("self"), call.dim()
    first = (call["start"] or 0) % max(1, x.shape[dim])
    if call["step"] > 1:
        _couple_steps(call, x, dim, first)
    width = call.shape[dim]
    if call["step"] == 1 and 1 < width < x.shape[dim] and x.shape[dim] % width == 0 and first % width == 0:
        # One of several equal parts: where the code halves a width it must stay divisible.
        for array in x.arrays:
            if support(array) == (dim,):
                call.ledger.balance(np.split(array.reshape(-1), x.shape[dim] // width), f"equal parts of {call.place}")
    window = slice(call["start"], call["end"], call["step"])
    _hold_single(call, x, dim, window)
    return _mapped(call, lambda array: _taken(array, dim, window))


def _couple_steps(call: Call, x: Labels, dim: int, first: int) -> None:
    """Of every so many neighbours one is taken: they leave together, or each later one would be another.

    Neighbours are counted from the start of the tensor, so `x[:, ::2]` and `x[:, 1::2]` couple the same pairs; in
    `x[:, 5::2]`, what lies before is pinned, because the number 5 stays.
    """
    step, reason = call["step"], f"is one of every {call['step']} of {call.place}"
    for array in x.arrays:
        if dim not in support(array):
            continue
        if support(array) != (dim,) or (call["end"] is not None and call["end"] < x.shape[dim]):
            call.ledger.pin(array, reason)
            continue
        labels = array.reshape(-1)
        before = first // step * step
        call.ledger.pin(labels[:before], f"lies before the start of {call.place}")
        whole = labels[before : before + (labels.size - before) // step * step].reshape(-1, step)
        call.ledger.equate(whole, whole[:, :1], reason)
        # A last, shorter run: it would change with what is in front of it.
        rest = labels[before + whole.size :]
        call.ledger.equate(rest, rest[:1], reason) if rest.size else None


def _range(call: Call) -> Iterator[Size]:
    """Where a range starts, and how long it is."""
    whole, start = call.labels("self").along(call.dim()), call["start"]
    if whole is not None and isinstance(start, int):
        yield Size("start", None, whole[:start])
        yield Size("length", None, whole[start : start + call["length"]])


@operator("narrow", sizes=_range)
def narrow(call: Call) -> Labels:
    """A range along one dimension, by start and length."""
    window = slice(call["start"], call["start"] + call["length"])
    _hold_single(call, call.labels("self"), call.dim(), window)
    return _mapped(call, lambda array: _taken(array, call.dim(), window))


@operator("select")
def select(call: Call) -> Labels:
    """One index of a dimension, which therefore cannot shrink."""
    x, dim = call.labels("self"), call.dim()
    return Labels(call.shape, tuple(array.squeeze(dim) for array in _free(call, x, dim)))


@operator("unbind")
def unbind(call: Call) -> list[Labels]:
    """Every index of a dimension, which therefore cannot shrink."""
    x, dim = call.labels("self"), call.dim()
    arrays = tuple(array.squeeze(dim) for array in _free(call, x, dim))
    return [Labels(shape, arrays) for shape in call.shapes]


def _picked(call: Call, x: Labels, dim: int, index: Node) -> Labels:
    """Elements at the numbers that a buffer holds: the buffer's numbers leave with what they refer to.

    Any other index is pinned: a list in the code cannot be changed.
    """
    line_, numbers = x.along(dim), index.tensor
    others = [array for array in x.arrays if dim not in support(array)]
    alone = all(support(array) == (dim,) for array in x.arrays if dim in support(array))
    if line_ is None or numbers is None or numbers.is_meta or numbers.ndim != 1 or index.state is None or not alone:
        return Labels(call.shape, tuple(_free(call, x, dim)))
    picked = line_[numbers.cpu().numpy()]
    before = call.trace.indices.setdefault(index.state, line_)
    if not np.array_equal(before, line_):
        call.ledger.pin(np.concatenate([before, line_]), f"is one of two that {index.state!r} refers to")
    return Labels(call.shape, (*others, line(picked, dim, len(call.shape))))


@operator("index")
def index(call: Call) -> Labels:
    """Numbers along one dimension, such as a fixed permutation of channels that a buffer holds."""
    x = call.labels("self")
    indices = [(dim, node) for dim, node in enumerate(call["indices"]) if node is not None]
    if len(indices) == 1 and not indices[0][1].varies and len(indices[0][1].value.shape) == 1:
        return _picked(call, x, *indices[0])
    call.ledger.pin_all(call.tensors, f"is taken apart by index ({call.place})")
    return Labels(call.shape)


@operator("index_select")
def index_select(call: Call) -> Labels:
    """The same as a function."""
    return _picked(call, call.labels("self"), call.dim(), call["index"])


@operator("roll")
def roll(call: Call) -> Labels:
    """Cyclic shift of dimensions that do not shrink."""
    x = call.labels("self")
    if not call["dims"]:
        call.ledger.pin_all([x], f"is flattened and rolled ({call.place})")
        return Labels(call.shape)
    arrays = list(x.arrays)
    for dim in call["dims"]:
        arrays = _free(call, Labels(x.shape, tuple(arrays)), dim % len(x.shape))
    return Labels(call.shape, tuple(arrays))


def _parts(call: Call) -> Iterator[Size]:
    """The sizes of the parts; the last one is often written as the whole less the others."""
    dim = call.dim()
    for index, part in enumerate(call.results):
        labels = part.along(dim)
        if labels is not None and labels.size == part.shape[dim]:
            if call.node.name == "split_with_sizes" or call.op == "split.sizes":
                yield Size("split_sizes" if "split_sizes" in call.args else "split_size", index, labels)
            elif call.node.name == "split" and index == 0:
                yield Size("split_size", None, labels)
    whole = call.labels("self").along(dim)
    if whole is not None and call.node.name != "chunk":
        yield Size("", None, whole)


@operator("chunk", "split", "split_with_sizes", "tensor_split", sizes=_parts)
def split(call: Call) -> list[Labels]:
    """Parts along one dimension. Where the code does not list their sizes, all lose equally many: equal parts stay
    equal, and a last part that is smaller stays smaller by as much.
    """
    x, dim = call.labels("self"), call.dim()
    ends = np.cumsum([shape[dim] for shape in call.shapes])
    starts = ends - [shape[dim] for shape in call.shapes]
    parts = [slice(start, end) for start, end in zip(starts, ends, strict=True)]
    equal = len({shape[dim] for shape in call.shapes}) == 1
    for part in parts:
        _hold_single(call, x, dim, part)
    for array in x.arrays:
        if dim in support(array) and (equal or "sizes" not in call.op):
            call.ledger.balance([_taken(array, dim, part) for part in parts], f"equal parts of {call.place}")
    return [
        Labels(shape, tuple(_taken(array, dim, part) for array in x.arrays))
        for shape, part in zip(call.shapes, parts, strict=True)
    ]


def _hold_single(call: Call, x: Labels, dim: int, window: slice) -> None:
    """A single element that is taken out stays: of one element no label tells which it is."""
    for array in x.arrays:
        if dim in support(array) and len(range(*window.indices(x.shape[dim]))) == 1:
            call.ledger.pin(_taken(array, dim, window), f"is taken out alone ({call.place})")


def _taken(array: np.ndarray, dim: int, window: slice) -> np.ndarray:
    if array.shape[dim] == 1:
        return array
    index = [slice(None)] * array.ndim
    index[dim] = window
    return array[tuple(index)]


def _free(call: Call, x: Labels, dim: int) -> list[np.ndarray]:
    """Layers that do not vary along `dim`; the others are pinned."""
    free = []
    for array in x.arrays:
        if dim in support(array):
            call.ledger.pin(array, f"is taken apart by index ({call.place})")
        else:
            free.append(array)
    return free


def _mapped(call: Call, function: Callable[[np.ndarray], np.ndarray]) -> Labels:
    return Labels(call.shape, tuple(function(array) for array in call.tensors[0].arrays))
