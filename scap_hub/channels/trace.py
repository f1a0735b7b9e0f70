"""Walks a captured graph once and collects what the rules say about its channels."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from torch import Tensor

from scap_hub.channels.labels import Ids
from scap_hub.channels.operators import Call, Trace, rule_for
from scap_hub.channels.operators.table import flat
from scap_hub.graph.node import Node
from scap_hub.graph.record import Capture


def trace(captured: Capture) -> Trace:
    """Ids of every tensor of the forward pass, with the relations between them."""
    found = Trace()
    windows = _windows(captured)
    shared: dict[int, Ids] = {}
    for node in captured.given:
        found.ids[node] = _given(found, node, windows, shared)
    for node in captured.called:
        found.ids[node] = _called(found, node)
    for node in captured.outputs:
        found.outputs += flat(found.ids[node])
    found.ledger.pin_all(found.outputs, "is an output of the model")
    return found


def _called(found: Trace, node: Node) -> Any:
    if node.target is operator.getitem:
        source, index = node.args
        return found.ids[source][index]
    if not node.is_operator:
        return None
    call = Call(node, found)
    if rule := rule_for(node.op):
        return rule(call)
    found.ledger.pin_all(call.tensors, f"enters {call.place}, which has no rule")
    if isinstance(node.value, list):
        return [Ids(tuple(item.shape)) if isinstance(item, Tensor) else None for item in node.value]
    return Ids(tuple(node.value.shape)) if isinstance(node.value, Tensor) else None


def _given(found: Trace, node: Node, windows: dict[Node, bool], shared: dict[int, Ids]) -> Ids:
    """Parameters and buffers start with ids of their own along every dimension; inputs have none."""
    shape = tuple(node.value.shape)
    if node.state is None or not node.value.is_floating_point():
        return Ids(shape)
    if id(node.tensor) not in shared:
        layers = []
        for dim, size in enumerate(shape):
            fixed = node in windows and (dim > 1 or (dim == 1 and windows[node]))
            if size > 1 and not fixed:
                layers.append(found.ledger.fresh(*(size if d == dim else 1 for d in range(len(shape)))))
        if windows.get(node) and shape[1] > 1:
            layers.append(found.ledger.fresh(*shape[:2], *(1,) * (len(shape) - 2)))
        shared[id(node.tensor)] = Ids(shape, tuple(layers))
    return shared[id(node.tensor)]


def _windows(captured: Capture) -> dict[Node, bool]:
    """Tensors that end up as the weight of a convolution, and whether it is grouped.

    The window of a convolution never shrinks; in a grouped one each block of rows drops its own columns.
    """
    windows: dict[Node, bool] = {}
    for node in captured.called:
        if node.op.startswith("conv"):
            weight = node.arguments.get("weight")
            while weight is not None:
                if weight.target is None:
                    windows[weight] = node.arguments["groups"] > 1 and "transpose" not in node.op
                weight = next(iter(weight.sources), None)
    return windows


def count_staying(ids: Ids, keep: np.ndarray) -> int:
    """Number of a tensor's elements that stay; `keep` tells of every id whether it stays."""
    total = 1
    layers = list(ids.layers)
    tracked: set[int] = set()
    while layers:
        layer = layers.pop()
        together, dims = [layer], {d for d, s in enumerate(layer.shape) if s > 1}
        for other in list(layers):
            if any(other.shape[d] > 1 for d in dims):
                together.append(other)
                layers.remove(other)
                dims |= {d for d, s in enumerate(other.shape) if s > 1}
        mask = keep[together[0]]
        for other in together[1:]:
            mask = mask & keep[other]
        total *= int(mask.sum())
        tracked |= dims
    for dim, size in enumerate(ids.shape):
        total *= 1 if dim in tracked else size
    return total
