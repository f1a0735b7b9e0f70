"""The low-capacity autoencoder of a layer, shared by its channels: h = f(W u), û = D h."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scap_hub.criteria.scap.field import Field

HIDDEN = 2  # nonlinear features per latent dimension
RIDGE = 1e-6  # relative to the mean energy of a feature


@dataclass(frozen=True)
class Autoencoder:
    """f(a) = [a; tanh(V a + c)] of the r-dimensional code a = W u; without V, the code itself.

    The outer maps are linear, so fields stay factorised (see `Field.__matmul__`); weights are in the field's basis.

    Attributes:
        encoder: Wᵀ, (M + P, r).
        decoder: D, (M + P, r + hidden).
        weight: V, (hidden, r).
        bias: c, (hidden,).
    """

    encoder: Tensor
    decoder: Tensor
    weight: Tensor
    bias: Tensor

    def latent(self, samples: Field) -> Tensor:
        """H of every sample, (N, K, r + hidden)."""
        code = samples @ self.encoder
        return torch.cat([code, torch.tanh(code @ self.weight.T + self.bias)], -1)

    def cosine(self, samples: Field) -> Tensor:
        """cos(u, û) of every sample, (N, K), from <u, û> = (Dᵀu)·h and |û|² = hᵀ DᵀD h.

        A sample without length is reconstructed perfectly: 1.
        """
        h = self.latent(samples)
        inner = ((samples @ self.decoder) * h).sum(-1)
        square = ((h @ (self.decoder.T @ self.decoder)) * h).sum(-1)
        return torch.where(samples.scale > 0, inner / square.clamp(min=1e-30).sqrt(), 1)

    def fidelity(self, samples: Field) -> Tensor:
        """Mean over the images of the cosine, (K,)."""
        return torch.cat([self.cosine(block) for block in samples.blocks()], 1).mean(0)


def pca(samples: Field, latent: int) -> Autoencoder:
    """The best linear autoencoder in closed form: W u are the whitened leading principal components.

    `latent` is clamped to the rank of the samples.
    """
    value, vector = torch.linalg.eigh(samples.second_moment())
    rank = int((value > len(value) * torch.finfo(value.dtype).eps * value[-1]).sum())
    lead = torch.arange(len(value) - 1, len(value) - 1 - min(latent, rank), -1, device=value.device)
    deviation, vector = value[lead].sqrt(), vector[:, lead]
    # Fix the sign by the loadings on y, whose basis does not depend on the order of the images.
    loadings = vector[samples.x.shape[1] :]
    vector = vector * torch.where(loadings.gather(0, loadings.abs().argmax(0, keepdim=True)) < 0, -1, 1)
    none = vector.new_zeros(0, len(lead))
    return Autoencoder(vector / deviation, vector * deviation, none, none.new_zeros(0))


def residual(samples: Field, latent: int, generator: torch.Generator) -> Autoencoder:
    """PCA, then random nonlinear features of its code; the decoder restores u from both by least squares.

    Trained features are no better: the decoder is what counts, and it has a closed form (see docs/criteria.md).
    """
    linear = pca(samples, latent)
    r = linear.encoder.shape[1]
    weight = torch.randn(HIDDEN * r, r, generator=generator, dtype=torch.float64).to(linear.encoder) / r**0.5
    bias = torch.rand(HIDDEN * r, generator=generator, dtype=torch.float64).to(weight) * 2 - 1
    untrained = Autoencoder(linear.encoder, linear.decoder, weight, bias)
    gram = weight.new_zeros(r + len(bias), r + len(bias))
    moment = weight.new_zeros(len(linear.encoder), len(gram))
    for block in samples.blocks():
        features = untrained.latent(block) * (block.scale > 0)[..., None]
        gram += features.flatten(0, 1).T @ features.flatten(0, 1)
        moment += block.moment(features)
    gram.diagonal().add_(RIDGE * gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny))
    return Autoencoder(linear.encoder, torch.linalg.solve(gram, moment.T).T, weight, bias)
