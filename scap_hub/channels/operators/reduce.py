"""Reductions, taken over the survivors, and operators that normalise over a dimension."""

from __future__ import annotations

from scap_hub.channels.labels import Ids, merge, support
from scap_hub.channels.operators.table import Call, rule


@rule("mean", "sum", "amax", "amin", "var", "std", "var_mean", "std_mean", "logsumexp", "norm", "linalg_vector_norm",
      "max.dim", "min.dim")  # fmt: skip
def reduction(call: Call) -> Ids | list[Ids]:
    """Layers of the reduced dimensions end here; the others go on."""
    x = call.ids("self")
    rank = len(x.shape)
    dims = call.args.get("dim")
    dims = range(rank) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    gone = {dim % rank for dim in dims}
    keepdim = call.args.get("keepdim", False)
    layers = []
    for layer in x.layers:
        along = set(support(layer))
        if along & gone and along - gone:
            call.ledger.pin(layer, f"is reduced along a part of its dimensions ({call.place})")
        elif not along & gone:
            layers.append(layer if keepdim else layer.reshape([s for d, s in enumerate(layer.shape) if d not in gone]))
        elif "max.dim" in call.op or "min.dim" in call.op:
            call.ledger.pin(layer, f"is indexed by {call.place}")
    value = call.node.value
    if isinstance(value, tuple | list):
        return [Ids(shape, tuple(layers)) for shape in call.shapes]
    return merge(call.ledger, call.shape, layers, f"is reduced ({call.place})")


@rule("softmax", "log_softmax", "_softmax", "cumsum", "argmax", "sort", "topk", "glu")
def fixed_along(call: Call) -> Ids | list[Ids]:
    """The dimension that the operator runs over cannot shrink."""
    x, dim = call.ids("self"), call.dim()
    kept = []
    for layer in x.layers:
        if dim in support(layer):
            call.ledger.pin(layer, f"is normalised or sorted over ({call.place})")
        else:
            kept.append(layer)
    if call.op.startswith(("softmax", "log_softmax", "_softmax", "cumsum")):
        return Ids(call.shape, tuple(kept))
    for layer in kept:
        call.ledger.pin(layer, f"enters {call.place}")
    value = call.node.value
    return [Ids(shape) for shape in call.shapes] if isinstance(value, tuple | list) else Ids(call.shape)
