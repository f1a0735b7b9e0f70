"""Reductions, taken over the survivors, and operators that normalise over a dimension."""

from __future__ import annotations

import operator as python

from scap_hub.channels.labels import Labels, merge, support
from scap_hub.channels.operators.table import Call, always, operator


@operator(
    "mean", "sum", "amax", "amin", "var", "std", "var_mean", "std_mean", "logsumexp", "norm", "linalg_vector_norm",
    "max", "min",
    counts=always,
)  # fmt: skip
def reduction(call: Call) -> Labels | list[Labels]:
    """Labels of the reduced dimensions end here; the others go on."""
    if len(call.tensors) > 1:  # max(x, y) is an elementwise maximum
        call.ledger.pin_all(call.tensors, f"enters {call.place} of two tensors")
        return call.unlabelled()
    x = call.labels("self")
    rank = len(x.shape)
    dims = call.args.get("dim")
    dims = range(rank) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    gone = {dim % rank for dim in dims} if rank else set()
    keepdim = call.args.get("keepdim", False)
    kept = []
    for array in x.arrays:
        along = set(support(array))
        if along & gone and call.node.name in ("max", "min") and _says_where(call):
            call.ledger.pin(array, f"is indexed by {call.place}")
            continue
        if along & gone and along - gone:  # what is reduced to one element leaves together
            first = array[tuple(slice(0, 1) if dim in gone else slice(None) for dim in range(rank))]
            call.ledger.equate(array, first, f"is reduced with others ({call.place})")
            array = first
        elif along & gone:
            continue
        kept.append(array if keepdim else array.reshape([s for d, s in enumerate(array.shape) if d not in gone]))
    if isinstance(call.node.value, tuple | list):
        return [Labels(shape, tuple(kept)) for shape in call.shapes]
    return merge(call.ledger, call.shape, kept, f"is reduced ({call.place})")


def _says_where(call: Call) -> bool:
    """Whether the forward pass uses the place of a maximum, beside its value."""
    places = [user for user in call.node.users if user.target is python.getitem and user.args[1] == 1]
    return any(place.users for place in places)


@operator("softmax", "log_softmax", "_softmax", "cumsum")
def fixed_along(call: Call) -> Labels:
    """The dimension that the operator runs over cannot shrink."""
    return Labels(call.shape, tuple(call.free_along(call.labels("self"), call.dim(), "is normalised or sorted over")))


@operator("_fft_r2c", "_fft_c2c", "_fft_c2r")
def transformed(call: Call) -> Labels:
    """Fourier transforms; those that code calls by name are computed from these three."""
    kept = []
    for array in call.labels("self").arrays:
        if any(array.shape[dim] > 1 for dim in call["dim"]):
            call.ledger.pin(array, f"is transformed ({call.place})")
        else:
            kept.append(array)
    return Labels(call.shape, tuple(kept))


@operator("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(call: Call) -> list[Labels]:
    """Left to a rule of its own when a model needs it; torch would take it apart step by step."""
    call.ledger.pin_all(call.tensors, f"enters {call.place}, which has no rule")
    return call.unlabelled()


@operator("argmax", "argmin", "sort", "topk", "where.default")
def values_matter(call: Call) -> Labels | list[Labels]:
    """What is where depends on values: nothing that enters can shrink."""
    call.ledger.pin_all(call.tensors, f"is looked up by value ({call.place})")
    return call.unlabelled()


@operator("glu")
def glu(call: Call) -> Labels:
    """The first half of a dimension times the sigmoid of the second: pairs leave together."""
    x, dim = call.labels("self"), call.dim()
    kept = []
    for array in x.arrays:
        if dim in support(array):
            half = array.shape[dim] // 2
            first, second = array.take(range(half), dim), array.take(range(half, 2 * half), dim)
            call.ledger.equate(first, second, f"is gated by another ({call.place})")
            kept.append(first)
        else:
            kept.append(array)
    return merge(call.ledger, call.shape, kept, f"is gated ({call.place})")
