"""Concatenation and stacking."""

from __future__ import annotations

import numpy as np

from scap_hub.channels.labels import STAYS, Ids, broadcast, support
from scap_hub.channels.operators.table import Call, rule


@rule("cat", "concat", "concatenate")
def cat(call: Call) -> Ids:
    """Parts one after the other; what varies elsewhere must agree in every part."""
    parts = [call.trace.ids[node] for node in call["tensors"]]
    shape = call.shape
    dim = call.args.get("dim", 0) % len(shape)
    inside = {support(layer) for part in parts for layer in part.layers if dim in support(layer)}
    layers = []
    for dims in inside:
        pieces = []
        for part in parts:
            layer = next((own for own in part.layers if support(own) == dims), np.full((1,) * len(shape), STAYS))
            target = [part.shape[d] if d == dim or d in dims else 1 for d in range(len(shape))]
            pieces.append(np.broadcast_to(layer, target))
        layers.append(np.concatenate(pieces, axis=dim))
    outside = [
        Ids(
            tuple(1 if d == dim else size for d, size in enumerate(part.shape)),
            tuple(layer for layer in part.layers if dim not in support(layer)),
        )
        for part in parts
    ]
    whole = tuple(1 if d == dim else size for d, size in enumerate(shape))
    agreed = broadcast(call.ledger, outside, whole, f"lies beside a tensor that cannot shrink ({call.place})")
    return Ids(shape, (*layers, *agreed.layers))


@rule("stack")
def stack(call: Call) -> Ids:
    """Equal parts along a new dimension: they must agree everywhere."""
    parts = [call.trace.ids[node] for node in call["tensors"]]
    dim = call["dim"] % len(call.shape)
    agreed = broadcast(call.ledger, parts, parts[0].shape, f"is stacked on a tensor that cannot shrink ({call.place})")
    return Ids(call.shape, tuple(np.expand_dims(layer, dim) for layer in agreed.layers))
