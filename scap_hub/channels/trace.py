"""Walks a captured graph once and collects what the rules say about its channels."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from torch import Tensor, fx

from scap_hub.channels.capture import Capture
from scap_hub.channels.ids import Ids
from scap_hub.channels.rules import Call, Trace, rule_for
from scap_hub.channels.rules.registry import flat


def trace(captured: Capture) -> Trace:
    """Ids of every tensor of the graph, with the relations between them."""
    found = Trace(states=captured.states)
    windows = _windows(captured)
    shared: dict[int, Ids] = {}
    for node in captured.graph.nodes:
        if node.op == "placeholder":
            found.ids[node] = _placeholder(found, captured, node, windows, shared)
        elif node.op == "call_function":
            found.ids[node] = _call(found, node)
        elif node.op == "output":
            for source in node.args[0]:
                found.outputs += flat(found.ids[source])
            found.ledger.pin_all(found.outputs, "is an output of the model")
    return found


def bind(node: fx.Node) -> dict[str, Any]:
    """A call's arguments by the names of its operator's schema, defaults filled in."""
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    bound = {argument.name: argument.default_value for argument in arguments}
    bound |= dict(zip(bound, node.args, strict=False))
    return bound | node.kwargs


def _call(found: Trace, node: fx.Node) -> Any:
    if node.target is operator.getitem:
        source, index = node.args
        return found.ids[source][index]  # type: ignore[index]
    if not hasattr(node.target, "_schema"):
        return None
    call = Call(node, found, bind(node))
    if rule := rule_for(call.op):
        return rule(call)
    found.ledger.pin_all(call.tensors, f"enters {call.place}, which has no rule")
    value = node.meta.get("val")
    if isinstance(value, tuple | list):
        return [Ids(tuple(item.shape)) if isinstance(item, Tensor) else None for item in value]
    return Ids(tuple(value.shape)) if isinstance(value, Tensor) else None


def _placeholder(
    found: Trace, captured: Capture, node: fx.Node, windows: dict[str, bool], shared: dict[int, Ids]
) -> Any:
    """Parameters and buffers start with ids of their own along every dimension; inputs have none."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    shape = tuple(value.shape)
    name = captured.states.get(node.name)
    if name is None or not value.is_floating_point():
        return Ids(shape)
    tensor = captured.tensors[name]
    if id(tensor) not in shared:
        layers = []
        for dim, size in enumerate(shape):
            fixed = node.name in windows and (dim > 1 or (dim == 1 and windows[node.name]))
            if size > 1 and not fixed:
                layers.append(found.ledger.fresh(*(size if d == dim else 1 for d in range(len(shape)))))
        if windows.get(node.name) and shape[1] > 1:
            layers.append(found.ledger.fresh(*shape[:2], *(1,) * (len(shape) - 2)))
        shared[id(tensor)] = Ids(shape, tuple(layers))
    return shared[id(tensor)]


def _windows(captured: Capture) -> dict[str, bool]:
    """Placeholders that end up as the weight of a convolution, and whether it is grouped.

    The window of a convolution never shrinks; in a grouped one each block of rows drops its own columns.
    """
    windows: dict[str, bool] = {}
    for node in captured.graph.nodes:
        if node.op == "call_function" and str(node.target).startswith("aten.conv"):
            arguments = bind(node)
            weight = arguments.get("weight")
            while isinstance(weight, fx.Node):
                if weight.op == "placeholder":
                    transposed = "transpose" in str(node.target)
                    windows[weight.name] = arguments["groups"] > 1 and not transposed
                weight = next(iter(weight.all_input_nodes), None)
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
