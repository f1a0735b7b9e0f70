"""Convolutions: plain, grouped, depthwise, transposed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from scap_hub.channels.labels import Labels, line, support
from scap_hub.channels.operators.contract import positions
from scap_hub.channels.operators.table import (
    Call,
    Consumer,
    Cost,
    Integers,
    Producer,
    Size,
    module_integers,
    operator,
)
from scap_hub.private import ConvNd


def _slides_over_channels(call: Call) -> bool:
    """Whether the window lies along tracked elements, as in channel attention (ECA)."""
    return any(max(support(array), default=0) > 1 for array in call.labels("input").arrays)


def _depthwise_groups(call: Call) -> Iterator[Size]:
    """A depthwise convolution has as many groups as channels."""
    channels = call.labels("input").along(1) if len(call.labels("input").shape) > 1 else None
    if channels is not None and 1 < call["groups"] == channels.size:
        yield Size("groups", None, channels)


@operator("conv1d", "conv2d", "conv3d", counts=_slides_over_channels, sizes=_depthwise_groups)
def conv(call: Call) -> Labels:
    """(N, I, ...) with a weight of (O, I / groups, ...).

    Grouped: each block of inputs and of outputs loses equally many, each block its own. Depthwise (one input a
    block): input and output leave together, and the groups shrink with them.
    """
    x, w, groups, name = call.labels("input"), call.labels("weight"), call["groups"], call.state("weight")
    batched = len(call.shape) == len(w.shape)
    if w.shape[:2] == (1, 1) and call.shape == x.shape and batched and _slides_over_channels(call):
        # Channel attention (ECA) slides over the channels: what is left of them are neighbours then.
        call.trace.costs.append(Cost(x, int(np.prod(w.shape[2:])), name))
        return x
    channels = x.along(1) if batched else None
    passing = _passing(call, x, w) if batched and groups == 1 else {}
    _pin_all_but(call, x, *((1,), *((dim,) for dim in passing)) if batched else ())
    _pin_all_but(call, w, (0,), (1,), (0, 1))
    if groups == 1:
        rows = _plain(call, x, w, channels)
    elif x.shape[1 if batched else 0] == groups:
        rows = _depthwise(call, x, w, channels)
    else:
        rows = _grouped(call, x, w, channels)
    depthwise = groups > 1 and x.shape[1 if batched else 0] == groups
    return _finish(call, w, rows, channels, name, depthwise=depthwise, passing=passing)


def _passing(call: Call, x: Labels, w: Labels) -> dict[int, np.ndarray]:
    """What lies along a dimension of positions that the convolution takes one by one, by dimension."""
    passing = {}
    for dim, labels in x.lines():
        if (
            dim > 1
            and w.shape[dim] == _at(call["stride"], dim - 2) == 1
            and _at(call["padding"], dim - 2) in (0, "valid")
        ):
            passing[dim] = labels
    return passing


def _at(value: Any, index: int) -> Any:
    """An argument of a convolution along one dimension; a list of one is for all of them."""
    return value[index % len(value)] if isinstance(value, list | tuple) else value


def _plain(call: Call, x: Labels, w: Labels, channels: np.ndarray | None) -> np.ndarray | None:
    """Every row reads every channel."""
    columns = w.along(1)
    if channels is not None and columns is not None:
        call.ledger.equate(columns, channels, f"is convolved with a weight that cannot shrink ({call.place})")
    else:
        call.ledger.pin_all([x.only(1), w.only(1)], f"is read with a fixed width ({call.place})")
    return w.along(0)


def _depthwise(call: Call, x: Labels, w: Labels, channels: np.ndarray | None) -> np.ndarray | None:
    """Each row reads one channel, and leaves with it."""
    rows, many = w.along(0), w.shape[0] // call["groups"]
    if channels is None or rows is None:
        call.ledger.pin_all([x.only(1), w.only(0)], f"passes a depthwise convolution of fixed width ({call.place})")
        return None
    call.ledger.equate(rows, np.repeat(channels, many), f"is convolved with a weight that cannot shrink ({call.place})")
    if many > 1:
        # The rows of a channel stay or go together, so that every group keeps as many.
        call.ledger.equate(rows.reshape(-1, many), rows.reshape(-1, many)[:, :1], f"shares a group of {call.place}")
    return rows


def _grouped(call: Call, x: Labels, w: Labels, channels: np.ndarray | None) -> np.ndarray | None:
    """Each block of rows reads its own block of channels; all blocks lose equally many."""
    groups, rows = call["groups"], w.along(0)
    many_in, many_out = w.shape[1], w.shape[0] // groups
    fixed, reason = f"is convolved with a weight that cannot shrink ({call.place})", f"{groups} groups of {call.place}"
    columns = next((array for array in w.arrays if support(array) == (0, 1)), None)
    if not _in_place(call, columns):
        # Which columns a block of another weight drops cannot be said of the tensors that it is computed from.
        fixed, columns = f"is read by {groups} groups of a weight that no convolution owns ({call.place})", None
    if channels is not None and columns is not None:
        block_of_row = np.arange(w.shape[0]) // many_out
        call.ledger.equate(columns.reshape(w.shape[:2]), channels.reshape(groups, many_in)[block_of_row], fixed)
        call.ledger.balance(list(channels.reshape(groups, many_in)), reason)
    else:
        call.ledger.pin_all([x.only(1), w.only(1), w.only(0, 1)], fixed)
    if rows is not None:
        call.ledger.balance(list(rows.reshape(groups, many_out)), reason)
    return rows


def _in_place(call: Call, columns: np.ndarray | None) -> bool:
    """Whether a grouped convolution reads its own weight, or one computed from it with every column where it was.

    A standardised weight is; one with rows or columns in another order is not.
    """
    name = call.state("weight")
    if columns is None or name is None or name != f"{call.node.owner}.weight".removeprefix("."):
        return False
    node = call.args["weight"]
    while node.state is None:
        node = node.sources[0]
    return any(np.array_equal(columns, array) for array in call.trace.labels[node].arrays)


def _transposed_groups(call: Call) -> Iterator[Size]:
    """One group for each channel that is spread, or for each that several are gathered to."""
    yield from _depthwise_groups(call)
    out = call.results[0].along(1) if call.results and len(call.shape) > 1 else None
    if out is not None and 1 < call["groups"] == out.size < call.labels("input").shape[1]:
        yield Size("groups", None, out)


@operator("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", sizes=_transposed_groups)
def conv_transpose(call: Call) -> Labels:
    """(N, I, ...) with a weight of (I, O / groups, ...)."""
    x, w, name = call.labels("input"), call.labels("weight"), call.state("weight")
    batched = len(call.shape) == len(w.shape)
    if batched and 1 < call["groups"] in (x.shape[1], call.shape[1]):
        return _depthwise_transposed(call, x, w, name)
    if not batched:
        call.ledger.pin_all([x, w], f"is read without a batch ({call.place})")
        return Labels(call.shape)
    _pin_all_but(call, x, (1,))
    _pin_all_but(call, w, (0,), (1,))
    channels, columns, rows = x.along(1), w.along(0), w.along(1)
    reason = f"is read with a fixed width ({call.place})"
    if call["groups"] > 1:
        call.ledger.pin_all([x, w], f"passes a grouped transposed convolution ({call.place})")
        return Labels(call.shape)
    if channels is not None and columns is not None:
        call.ledger.equate(columns, channels, reason)
    else:
        call.ledger.pin_all([x.only(1), w.only(0)], reason)
    return _finish(call, w, rows, channels, name, depthwise=False, positions_of=x.shape)


@operator("torchvision.deform_conv2d.default")
def deformable(call: Call) -> Labels:
    """A convolution that reads its places from an offset for each place of its window, and weighs them by a mask."""
    x, w, name = call.labels("input"), call.labels("weight"), call.state("weight")
    call.ledger.pin_all([call.labels("offset"), call.labels("mask")], f"says where {call.place} reads")
    _pin_all_but(call, x, (1,))
    _pin_all_but(call, w, (0,), (1,))
    channels = x.along(1)
    if call["groups"] > 1:
        call.ledger.pin_all([x, w], f"passes a grouped deformable convolution ({call.place})")
        return Labels(call.shape)
    if channels is not None:  # each block of channels has offsets of its own
        blocks = call.labels("offset").shape[1] // (2 * w.shape[2] * w.shape[3])
        call.ledger.balance(np.split(channels, blocks), f"{blocks} blocks of offsets of {call.place}")
    return _finish(call, w, _plain(call, x, w, channels), channels, name, depthwise=False)


def _depthwise_transposed(call: Call, x: Labels, w: Labels, name: str | None) -> Labels:
    """Each channel is spread to outputs of its own, or several are gathered to one: a group leaves together."""
    _pin_all_but(call, x, (1,))
    _pin_all_but(call, w, (0,))
    channels, columns, many = x.along(1), w.along(0), x.shape[1] // call["groups"]
    if channels is None or columns is None:
        call.ledger.pin_all([x, w], f"passes a depthwise convolution of fixed width ({call.place})")
        return Labels(call.shape)
    call.ledger.equate(columns, channels, f"is convolved with a weight that cannot shrink ({call.place})")
    if many > 1:
        groups = channels.reshape(-1, many)
        call.ledger.equate(groups, groups[:, :1], f"shares a group of {call.place}")
    rows = np.repeat(channels[::many], w.shape[1])
    return _finish(call, w, rows, channels, name, depthwise=True, positions_of=x.shape)


def _finish(call: Call, w: Labels, rows: np.ndarray | None, channels: np.ndarray | None, name: str | None, *,
            depthwise: bool, positions_of: tuple[int, ...] | None = None,
            passing: Mapping[int, np.ndarray] | None = None) -> Labels:  # fmt: skip
    many, costs = positions(positions_of or call.shape), w
    for own in (passing or {}).values():  # each position costs as much as any other
        many //= own.size
        arrays = (*(array[..., None] for array in costs.arrays), line(own, len(costs.shape), len(costs.shape) + 1))
        costs = Labels((*costs.shape, own.size), arrays)
    call.trace.costs.append(Cost(costs, many, name))
    if name and rows is not None and not depthwise:
        call.trace.producers.append(Producer(call.node, name, rows))
    if name and channels is not None and not depthwise:
        call.trace.consumers.append(Consumer(call.node, name, channels))
    if call.given("bias"):
        bias = call.labels("bias").along(0)
        if rows is not None and bias is not None:
            call.ledger.equate(bias, rows, f"has a fixed bias ({call.place})")
        elif rows is not None:
            call.ledger.pin(rows, f"has a fixed bias ({call.place})")
            rows = None
    tracked = {**(passing or {}), **({} if rows is None else {1: rows})}
    return Labels(call.shape, tuple(line(own, dim, len(call.shape)) for dim, own in tracked.items()))


def _pin_all_but(call: Call, labels: Labels, *allowed: tuple[int, ...]) -> None:
    for array in labels.arrays:
        if support(array) not in allowed:
            call.ledger.pin(array, f"lies along the window of {call.place}")


@module_integers("conv", ConvNd)
def conv_integers(module: Any, weight: tuple[int, ...]) -> Integers:
    """Of convolutions; a transposed one has its weight laid (in, out / groups, ...)."""
    rows, columns = (weight[1], weight[0]) if module.transposed else weight[:2]
    if module.groups > 1 and module.groups in (module.in_channels, module.out_channels) and module.transposed:
        groups = columns // (module.in_channels // module.groups)
        return {"in_channels": columns, "out_channels": rows * groups, "groups": groups}
    if module.groups > 1 and module.in_channels == module.groups:
        width = rows // (module.out_channels // module.groups)
        return {"in_channels": width, "out_channels": rows, "groups": width}
    if module.transposed:
        return {"in_channels": columns, "out_channels": rows * module.groups}
    return {"in_channels": columns * module.groups, "out_channels": rows}
