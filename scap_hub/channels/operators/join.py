"""Concatenation and stacking."""

from __future__ import annotations

import numpy as np

from scap_hub.channels.labels import STAYS, Labels, broadcast, support
from scap_hub.channels.operators.table import Call, operator


@operator("cat", "concat", "concatenate")
def cat(call: Call) -> Labels:
    """Parts one after the other; what varies elsewhere must agree in every part."""
    parts = [call.trace.labels[node] for node in call["tensors"]]
    shape = call.shape
    dim = call.args.get("dim", 0) % len(shape)
    parts = [part for part in parts if len(part.shape) == len(shape)]  # an empty tensor adds nothing
    inside = dict.fromkeys(support(array) for part in parts for array in part.arrays if dim in support(array))
    if any(_single(part, dim) is not None for part in parts):
        inside[(dim,)] = None
    joined = []
    for dims in inside:
        pieces = []
        for part in parts:
            array = next((own for own in part.arrays if support(own) == dims), None)
            if array is None and dims == (dim,):
                array = _single(part, dim)
            if array is None:
                array = np.full((1,) * len(shape), STAYS)
            target = [part.shape[d] if d == dim or d in dims else 1 for d in range(len(shape))]
            pieces.append(np.broadcast_to(array, target))
        joined.append(np.concatenate(pieces, axis=dim))
    outside = [
        Labels(
            tuple(1 if d == dim else size for d, size in enumerate(part.shape)),
            tuple(array for array in part.arrays if support(array) and dim not in support(array)),
        )
        for part in parts
    ]
    whole = tuple(1 if d == dim else size for d, size in enumerate(shape))
    agreed = broadcast(call.ledger, outside, whole, f"lies beside a tensor that cannot shrink ({call.place})")
    return Labels(shape, (*joined, *agreed.arrays))


def _single(part: Labels, dim: int) -> np.ndarray | None:
    """The label of a part that is a single element wide along the dimension, if no other is so narrow too."""
    alone = [array for array in part.arrays if not support(array)]
    return alone[0] if part.shape[dim] == 1 and len(alone) == 1 else None


@operator("stack")
def stack(call: Call) -> Labels:
    """Equal parts along a new dimension: they must agree everywhere."""
    parts = [call.trace.labels[node] for node in call["tensors"]]
    dim = call["dim"] % len(call.shape)
    agreed = broadcast(call.ledger, parts, parts[0].shape, f"is stacked on a tensor that cannot shrink ({call.place})")
    return Labels(call.shape, tuple(np.expand_dims(array, dim) for array in agreed.arrays))
