"""Where a model is, and in which floating type."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Placement(NamedTuple):
    """Device and floating type."""

    device: torch.device
    dtype: torch.dtype


def placement(model: nn.Module) -> Placement:
    """Device and floating type of a model: those of its first floating-point parameter or buffer.

    A model without any is on the CPU, in the default type.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            return Placement(tensor.device, tensor.dtype)
    return Placement(torch.device("cpu"), torch.get_default_dtype())


def fed(model: nn.Module, images: Tensor) -> Tensor:
    """Images where a model is, in its floating type."""
    return images.to(*placement(model))
