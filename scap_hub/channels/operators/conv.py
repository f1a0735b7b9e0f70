"""Convolutions: plain, grouped, depthwise, transposed."""

from __future__ import annotations

import numpy as np

from scap_hub.channels.labels import Ids, line, support
from scap_hub.channels.operators.contract import positions
from scap_hub.channels.operators.table import Call, Consumer, Cost, Producer, rule


@rule("conv1d", "conv2d", "conv3d")
def conv(call: Call) -> Ids:
    """(N, I, ...) with a weight of (O, I / groups, ...).

    Grouped: each block of inputs and of outputs loses equally many, each block its own. Depthwise (one input a
    block): input and output leave together, and the groups shrink with them.
    """
    x, w, groups, name = call.ids("input"), call.ids("weight"), call["groups"], call.state("weight")
    ledger, batched = call.ledger, len(call.shape) == len(w.shape)
    if w.shape[:2] == (1, 1) and call.shape == x.shape:
        # Channel attention (ECA) slides over the channels: what is left of them are neighbours then.
        call.trace.costs.append(Cost(x, int(np.prod(w.shape[2:])), name))
        return x
    channels = x.along(1) if batched else None
    _pin_all_but(call, x, (1,) if batched else ())
    _pin_all_but(call, w, (0,), (1,), (0, 1))
    rows = w.along(0)
    blocks_in, blocks_out = x.shape[1] // groups, w.shape[0] // groups
    fixed = f"is convolved with a weight that cannot shrink ({call.place})"

    if groups > 1 and blocks_in == 1:
        if channels is None or rows is None:
            ledger.pin_all([x.only(1), w.only(0)], f"passes a depthwise convolution of fixed width ({call.place})")
            rows = None
        else:
            ledger.equate(rows, np.repeat(channels, blocks_out), fixed)
    elif groups > 1:
        columns = next((layer for layer in w.layers if support(layer) == (0, 1)), None)
        reason = f"{groups} groups of {call.place}"
        if channels is not None and columns is not None:
            block_of_row = np.arange(w.shape[0]) // blocks_out
            ledger.equate(columns.reshape(w.shape[:2]), channels.reshape(groups, blocks_in)[block_of_row], fixed)
            ledger.balance(list(channels.reshape(groups, blocks_in)), reason)
        else:
            ledger.pin_all([x.only(1), w.only(0, 1)], fixed) if blocks_in > 1 else None
        if rows is not None:
            ledger.balance(list(rows.reshape(groups, blocks_out)), reason)
    else:
        columns = w.along(1)
        if channels is not None and columns is not None:
            ledger.equate(columns, channels, fixed)
        else:
            ledger.pin_all([x.only(1), w.only(1)], f"is read with a fixed width ({call.place})")

    return _finish(call, w, rows, channels, name, depthwise=groups > 1 and blocks_in == 1)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def conv_transpose(call: Call) -> Ids:
    """(N, I, ...) with a weight of (I, O / groups, ...)."""
    x, w, name = call.ids("input"), call.ids("weight"), call.state("weight")
    _pin_all_but(call, x, (1,))
    _pin_all_but(call, w, (0,), (1,))
    channels, columns, rows = x.along(1), w.along(0), w.along(1)
    reason = f"is read with a fixed width ({call.place})"
    if call["groups"] > 1:
        call.ledger.pin_all([x, w], f"passes a grouped transposed convolution ({call.place})")
        return Ids(call.shape)
    if channels is not None and columns is not None:
        call.ledger.equate(columns, channels, reason)
    else:
        call.ledger.pin_all([x.only(1), w.only(0)], reason)
    return _finish(call, w, rows, channels, name, depthwise=False, positions_of=x.shape)


def _finish(call: Call, w: Ids, rows: np.ndarray | None, channels: np.ndarray | None, name: str | None, *,
            depthwise: bool, positions_of: tuple[int, ...] | None = None) -> Ids:  # fmt: skip
    call.trace.costs.append(Cost(Ids(w.shape, w.layers), positions(positions_of or call.shape), name))
    if name and rows is not None and not depthwise:
        call.trace.producers.append(Producer(call.node, name, rows))
    if name and channels is not None and not depthwise:
        call.trace.consumers.append(Consumer(call.node, name, channels))
    if call.given("bias"):
        bias = call.ids("bias").along(0)
        if rows is not None and bias is not None:
            call.ledger.equate(bias, rows, f"has a fixed bias ({call.place})")
        elif rows is not None:
            call.ledger.pin(rows, f"has a fixed bias ({call.place})")
            rows = None
    if rows is None:
        return Ids(call.shape)
    return Ids(call.shape, (line(rows, 1, len(call.shape)),))


def _pin_all_but(call: Call, ids: Ids, *allowed: tuple[int, ...]) -> None:
    for layer in ids.layers:
        if support(layer) not in allowed:
            call.ledger.pin(layer, f"lies along the window of {call.place}")
