"""The device and the floating-point type of a model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Placement(NamedTuple):
    """A device and a floating-point type."""

    device: torch.device
    dtype: torch.dtype


def placement(model: nn.Module) -> Placement:
    """Device and floating-point type of a model, read off its first floating-point parameter or buffer.

    A model without any counts as one on the CPU in torch's default type.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            return Placement(tensor.device, tensor.dtype)
    return Placement(torch.device("cpu"), torch.get_default_dtype())


def fed(model: nn.Module, images: Tensor) -> Tensor:
    """Images on the device of a model, in its floating-point type."""
    return images.to(*placement(model))
