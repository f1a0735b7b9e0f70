"""Whether a comparison of a dense with a pruned model fits into memory."""

from __future__ import annotations

import math
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from scap_hub.errors import ModelError
from scap_hub.graph.copies import without_weights
from scap_hub.graph.node import each
from scap_hub.graph.record import capture
from scap_hub.graph.shapes import allocates
from scap_hub.graph.values import on_meta
from scap_hub.placement import placement

_MODELS = 3
"""Weights that are there at once: the dense copy, the pruned one, and masked ones."""
_WORK = 2
"""Of the memory of all activations; a convolution unrolls what it reads."""


def fits(model: nn.Module, inputs: tuple[Any, ...], dtype: torch.dtype) -> bool:
    """Whether the free memory of a model's device holds what its verification needs in some type.

    Args:
        model: The dense model.
        inputs: Positional arguments of its forward pass.
        dtype: What it would be compared in.
    """
    return needed(model, inputs, dtype) < free(placement(model).device)


def needed(model: nn.Module, inputs: tuple[Any, ...], dtype: torch.dtype) -> int:
    """Bytes that a verification takes, about: the models, and the activations of one recorded forward pass.

    Activations are known where the model can be recorded without weights.
    """
    weights = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    try:
        made = [node for node in capture(without_weights(model), on_meta(inputs)).called if node.is_operator]
    except ModelError:
        made = []
    values = [value for node in made if allocates(node.target) for value in each([node.value])]
    activations = sum(math.prod(value.shape) for value in values if isinstance(value, Tensor))
    return dtype.itemsize * (_MODELS * weights + _WORK * activations)


def free(device: torch.device) -> float:
    """Bytes that are free on a device; infinite where that cannot be told."""
    if device.type == "cpu":
        return psutil.virtual_memory().available
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return math.inf
