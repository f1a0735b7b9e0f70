"""Walks a captured graph once and collects what the rules say about its channels."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scap_hub.channels.labels import Labels, support
from scap_hub.channels.operators import Call, Trace, flat, operator_of
from scap_hub.graph.node import Node
from scap_hub.graph.record import Capture, overwritten


def trace(captured: Capture, found: Trace | None = None) -> Trace:
    """Labels of every tensor of a forward pass, with the relations between them.

    Args:
        captured: The forward pass.
        found: What another forward pass of the same model (in training mode) has found already; parameters keep their
            labels, and what is found here is added.
    """
    found = found or Trace()
    first = len(found.outputs)
    found.returned.update(captured.outputs)
    windows = _windows(captured)
    for node in captured.given:
        found.labels[node] = _given(found, node, windows)
    for node in captured.called:
        before = len(found.ledger.made)
        found.labels[node] = label(found, node)
        found.fresh[node] = found.ledger.made[before:]
    for node in captured.given:
        picks = all(_picks(user, node) for user in node.users) and node not in captured.outputs
        if node.state in found.indices and not picks:
            found.ledger.pin(found.indices[node.state], f"is numbered by {node.state!r}, whose values have another use")
    for node in captured.outputs:
        found.outputs += flat(found.labels[node])
    found.ledger.pin_all(found.outputs[first:], "is an output of the model")
    return found


def _picks(user: Node, numbers: Node) -> bool:
    """Whether a node only picks elements by such numbers."""
    if user.name not in ("index", "index_select"):
        return False
    return user.arguments["self"] is not numbers


def retrace(captured: Capture, found: Trace, same: Mapping[Node, Node]) -> None:
    """Adds to a trace a forward pass that only repeats the one that it is of.

    Args:
        captured: The forward pass.
        found: The trace of the first one.
        same: The nodes of the first one that those of this one repeat; the others have no part in it.
    """
    for node in (*captured.given, *captured.called):
        if (other := same.get(node)) is not None:
            found.labels[node], found.fresh[node] = found.labels[other], found.fresh.get(other, [])
        else:
            found.labels[node] = label(found, node) if node.target else _given(found, node, {})


def label(found: Trace, node: Node) -> Any:
    """The labels of one node, from those of the nodes that it reads: `Labels`, a list of them, or None."""
    if node.target is operator.getitem:
        source, index = node.args
        return found.labels[source][index]
    if node.target is overwritten:
        return _overwritten(found, *node.args)
    if not node.is_operator:
        return None
    call = Call(node, found)
    if known := operator_of(node):
        return known.rule(call)
    found.ledger.pin_all(call.tensors, f"enters {call.place}, which has no rule")
    if isinstance(node.value, list):
        return [Labels(tuple(item.shape)) if isinstance(item, Tensor) else None for item in node.value]
    return Labels(tuple(node.value.shape)) if isinstance(node.value, Tensor) else None


def _overwritten(found: Trace, tensor: Node, *written: Node) -> Labels:
    """Labels belong to places in memory: they are the ones from before, if each write left its places theirs."""
    reason = "is written to through another view of its memory"
    for node in written:
        after = {support(array): array for labels in flat(found.labels[node]) for array in labels.arrays}
        for array in found.labels[node.args[0]].arrays:
            if support(array) in after:
                found.ledger.equate(array, after[support(array)], reason)
            else:
                found.ledger.pin(array, reason)
    return found.labels[tensor]


def _given(found: Trace, node: Node, windows: dict[Node, int]) -> Labels:
    """Parameters and buffers start with labels of their own along every dimension; inputs have none."""
    shape = tuple(node.value.shape)
    if node.state is None or not (node.value.is_floating_point() or node.value.dtype == torch.bool):
        return Labels(shape)
    if windows.get(node, 1) > 1:
        found.blocks[node.state] = windows[node]
    if id(node.tensor) not in found.owned:
        grouped = windows.get(node, 1) > 1
        arrays = []
        for dim, size in enumerate(shape):
            fixed = node in windows and (dim > 1 or (dim == 1 and grouped))
            if size > 1 and not fixed:
                arrays.append(found.ledger.fresh(*(size if d == dim else 1 for d in range(len(shape)))))
        if grouped and shape[1] > 1:
            arrays.append(found.ledger.fresh(*shape[:2], *(1,) * (len(shape) - 2)))
        found.owned[id(node.tensor)] = Labels(shape, tuple(arrays))
    return found.owned[id(node.tensor)]


def _windows(captured: Capture) -> dict[Node, int]:
    """Tensors that end up as the weight of a convolution, and into how many groups.

    The window of a convolution never shrinks; in a grouped one each block of rows drops its own columns.
    """
    windows: dict[Node, int] = {}
    for node in captured.called:
        if "conv" in node.op and "weight" in node.arguments:
            weight = node.arguments["weight"]
            while weight is not None:
                if weight.target is None:
                    windows[weight] = 1 if "transpose" in node.op else node.arguments["groups"]
                weight = next(iter(weight.sources), None)
    return windows


def count_staying(labels: Labels, stays: np.ndarray) -> int:
    """Number of a tensor's elements that stay; `stays` tells of every label whether it does."""
    total = 1
    rest = list(labels.arrays)
    tracked: set[int] = set()
    while rest:
        # Arrays that vary along a common dimension are counted together.
        together = [rest.pop()]
        dims = set(support(together[0]))
        for other in list(rest):
            if dims & set(support(other)):
                together.append(other)
                rest.remove(other)
                dims |= set(support(other))
        mask = stays[together[0]]
        for other in together[1:]:
            mask = mask & stays[other]
        total *= int(mask.sum())
        tracked |= dims
    for dim, size in enumerate(labels.shape):
        total *= 1 if dim in tracked else size
    return total
