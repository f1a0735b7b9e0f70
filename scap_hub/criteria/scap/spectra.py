"""Low-pass spectra of feature maps.

The spectrum of the complex field Z = X + i (1 ⊗ Y) is FFT(X) + i (1 ⊗ FFT(Y)), so the fields are never built. X and Y
are real: their FFTs hold every coefficient twice, at f and, conjugated, at -f. The discrete Hartley transform
T = Re F - Im F holds it once, in real numbers, and the change of basis is unitary wherever the kept bins come in pairs
±f. Lengths and inner products, which is all that follows depends on, are those of the FFT; memory is half.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def hartley(size: int, bins: int, source: int) -> Tensor:
    """Orthonormal Hartley rows of the lowest frequencies of a signal that is resized before it is transformed.

    Args:
        size: Length to which the signal is resized.
        bins: Frequencies to keep, an odd number (0, ±1, ±2, ...); all of them where `size` is smaller.
        source: Length of the signal as given. The resize is linear with `align_corners=False`, as in `F.interpolate`.

    Returns:
        (min(bins, size), source) float64; (source, source) for a shorter signal, in an orthonormal basis of all that it
        can become.
    """
    kept = min(bins, size)
    frequency = torch.fft.fftfreq(kept, 1 / kept, dtype=torch.float64)
    angle = 2 * math.pi / size * torch.outer(frequency, torch.arange(size, dtype=torch.float64))
    rows = (angle.cos() + angle.sin()) / math.sqrt(size)
    if source == size:
        return rows
    resize = F.interpolate(torch.eye(source, dtype=torch.float64)[None], size, mode="linear", align_corners=False)[0]
    rows = rows @ resize.T
    return torch.linalg.qr(rows).R if source < kept else rows


def spectrum(maps: Tensor, grid: Sequence[int], bins: int) -> Tensor:
    """Spectra of maps on a grid: the lowest `bins` frequencies of each axis, T_1 X T_2ᵀ for an image.

    Args:
        maps: (N, C, *axes), any floating type.
        grid: Lengths to which the axes are resized first, linearly.
        bins: Frequencies to keep on each axis.

    Returns:
        (N, C, P), float64 for float64 maps, else float32; P is the product of min(bins, length) over the axes, with the
        smaller of its length before and after.
    """
    maps = maps.to(torch.float64 if maps.dtype == torch.float64 else torch.float32)
    images, channels = maps.shape[:2]
    transforms = [hartley(size, bins, source).to(maps) for size, source in zip(grid, maps.shape[2:], strict=True)]
    # A few rows from the left are several times faster than as many columns from the right.
    if maps.movedim(1, -1).is_contiguous():
        maps, done = maps.movedim(1, -1), images
        for rows in transforms:
            maps = rows @ maps.reshape(done, rows.shape[1], -1)
            done *= len(rows)
        return maps.reshape(images, -1, channels).transpose(1, 2)
    for rows in reversed(transforms):
        maps = rows @ maps.reshape(-1, rows.shape[1]).T
    return maps.reshape(-1, images, channels).permute(1, 2, 0)
