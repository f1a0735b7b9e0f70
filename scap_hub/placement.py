"""The device and the floating-point type of a model: what it is fed, and in what precision it is worked on.

A model keeps the types that it was given. Scores, repair and training are computed in single precision at least: half
precision has too few digits for least squares and for small steps of a weight. So a model in half precision is raised
before that work and lowered after it.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from scap_hub.errors import ModelError


class Placement(NamedTuple):
    """A device and a floating-point type."""

    device: torch.device
    dtype: torch.dtype


def placement(model: nn.Module) -> Placement:
    """Device and floating-point type of a model, read off its first floating-point parameter or buffer.

    A model without any counts as one on the CPU in torch's default type.
    """
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.is_floating_point():
            return Placement(tensor.device, tensor.dtype)
    return Placement(torch.device("cpu"), torch.get_default_dtype())


def fed(model: nn.Module, images: Tensor) -> Tensor:
    """A copy of images for a model that may write to them, on its device and in its floating-point type."""
    return images.to(*placement(model), copy=True)


_HALF = (torch.float16, torch.bfloat16)

Precisions = dict[str, torch.dtype]
"""Types of the tensors of a model that are in half precision, by name."""


def half_precisions(model: nn.Module) -> Precisions:
    """The parameters and buffers in half precision; empty for most models."""
    return {name: tensor.dtype for name, tensor in _tensors(model) if tensor.dtype in _HALF}


def raise_precision(model: nn.Module) -> Precisions:
    """Makes single precision of half precision, in place; returns what `lower_precision` makes it again by."""
    precisions = half_precisions(model)
    _cast(model, dict.fromkeys(precisions, torch.float32))
    return precisions


def raised(model: nn.Module) -> nn.Module:
    """A copy in single precision of a model with anything in half precision; any other model itself."""
    if not half_precisions(model):
        return model
    model = copy.deepcopy(model)
    raise_precision(model)
    return model


def lower_precision(model: nn.Module, precisions: Mapping[str, torch.dtype]) -> None:
    """Gives tensors of a model the types that they had, in place.

    Raises:
        ModelError: A number is too large for its type; says which tensor, and leaves the model as it was.
    """
    for name, tensor in _tensors(model):
        dtype = precisions.get(name)
        if dtype is not None and not tensor.to(dtype).isfinite().all() and tensor.isfinite().all():
            raise ModelError(
                f"after repair and training {name!r} is too large for {str(dtype).removeprefix('torch.')}: give the "
                "model in float32 or bfloat16"
            )
    _cast(model, precisions)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _cast(model: nn.Module, precisions: Mapping[str, torch.dtype]) -> None:
    for name, tensor in _tensors(model):
        if name in precisions:
            tensor.data = tensor.data.to(precisions[name])
