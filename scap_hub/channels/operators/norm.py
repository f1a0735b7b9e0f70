"""Normalisation layers."""

from __future__ import annotations

import numpy as np

from scap_hub.channels.labels import Ids, broadcast
from scap_hub.channels.operators.table import Call, rule


def _affine(call: Call, x: Ids, names: tuple[str, ...], dims: tuple[int, ...]) -> Ids:
    """Lays the per-channel tensors `names` along `dims` of x and equates what meets."""
    operands = [x]
    for name in names:
        if call.given(name):
            tensor = call.ids(name)
            shape = [1] * len(x.shape)
            for dim, size in zip(dims, tensor.shape, strict=True):
                shape[dim] = size
            laid = []
            for layer in tensor.layers:
                own = [1] * len(x.shape)
                for dim, size in zip(dims, layer.shape, strict=True):
                    own[dim] = size
                laid.append(layer.reshape(own))
            operands.append(Ids(tuple(shape), tuple(laid)))
    return broadcast(call.ledger, operands, x.shape, f"has a fixed norm parameter ({call.place})")


@rule("batch_norm", "instance_norm")
def batch_norm(call: Call) -> Ids:
    """Statistics and affine parameters by channel (dimension 1)."""
    return _affine(call, call.ids("input"), ("weight", "bias", "running_mean", "running_var"), (1,))


@rule("layer_norm", "rms_norm")
def layer_norm(call: Call) -> Ids:
    """Statistics over the last dimensions, taken over the survivors."""
    x = call.ids("input")
    dims = tuple(range(len(x.shape) - len(call["normalized_shape"]), len(x.shape)))
    return _affine(call, x, ("weight", "bias") if "layer" in call.op else ("weight",), dims)


@rule("group_norm")
def group_norm(call: Call) -> Ids:
    """Statistics by block of channels: every block loses equally many."""
    x = call.ids("input")
    channels = x.along(1)
    if channels is not None and channels.size > call["num_groups"]:
        call.ledger.balance(
            list(np.reshape(channels, (call["num_groups"], -1))), f"{call['num_groups']} groups of {call.place}"
        )
    return _affine(call, x, ("weight", "bias"), (1,))
