"""Views: permutations, reshapes, slices, splits, repeats. Ids move exactly as the elements do."""

from __future__ import annotations

import numpy as np

from scap_hub.channels.labels import Ids, line, merge, support
from scap_hub.channels.operators.table import Call, rule


@rule("permute")
def permute(call: Call) -> Ids:
    """Dimensions in another order."""
    return _mapped(call, lambda layer: layer.transpose([dim % layer.ndim for dim in call["dims"]]))


@rule("transpose", "swapaxes")
def transpose(call: Call) -> Ids:
    """Two dimensions swapped."""
    names = ("dim0", "dim1") if "dim0" in call.args else ("axis0", "axis1")
    return _mapped(call, lambda layer: np.swapaxes(layer, *(call[name] for name in names)))


@rule("t", "numpy_T", "mT")
def matrix_transpose(call: Call) -> Ids:
    """Last two dimensions swapped."""
    return _mapped(call, lambda layer: layer.swapaxes(-1, -2) if layer.ndim > 1 else layer)


@rule("movedim")
def movedim(call: Call) -> Ids:
    """One dimension, or several, moved."""
    return _mapped(call, lambda layer: np.moveaxis(layer, call["source"], call["destination"]))


@rule("flip")
def flip(call: Call) -> Ids:
    """Reversed along dimensions."""
    return _mapped(call, lambda layer: np.flip(layer, tuple(call["dims"])))


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as")
def reshape(call: Call) -> Ids:
    """Same elements in the same order, in another shape.

    Dimensions are matched in the smallest runs of equal size, so untracked ones stay untracked. Where one tracked
    dimension is split, the same column of every row leaves together: a rectangle stays a rectangle, whatever
    permutation follows.
    """
    x, shape = call.tensors[0], call.shape
    layers = []
    for layer in x.layers:
        array = layer
        for old, _ in _runs(x.shape, shape):
            if any(layer.shape[dim] > 1 for dim in old):
                array = _fill(array, old, x.shape)
        sizes: list[int] = []
        for old, new in _runs(x.shape, shape):
            tracked = any(layer.shape[dim] > 1 for dim in old)
            sizes += [shape[dim] if tracked else 1 for dim in new]
        array = _constant_to_one(array.reshape(sizes))
        if len(support(array)) > len(support(layer)):
            array = _couple_rows(call, array, x, layer)
        layers.append(array)
    return merge(call.ledger, shape, layers, f"is reshaped ({call.place})")


def _couple_rows(call: Call, array: np.ndarray, x: Ids, layer: np.ndarray) -> np.ndarray:
    """Couples each run of new dimensions that came from one tracked dimension, keeping the last of the run."""
    for _, new in _runs(x.shape, call.shape):
        varying = [dim for dim in new if array.shape[dim] > 1]
        for dim in varying[:-1]:
            first = array.take([0], axis=dim)
            call.ledger.equate(array, first, f"is split into rows ({call.place})")
            array = first
    return array


def _runs(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of old and of new dimensions that hold the same number of elements."""
    runs: list[tuple[list[int], list[int]]] = []
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


@rule("expand", "expand_as", "broadcast_to")
def expand(call: Call) -> Ids:
    """Where a dimension of size 1 is stretched all elements are alike, and any of them can go."""
    x, rank = call.tensors[0], len(call.shape)
    layers = [layer.reshape((1,) * (rank - layer.ndim) + layer.shape) for layer in x.layers]
    before = (1,) * (rank - len(x.shape)) + x.shape
    for dim, (old, new) in enumerate(zip(before, call.shape, strict=True)):
        if old < new:
            layers.append(line(call.ledger.fresh(new), dim, rank))
    return Ids(call.shape, tuple(layers))


@rule("repeat", "tile")
def repeat(call: Call) -> Ids:
    """Whole tensor repeated along dimensions."""
    times = call.args.get("repeats") or call.args["dims"]
    layers = []
    for layer in call.tensors[0].layers:
        laid = layer.reshape((1,) * (len(times) - layer.ndim) + layer.shape)
        tiles: list[int] = [count if laid.shape[dim] > 1 else 1 for dim, count in enumerate(times)]
        layers.append(np.tile(laid, tiles))
    return Ids(call.shape, tuple(layers))


@rule("repeat_interleave.self_int")
def repeat_interleave(call: Call) -> Ids:
    """Each element repeated along one dimension."""
    x = call.ids("self")
    if call["dim"] is None:
        call.ledger.pin_all([x], f"is flattened and repeated ({call.place})")
        return Ids(call.shape)
    dim = call.dim()
    return _mapped(call, lambda layer: np.repeat(layer, call["repeats"], dim) if layer.shape[dim] > 1 else layer)


@rule("slice")
def slice_(call: Call) -> Ids:
    """A range along one dimension."""
    window = slice(call["start"], call["end"], call["step"])
    x, dim = call.ids("self"), call.dim()
    width = call.shape[dim]
    first = (call["start"] or 0) % max(1, x.shape[dim])
    if 1 < width < x.shape[dim] and x.shape[dim] % width == 0 and first % width == 0:
        # One of several equal parts: where the code halves a width it must stay divisible.
        for layer in x.layers:
            if support(layer) == (dim,):
                call.ledger.balance(np.split(layer.reshape(-1), x.shape[dim] // width), f"equal parts of {call.place}")
    return _mapped(call, lambda layer: _taken(layer, call.dim(), window))


@rule("narrow")
def narrow(call: Call) -> Ids:
    """A range along one dimension, by start and length."""
    window = slice(call["start"], call["start"] + call["length"])
    return _mapped(call, lambda layer: _taken(layer, call.dim(), window))


@rule("select")
def select(call: Call) -> Ids:
    """One index of a dimension, which therefore cannot shrink."""
    x, dim = call.ids("self"), call.dim()
    return Ids(call.shape, tuple(layer.squeeze(dim) for layer in _free(call, x, dim)))


@rule("unbind")
def unbind(call: Call) -> list[Ids]:
    """Every index of a dimension, which therefore cannot shrink."""
    x, dim = call.ids("self"), call.dim()
    layers = tuple(layer.squeeze(dim) for layer in _free(call, x, dim))
    return [Ids(shape, layers) for shape in call.shapes]


@rule("index_select")
def index_select(call: Call) -> Ids:
    """Indices along one dimension, which therefore cannot shrink."""
    return Ids(call.shape, tuple(_free(call, call.ids("self"), call.dim())))


@rule("roll")
def roll(call: Call) -> Ids:
    """Cyclic shift of dimensions that do not shrink."""
    x = call.ids("self")
    layers = list(x.layers)
    for dim in call["dims"]:
        layers = _free(call, Ids(x.shape, tuple(layers)), dim % len(x.shape))
    return Ids(call.shape, tuple(layers))


@rule("chunk", "split", "split_with_sizes")
def split(call: Call) -> list[Ids]:
    """Parts along one dimension. Where the code does not list their sizes, all lose equally many: equal parts stay
    equal, and a last part that is smaller stays smaller by as much.
    """
    x, dim = call.ids("self"), call.dim()
    ends = np.cumsum([shape[dim] for shape in call.shapes])
    starts = ends - [shape[dim] for shape in call.shapes]
    parts = [slice(start, end) for start, end in zip(starts, ends, strict=True)]
    equal = len({shape[dim] for shape in call.shapes}) == 1
    for layer in x.layers:
        if dim in support(layer) and (equal or "sizes" not in call.op):
            call.ledger.balance([_taken(layer, dim, part) for part in parts], f"equal parts of {call.place}")
    return [
        Ids(shape, tuple(_taken(layer, dim, part) for layer in x.layers))
        for shape, part in zip(call.shapes, parts, strict=True)
    ]


def _taken(layer: np.ndarray, dim: int, window: slice) -> np.ndarray:
    if layer.shape[dim] == 1:
        return layer
    index = [slice(None)] * layer.ndim
    index[dim] = window
    return layer[tuple(index)]


def _free(call: Call, x: Ids, dim: int) -> list[np.ndarray]:
    """Layers that do not vary along `dim`; the others are pinned."""
    free = []
    for layer in x.layers:
        if dim in support(layer):
            call.ledger.pin(layer, f"is taken apart by index ({call.place})")
        else:
            free.append(layer)
    return free


def _mapped(call: Call, function) -> Ids:  # type: ignore[no-untyped-def]
    return Ids(call.shape, tuple(function(layer) for layer in call.tensors[0].layers))
