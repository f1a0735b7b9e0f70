"""The samples of the complex field, centred, balanced and scaled to unit length, in factorised form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 2**16  # samples at a time
COLUMNS = 2**12  # of the input's spectra at a time, few enough for the processor's cache


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

    def blocks(self) -> Iterator[Field]:
        """The samples of some channels after the other, few enough for their features to be small."""
        step = max(1, BLOCK // len(self.x))
        for start in range(0, self.y.shape[1], step):
            some = slice(start, start + step)
            yield Field(self.x, self.y[:, some], self.scale[:, some])

    def moment(self, features: Tensor) -> Tensor:
        """Sum over the samples of u hᵀ for features h, (N, K, q): (M + P, q)."""
        scaled = features * self.scale[..., None]
        return torch.cat([self.x.T @ scaled.sum(1), self.y.flatten(0, 1).T @ scaled.flatten(0, 1)])

    def second_moment(self) -> Tensor:
        """Mean of u uᵀ over the live samples, (M + P, M + P)."""
        weight = self.scale**2
        xx = self.x.T @ (weight.sum(1, keepdim=True) * self.x)
        xy = self.x.T @ torch.einsum("nk,nkp->np", weight, self.y)
        yy = torch.zeros_like(self.y[0, :0].T @ self.y[0, :0])
        for block in self.blocks():
            y = (block.scale[..., None] * block.y).flatten(0, 1)
            yy += y.T @ y
        moment = torch.cat([torch.cat([xx, xy], 1), torch.cat([xy.T, yy], 1)])
        return moment / (self.scale > 0).sum().clamp(min=1)


def normalise(x: Tensor, y: Tensor, balance: bool) -> Field:
    """Normalises the spectra of a layer's input and output channels.

    Means over the images are subtracted per (c, bin) and per (k, bin). Balancing then gives each channel's part the
    energy of the input's part, or fidelity would only mirror the energy of the channels. A part that does not vary
    over the images beyond rounding is dead and set to 0.

    Args:
        x: (N, C, P) spectra of the input.
        y: (N, K, P') spectra of the output channels, on the input's grid; P' < P where they are smaller maps.
        balance: Whether to balance the energies.
    """
    precision = 256 * torch.finfo(x.dtype).eps
    # Scores are ranks, which amplify rounding; float64 from here on makes them independent of the order of images.
    gram, energy_x = _centred_gram(x, precision)
    y, energy_y = _centred(y, precision)
    tiny = torch.finfo(y.dtype).tiny
    gram *= (energy_x > 0) / (energy_x.clamp(min=tiny) if balance else 1)
    # A channel meets each of the C input channels: √C, or unit energy for the part of all of them.
    y *= ((energy_y > 0) * (1 / energy_y.clamp(min=tiny).sqrt() if balance else x.shape[1] ** 0.5))[:, None]
    length = (gram.diagonal()[:, None] + torch.linalg.vector_norm(y, dim=-1).square()).sqrt()  # ν
    scale = torch.where((energy_y > 0) & (length > precision * length.max()), 1 / length, 0)
    return Field(_coordinates(gram), y, scale)


def _centred_gram(x: Tensor, precision: float) -> tuple[Tensor, Tensor]:
    """Gram matrix of the centred input over the images, (N, N), and its energy, 0 if it does not vary.

    The input is the largest tensor, so the matrix is summed up part by part.
    """
    gram, constant = torch.zeros(len(x), len(x), dtype=torch.float64, device=x.device), 0.0
    for part in x.flatten(1).split(COLUMNS, 1):
        part = part.double()
        mean = part.mean(0)
        part -= mean
        gram += part @ part.T
        constant += len(x) * mean.square().sum()
    return gram, _varying(gram.trace(), constant, precision)


def _centred(y: Tensor, precision: float) -> tuple[Tensor, Tensor]:
    """The centred channels, (N, K, P) float64, and their energies, (K,), 0 for those that do not vary."""
    y = y.to(torch.float64, copy=True)
    mean = y.mean(0)
    y -= mean
    energy = torch.linalg.vector_norm(y, dim=(0, 2)).square()
    return y, _varying(energy, len(y) * mean.square().sum(1), precision)


def _varying(energy: Tensor, constant: Tensor | float, precision: float) -> Tensor:
    """Energies around the mean, 0 where they are no more than the rounding of the mean's own energy."""
    return torch.where(energy > precision**2 * (energy + constant), energy, 0)


def _coordinates(gram: Tensor) -> Tensor:
    """Vectors with these inner products, in an orthonormal basis of what they span: (N, M), M <= N."""
    value, vector = torch.linalg.eigh(gram)
    span = value > len(gram) * torch.finfo(value.dtype).eps * value[-1]
    return vector[:, span] * value[span].sqrt()
