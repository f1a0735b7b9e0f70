"""Errors of a layer that count as the model's outputs see them, frequency by frequency.

Let e be the error of what a layer computes, a map, and g the gradient there of a random projection of the model's
outputs. The outputs lose E ⟨g, e⟩². If the statistics of g are the same all over the map, its frequencies are
uncorrelated, and the loss is the sum over the frequencies f of P(f) |e(f)|², P(f) = E |g(f)|². That is the plain
squared error after a filter with the amplitude √P, and as a layer is linear and commutes with a filter, its input can
be filtered instead: second moments of the patches of filtered inputs then weigh errors as the outputs do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from scap_hub.criteria.patches import PatchLayer

_IMAGES = 8
"""Images that are filtered at a time: their spectra take as much memory as they do."""


def channels_first(layer: nn.Module, maps: Tensor) -> Tensor:
    """A layer's input or output as (N, C, *axes); what a linear layer reads has its channels last."""
    return maps.movedim(-1, 1) if isinstance(layer, nn.Linear) else maps


def power_spectrum(layer: nn.Module, gradient: Tensor) -> Tensor | None:
    """Power of a gradient at each frequency of a layer's output, summed over images and channels.

    Args:
        layer: The layer.
        gradient: By its output.

    Returns:
        (*axes) float64 on the CPU, in the order of `torch.fft.fftn`. None where the layer's output is no map: one
        place, or a list of tokens, whose neighbours need not be neighbours in the image.
    """
    maps = channels_first(layer, gradient)
    if maps.ndim < (4 if isinstance(layer, nn.Linear) else 3) or math.prod(maps.shape[2:]) == 1:
        return None
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    spectra = torch.fft.fftn(maps, dim=tuple(range(2, maps.ndim)), norm="ortho")
    return spectra.abs().square().double().sum((0, 1)).cpu()


def filtered(layer: PatchLayer, x: Tensor, power: Tensor | None) -> tuple[Tensor, float]:
    """A layer's input, filtered so that errors of its output count as the power spectrum says.

    Args:
        layer: The layer.
        x: Its input.
        power: See `power_spectrum`, scaled in any way; None leaves the input alone.

    Returns:
        The filtered input, and what becomes of a constant 1, such as a bias is multiplied with.
    """
    maps = channels_first(layer, x)
    axes = tuple(range(2, maps.ndim))
    if power is None or power.ndim != len(axes) or not power.sum() > 0:
        return x, 1.0
    strides = layer.stride if not isinstance(layer, nn.Linear) else (1,) * len(axes)
    amplitude = (power / power.mean()).sqrt()
    for axis, (size, stride) in enumerate(zip(maps.shape[2:], strides, strict=True)):
        amplitude = _on_input(amplitude, axis, size, int(stride))
    half = amplitude[..., : maps.shape[-1] // 2 + 1]  # of a real signal, the rest follows
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    half = half.to(maps)
    parts = (torch.fft.rfftn(part, dim=axes).mul_(half) for part in maps.split(_IMAGES))
    maps = torch.cat([torch.fft.irfftn(part, s=maps.shape[2:], dim=axes) for part in parts])
    return (maps.movedim(1, -1) if isinstance(layer, nn.Linear) else maps), float(amplitude.flatten()[0])


def _on_input(amplitude: Tensor, axis: int, size: int, stride: int) -> Tensor:
    """The amplitude along one axis of the output's grid, at the frequencies of the input's.

    A filter whose taps are `stride` apart does to every `stride`-th place what the output's own filter would; its
    amplitude repeats `stride` times. Grids that do not match are interpolated.
    """
    bins = amplitude.shape[axis]
    at = torch.arange(size, dtype=torch.float64) * stride * bins / size
    low = at.floor()
    share = (at - low).reshape(-1, *[1] * (amplitude.ndim - axis - 1))
    lower, upper = (amplitude.index_select(axis, index.long() % bins) for index in (low, low + 1))
    return lower + share * (upper - lower)


def summed(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Power spectra of layers, summed over processes; a layer whose grids differ has none.

    Args:
        parts: {path: power spectrum} of each process.
    """
    total: dict[str, Tensor] = {}
    grids: dict[str, set[torch.Size]] = {}
    for part in parts:
        for path, power in part.items():
            grids.setdefault(path, set()).add(power.shape)
            total[path] = total[path] + power if path in total and total[path].shape == power.shape else power
    return {path: power for path, power in total.items() if len(grids[path]) == 1}
