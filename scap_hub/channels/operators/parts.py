"""Parts of tensors: slices, splits, and elements that are picked by number."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from scap_hub.channels.labels import Labels, broadcast, line, support
from scap_hub.channels.operators.table import Call, Integers, Size, flat, module_integers, operator
from scap_hub.channels.operators.view import moved
from scap_hub.graph.node import Node


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
    return moved(call, lambda array: _taken(array, dim, window))


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
    return moved(call, lambda array: _taken(array, call.dim(), window))


@operator("select")
def select(call: Call) -> Labels:
    """One index of a dimension, which therefore cannot shrink; unless all that is used of it is its shape."""
    x, dim = call.labels("self"), call.dim()
    if call.lends_shape:
        return Labels(call.shape, tuple(array.squeeze(dim) for array in x.arrays if array.shape[dim] == 1))
    return Labels(call.shape, tuple(array.squeeze(dim) for array in call.free_along(x, dim, "is taken apart by index")))


@operator("unbind")
def unbind(call: Call) -> list[Labels]:
    """Every index of a dimension, which therefore cannot shrink."""
    x, dim = call.labels("self"), call.dim()
    arrays = tuple(array.squeeze(dim) for array in call.free_along(x, dim, "is taken apart by index"))
    return [Labels(shape, arrays) for shape in call.shapes]


def _picked(call: Call, x: Labels, dim: int, index: Node) -> Labels:
    """Elements at the numbers that a buffer holds: the buffer's numbers leave with what they refer to.

    Any other index is pinned: a list in the code cannot be changed.
    """
    line_, numbers = x.along(dim), index.numbers
    others = [array for array in x.arrays if dim not in support(array)]
    alone = all(support(array) == (dim,) for array in x.arrays if dim in support(array))
    if line_ is None or numbers is None or index.state is None or not alone or numbers.min(initial=0) < 0:
        call.ledger.pin_all(flat(call.trace.labels[index]), "takes another tensor apart by index")
        return Labels(call.shape, tuple(call.free_along(x, dim, "is taken apart by index")))
    picked = line_[numbers]
    before = call.trace.indices.setdefault(index.state, line_)
    if not np.array_equal(before, line_):
        call.ledger.pin(np.concatenate([before, line_]), f"is one of two that {index.state!r} refers to")
    return Labels(call.shape, (*others, line(picked, dim, len(call.shape))))


@operator("index")
def index(call: Call) -> Labels:
    """Numbers along one dimension, such as a fixed permutation of channels that a buffer holds, or rows of a table."""
    x = call.labels("self")
    indices = [(dim, node) for dim, node in enumerate(call["indices"]) if node is not None]
    if len(indices) != 1:
        call.ledger.pin_all(call.tensors, f"is taken apart by index ({call.place})")
        return Labels(call.shape)
    dim, numbers = indices[0]
    rank = len(numbers.value.shape)
    if rank == 1 and not numbers.varies:
        return _picked(call, x, dim, numbers)
    call.ledger.pin_all(flat(call.trace.labels[numbers]), f"takes another tensor apart by index ({call.place})")
    free = call.free_along(x, dim, "is taken apart by index")
    return Labels(call.shape, tuple(own.reshape(*own.shape[:dim], *(1,) * rank, *own.shape[dim + 1 :]) for own in free))


@operator("index_put")
def index_put(call: Call) -> Labels:
    """One number at the places of a mask, as in `x[x < 0] = 0`, is written element by element."""
    x, places, values = call.labels("self"), call["indices"], call.labels("values")
    masked = len(places) == 1 and places[0] is not None and places[0].value.dtype == torch.bool
    if masked and tuple(places[0].value.shape) == x.shape and math.prod(values.shape) == 1:
        operands = [x, *flat(call.trace.labels[places[0]])]
        return broadcast(call.ledger, operands, call.shape, f"meets a mask that cannot shrink ({call.place})")
    call.ledger.pin_all(call.tensors, f"is written to by index ({call.place})")
    return Labels(call.shape)


@operator("index_select")
def index_select(call: Call) -> Labels:
    """The same as a function."""
    return _picked(call, call.labels("self"), call.dim(), call["index"])


@operator("embedding")
def embedding(call: Call) -> Labels:
    """Rows of a table by their numbers, such as positions: all rows stay, whichever of them are asked for."""
    table, numbers = call.labels("weight"), call["indices"]
    call.ledger.pin_all(flat(call.trace.labels[numbers]), f"takes a table apart by index ({call.place})")
    rank = len(numbers.value.shape)
    columns = call.free_along(table, 0, "is taken apart by index")
    return Labels(call.shape, tuple(own.reshape(*(1,) * rank, -1) for own in columns))


@module_integers("embedding", nn.Embedding)
def embedding_integers(module: Any, weight: tuple[int, ...]) -> Integers:
    """Its columns may leave."""
    return {"embedding_dim": weight[1]}


@operator("gather")
def gather(call: Call) -> Labels:
    """Elements along one dimension; along the others each has a number of its own, which leaves with it."""
    x, index, reason = call.labels("self"), call.labels("index"), f"is taken apart by an index ({call.place})"
    free = []
    for array in call.free_along(x, call.dim(), "is taken apart by index"):
        dims = support(array)
        numbers = index.along(dims[0]) if len(dims) == 1 else None
        if numbers is None or numbers.size != array.size:
            call.ledger.pin(array, reason)
        else:
            call.ledger.equate(array.reshape(-1), numbers, reason)
            free.append(array)
    return Labels(call.shape, tuple(free))


def _shifts(call: Call) -> Iterator[Size]:
    """How far a roll goes counts the elements that come around."""
    for index, dim in enumerate(call["dims"]):
        whole, shift = call.labels("self").along(dim), call["shifts"][index]
        if whole is not None and 0 < abs(shift) < whole.size:
            yield Size("shifts", index, whole[-shift:] if shift > 0 else whole[:-shift])


@operator("roll", sizes=_shifts)
def roll(call: Call) -> Labels:
    """Cyclic shift along dimensions."""
    x = call.labels("self")
    if not call["dims"]:
        call.ledger.pin_all([x], f"is flattened and rolled ({call.place})")
        return Labels(call.shape)
    for shift, dim in zip(call["shifts"], call["dims"], strict=True):
        dim %= len(x.shape)
        if x.along(dim) is None or not abs(shift) < x.shape[dim]:
            x = Labels(x.shape, tuple(call.free_along(x, dim, "is taken apart by index")))
        elif shift:
            x = Labels(x.shape, tuple(np.roll(array, shift, dim) for array in _by_itself(call, x, dim)))
    return x


def _by_itself(call: Call, x: Labels, dim: int) -> Iterator[np.ndarray]:
    """The arrays that do not vary along `dim` together with other dimensions; those that do are pinned."""
    for array in x.arrays:
        if dim not in support(array) or support(array) == (dim,):
            yield array
        else:
            call.ledger.pin(array, f"is rolled along one of its dimensions ({call.place})")


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
