"""The low-capacity autoencoder of a layer, shared by its channels: h = f(W u), û = D h."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scap_hub.criteria.scap.field import Field

HIDDEN = 2  # nonlinear features per latent dimension
STEPS = 60
SAMPLES = 2048  # per training step
LEARNING_RATE = 1e-2


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
        return self.cosine(samples).mean(0)


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
    """PCA, then nonlinear features of its code, trained to restore what the linear decoder leaves.

    Adam on the mean of 1 - cos; a step sees all images of a random set of channels.
    """
    linear = pca(samples, latent)
    r = linear.encoder.shape[1]
    if (linear.cosine(samples) > 1 - 1e-9).all():
        return linear  # nothing is left to restore, and Adam would blow up rounding
    live = (samples.scale > 0).any(0).nonzero()[:, 0]
    weight = torch.randn(HIDDEN * r, r, generator=generator, dtype=torch.float64).to(linear.encoder) / r**0.5
    bias = torch.zeros_like(weight[:, 0])
    extra = torch.zeros_like(linear.decoder).repeat(1, HIDDEN)
    parameters = [part.requires_grad_() for part in (weight, bias, extra)]
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    some = max(1, min(len(live), SAMPLES // len(samples.x)))
    with torch.enable_grad():
        for _ in range(STEPS):
            chosen = live[torch.randperm(len(live), generator=generator)[:some].to(live.device)]
            trained = Autoencoder(linear.encoder, torch.cat([linear.decoder, extra], 1), weight, bias)
            optimizer.zero_grad()
            (1 - trained.cosine(samples.channels(chosen))).mean().backward()
            optimizer.step()
    weight, bias, extra = (part.detach() for part in parameters)
    return Autoencoder(linear.encoder, torch.cat([linear.decoder, extra], 1), weight, bias)
