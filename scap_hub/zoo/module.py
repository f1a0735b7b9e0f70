"""Any other nn.Module: it can be pruned and saved, but only its owner can build it again."""

from __future__ import annotations

import torch
from torch import nn

from scap_hub.errors import ModelError
from scap_hub.zoo.base import LoadedModel, default_preprocessing, logits, one_line


def from_module(module: nn.Module, source: str, input_size: tuple[int, int, int] | None = None) -> LoadedModel:
    """Describes a module by running it once on an image of zeros.

    Args:
        module: Takes images (N, C, H, W), returns logits (N, classes) or a transformers output.
        source: What the user asked for.
        input_size: (C, H, W) in pixels; by default as many channels as its first convolution takes, 224 x 224.

    Raises:
        ModelError: The module does not run on such an image, or does not return logits.
    """
    if input_size is None:
        convolutions = (m.in_channels for m in module.modules() if isinstance(m, nn.Conv2d))
        input_size = (next(convolutions, 3), 224, 224)
    name = type(module).__name__
    weight = next(module.parameters(), torch.zeros(()))
    try:
        with torch.no_grad():
            output = logits(module.eval()(weight.new_zeros(1, *input_size)))
    except Exception as error:
        raise ModelError(f"{name} does not run on one image {input_size}: {one_line(error)}; set input_size") from error
    if output.ndim != 2:
        raise ModelError(f"{name} returns a tensor {tuple(output.shape)}, not logits (images, classes)")
    return LoadedModel(
        module=module,
        library="module",
        name=name,
        source=source,
        preprocessing=default_preprocessing(input_size),
        num_classes=output.shape[1],
    )
