"""Tensors of layers brought into one layout: channels first, on the grid of an image."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from scap_hub.errors import ModelError


def channels_first(maps: Tensor, dim: int, images: int, layer: str) -> Tensor:
    """Puts the channels of a layer's input or output behind the images.

    Args:
        maps: The input or output; where windows of an image are items of the batch, they become an axis.
        dim: Its channel dimension, 1 or -1.
        images: How many images it comes from.
        layer: Path of the layer, for the error.

    Returns:
        (N, C, *axes).

    Raises:
        ModelError: The number of items is no multiple of the number of images.
    """
    if maps.shape[0] != images:
        if maps.shape[0] % images:
            raise ModelError(f"{layer!r} sees {maps.shape[0]} items for {images} images; protect this layer")
        maps, dim = maps.unflatten(0, (images, -1)), dim + 1 if dim > 0 else dim
    return maps.movedim(dim, 1)


def on_grid(maps: Tensor, grid: Sequence[int]) -> Tensor:
    """Gives maps as many axes as a grid has: tokens (N, C, T) take the grid's proportions.

    Tokens in front of those of the image (class token, registers) are dropped.

    Args:
        maps: (N, C, *axes).
        grid: Lengths of the grid's axes.

    Returns:
        (N, C, *axes) with `len(grid)` axes.

    Raises:
        ModelError: Too few tokens for any grid of these proportions.
    """
    if maps.ndim - 2 == len(grid):
        return maps
    maps = maps.reshape(*maps.shape[:2], -1)
    ratio = (maps.shape[2] / math.prod(grid)) ** (1 / max(len(grid), 1))
    shape = [max(round(size * ratio), 1) for size in grid]
    if math.prod(shape) > maps.shape[2]:
        raise ModelError(
            f"{maps.shape[2]} tokens do not fit a grid of {tuple(grid)}; protect the layer that makes them"
        )
    return maps[:, :, maps.shape[2] - math.prod(shape) :].reshape(*maps.shape[:2], *shape)
