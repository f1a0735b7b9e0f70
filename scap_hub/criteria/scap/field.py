"""The samples of the complex field, centred, balanced and scaled to unit length, in factorised form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Field:
    """The unit samples u_nk = s_nk / ν_nk of one layer, where s_nk = [x_n; 1_C ⊗ y_nk] and ν_nk = |s_nk|.

    All samples lie in the span of the N vectors x_n and the P vectors 1_C ⊗ e_p, which are orthogonal, so they are held
    by their M + P coordinates in an orthonormal basis of it: M <= N for x_n, and √C y_nk. This is an isometry:
    lengths, inner products and principal components are those of the C x 2P field, at a size that depends on neither C
    nor K.

    Attributes:
        x: (N, M) coordinates of the layer's centred input.
        y: (N, K, P) centred output channels, times √C.
        scale: (N, K), 1 / ν_nk; 0 where the sample or its channel is dead.
    """

    x: Tensor
    y: Tensor
    scale: Tensor

    def __matmul__(self, columns: Tensor) -> Tensor:
        """Inner products of every unit sample with q columns, (N, K, q): W s = W x_n + (Σ_c W_c) y_nk, over ν."""
        m = self.x.shape[1]
        return ((self.x @ columns[:m])[:, None] + self.y @ columns[m:]) * self.scale[..., None]

    def second_moment(self) -> Tensor:
        """Mean of u uᵀ over the live samples, (M + P, M + P)."""
        weight = self.scale**2
        xx = self.x.T @ (weight.sum(1, keepdim=True) * self.x)
        xy = self.x.T @ torch.einsum("nk,nkp->np", weight, self.y)
        y = (self.scale[..., None] * self.y).flatten(0, 1)
        moment = torch.cat([torch.cat([xx, xy], 1), torch.cat([xy.T, y.T @ y], 1)])
        return moment / (self.scale > 0).sum().clamp(min=1)

    def channels(self, index: Tensor) -> Field:
        """The samples of some of the channels."""
        return Field(self.x, self.y[:, index], self.scale[:, index])


def normalise(x: Tensor, y: Tensor, balance: bool) -> Field:
    """Normalises the spectra of a layer's input and output channels.

    Means over the images are subtracted per (c, bin) and per (k, bin). Balancing then gives each channel's part the
    energy of the input's part, or fidelity would only mirror the energy of the channels. A part that does not vary
    over the images beyond rounding is dead and set to 0.

    Args:
        x: (N, C, P) spectra of the input.
        y: (N, K, P) spectra of the output channels, on the input's grid.
        balance: Whether to balance the energies.
    """
    precision = 256 * torch.finfo(x.dtype).eps
    # Scores are ranks, which amplify rounding; float64 from here on makes them independent of the order of images.
    x, y = x.double(), y.double()
    x, energy_x = _centre(x.flatten(1)[:, None], precision)
    y, energy_y = _centre(y, precision)
    if balance:
        x = x / energy_x.clamp(min=torch.finfo(x.dtype).tiny).sqrt()[:, None]
        y = y / energy_y.clamp(min=torch.finfo(y.dtype).tiny).sqrt()[:, None]
    else:
        y = y * (x.shape[-1] / y.shape[-1]) ** 0.5  # √C
    x = x[:, 0]
    length = (x.square().sum(-1)[:, None] + y.square().sum(-1)).sqrt()
    live = (energy_y > 0) & (length > precision * length.max())
    scale = torch.where(live, 1 / length, 0)

    value, vector = torch.linalg.eigh(x @ x.T)
    span = value > len(x) * torch.finfo(x.dtype).eps * value[-1]
    return Field(vector[:, span] * value[span].sqrt(), y, scale)


def _centre(part: Tensor, precision: float) -> tuple[Tensor, Tensor]:
    """Subtracts the mean over images of (N, K, P); also returns the (K,) energies. What is only rounding becomes 0."""
    mean = part.mean(0)
    centred = part - mean
    energy = centred.square().sum((0, 2))
    live = energy > precision**2 * (energy + len(part) * mean.square().sum(1))
    return centred * live[:, None], energy * live
