"""Normalisation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import nn

from scap_hub.channels.labels import Labels, broadcast
from scap_hub.channels.operators.table import Call, Integers, Size, always, module_integers, operator
from scap_hub.private import NormBase


def _affine(call: Call, x: Labels, names: tuple[str, ...], dims: tuple[int, ...]) -> Labels:
    """Lays the per-channel tensors `names` along `dims` of x and equates what meets."""
    operands = [x]
    for name in names:
        if call.given(name):
            tensor = call.labels(name)
            arrays = tuple(array.reshape(_laid(array.shape, dims, len(x.shape))) for array in tensor.arrays)
            operands.append(Labels(_laid(tensor.shape, dims, len(x.shape)), arrays))
    return broadcast(call.ledger, operands, x.shape, f"has a fixed norm parameter ({call.place})")


def _laid(shape: tuple[int, ...], dims: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """A shape with its sizes at `dims` and 1 elsewhere."""
    laid = [1] * rank
    for dim, size in zip(dims, shape, strict=True):
        laid[dim] = size
    return tuple(laid)


@operator("batch_norm", "instance_norm", role="norm", counts=always)
def batch_norm(call: Call) -> Labels:
    """Statistics and affine parameters by channel (dimension 1)."""
    return _affine(call, call.labels("input"), ("weight", "bias", "running_mean", "running_var"), (1,))


def _normalized_shape(call: Call) -> Iterator[Size]:
    rank = len(call["normalized_shape"])
    for index, size in enumerate(call["normalized_shape"]):
        labels = call.results[0].along(index - rank)
        if labels is not None and labels.size == size:
            yield Size("normalized_shape", index, labels)


@operator("layer_norm", "rms_norm", role="norm", counts=always, sizes=_normalized_shape)
def layer_norm(call: Call) -> Labels:
    """Statistics over the last dimensions, taken over the survivors."""
    x = call.labels("input")
    dims = tuple(range(len(x.shape) - len(call["normalized_shape"]), len(x.shape)))
    return _affine(call, x, ("weight", "bias") if "layer" in call.op else ("weight",), dims)


def _one_a_channel(call: Call) -> Iterator[Size]:
    labels = call.results[0].along(1)
    if labels is not None and labels.size == call["num_groups"]:
        yield Size("num_groups", None, labels)


@operator("group_norm", role="norm", counts=always, sizes=_one_a_channel)
def group_norm(call: Call) -> Labels:
    """Statistics by block of channels: every block loses equally many."""
    x = call.labels("input")
    channels = x.along(1)
    if channels is not None and channels.size > call["num_groups"]:
        call.ledger.balance(
            list(np.reshape(channels, (call["num_groups"], -1))), f"{call['num_groups']} groups of {call.place}"
        )
    return _affine(call, x, ("weight", "bias"), (1,))


@module_integers("norm", NormBase)
def batch_norm_integers(module: Any, weight: tuple[int, ...]) -> Integers:
    """Of batch and instance norms."""
    return {"num_features": weight[0]}


@module_integers("group_norm", nn.GroupNorm)
def group_norm_integers(module: Any, weight: tuple[int, ...]) -> Integers:
    """The number of groups is found with the call's own sizes."""
    return {"num_channels": weight[0]}


@module_integers("layer_norm", nn.LayerNorm, nn.RMSNorm)
def layer_norm_integers(module: Any, weight: tuple[int, ...]) -> Integers:
    """Of layer norms."""
    return {"normalized_shape": list(weight)}
