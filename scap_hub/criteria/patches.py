"""Input patches: what the rows of a convolution's or linear layer's weight are multiplied with."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scap_hub.private import ConvNd

PatchLayer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
"""Layers whose output is their weight times patches of their input."""

_GOLDEN = 0.6180339887498949


def patches(layer: PatchLayer, x: Tensor, images: int, places: int | None = None) -> Tensor:
    """Input patches at evenly spread places, the same ones in every image, so that batches do not matter.

    Args:
        layer: The layer.
        x: Its input.
        images: Number of images in the batch.
        places: How many places of each image to read; all where it has fewer, or if left out.

    Returns:
        (blocks, images * places, unknowns): as many blocks as the convolution has groups; the unknowns are in the order
        of the weight's own, (in / groups, *kernel).
    """
    images, places = _per_image(layer, x, images, places)
    if isinstance(layer, nn.Linear):
        rows = x.reshape(images, -1, x.shape[-1])
        return rows[:, _spread(rows.shape[1], places, x)].reshape(1, -1, x.shape[-1])
    x = padded(layer, x)
    spatial = x.ndim - 2
    for dim, (size, step, gap) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
        x = x.unfold(2 + dim, gap * (size - 1) + 1, step)[..., ::gap]
    # Items are images, or windows of them: (items, C, *grid, *kernel).
    x = x.unflatten(0, (images, -1)).movedim(1, 2)
    grid = x.shape[2 : 3 + spatial]
    index: Any = (slice(None), slice(None), *torch.unravel_index(_spread(prod(grid), places, x), grid))
    rows = x[index].transpose(1, 2).flatten(0, 1)  # (images * places, C, *kernel)
    return rows.flatten(1).unflatten(1, (layer.groups, -1)).transpose(0, 1)


def outputs_at_patches(layer: PatchLayer, y: Tensor, images: int, places: int | None = None) -> Tensor:
    """A layer's outputs at the places where `patches` reads its input.

    Args:
        layer: The layer.
        y: Its output.
        images: As for `patches`.
        places: As for `patches`.

    Returns:
        (images * places, O).
    """
    images, places = _per_image(layer, y, images, places)
    if isinstance(layer, nn.Linear):
        rows = y.reshape(images, -1, y.shape[-1])
    else:
        rows = y.unflatten(0, (images, -1)).transpose(1, 2).flatten(2).mT
    return rows[:, _spread(rows.shape[1], places, y)].flatten(0, 1)


def _per_image(layer: PatchLayer, x: Tensor, images: int, places: int | None) -> tuple[int, int | None]:
    """How many images an input comes from, and how many places to read of each.

    An input that does not come from the images, such as a table of positions, counts as one image with all the places.
    """
    items = x[..., 0].numel() if isinstance(layer, nn.Linear) else len(x)
    return (images, places) if items % images == 0 else (1, places and places * images)


def padded(layer: ConvNd, x: Tensor) -> Tensor:
    """The input as the convolution pads it."""
    sides: Sequence[tuple[int, int]]
    if isinstance(layer.padding, str):
        total = [gap * (size - 1) for gap, size in zip(layer.dilation, layer.kernel_size, strict=True)]
        sides = [(t // 2, t - t // 2) if layer.padding == "same" else (0, 0) for t in total]
    else:
        sides = [(int(side), int(side)) for side in layer.padding]
    if all(side == (0, 0) for side in sides):
        return x
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, [amount for side in reversed(sides) for amount in side], mode=mode)


def _spread(size: int, places: int | None, x: Tensor) -> Tensor:
    """Indices below `size`; multiples of the golden ratio fill it evenly and line up with no row of an image."""
    if places is None or places >= size:
        return torch.arange(size, device=x.device)
    return (torch.arange(places, dtype=torch.float64, device=x.device) * _GOLDEN % 1 * size).long()


def views(layer: PatchLayer, x: Tensor) -> list[Tensor]:
    """The part of a layer's input that each place of its kernel sees.

    Args:
        layer: The layer.
        x: Its input, (N, C, *axes); (N, ..., C) for a linear layer.

    Returns:
        (N, C, *grid) for each place of the kernel, in the order of the weight's own.
    """
    if isinstance(layer, nn.Linear):
        return [x.movedim(-1, 1)]
    x = padded(layer, x)
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    grid = [
        (size - gap * (width - 1) - 1) // step + 1
        for size, width, step, gap in zip(x.shape[2:], kernel, stride, dilation, strict=True)
    ]
    places = itertools.product(*(range(width) for width in kernel))
    return [x[_window(place, dilation, stride, grid)] for place in places]


def _window(place: Sequence[int], dilation: Sequence[int], stride: Sequence[int], grid: Sequence[int]) -> Any:
    """Indices of the input that one place of the kernel sees."""
    axes = [
        slice(start * gap, start * gap + (count - 1) * step + 1, step)
        for start, gap, step, count in zip(place, dilation, stride, grid, strict=True)
    ]
    return (slice(None), slice(None), *axes)
