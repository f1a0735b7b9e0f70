"""Spectral complex autoencoder pruning (SCAP, arXiv 2601.09352)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from scap_hub.channels.groups import ChannelGroup, Tap
from scap_hub.criteria.base import NORMALISATIONS, Criterion, fuse, known
from scap_hub.criteria.rivals.magnitude import filter_norm
from scap_hub.criteria.rivals.random import generator
from scap_hub.criteria.scap import autoencoder
from scap_hub.criteria.scap.field import Field
from scap_hub.criteria.scap.sweep import fields
from scap_hub.errors import RecipeError

Kind = Literal["residual", "pca"]


def check_size(bins: int, latent: int) -> None:
    """Checks the options that size a field and its autoencoder.

    Raises:
        RecipeError: One is out of range.
    """
    if bins < 1 or bins % 2 == 0:
        raise RecipeError(f"bins = {bins}: give an odd number, so that frequencies f and -f are kept together")
    if latent < 1:
        raise RecipeError(f"latent = {latent}: give at least 1")


@dataclass(kw_only=True)
class Scap(Criterion):
    """I = a rank(1 - fidelity) + (1 - a) rank(L1): a channel that its layer's autoencoder restores is redundant.

    The fidelity of channel k is the mean over images of the cosine between the spectrum of the complex field
    X + i (1 ⊗ Y_k), X the layer's input and Y_k the channel as the next layer sees it, and its reconstruction.

    Attributes:
        bins: Frequencies kept on each axis of the spectrum, odd; maps smaller than this keep all.
        latent: Dimension of the autoencoder's code, clamped to the rank of the samples.
        autoencoder: "residual" (PCA and nonlinear features of its code) or "pca"; both in closed form.
        weight: a, the share of fidelity against L1, 0 to 1.
        normalisation: "rank", "minmax" or "mean", over the layer's channels.
        balance: Whether input and channel enter the field with equal energy.
        seed: Of the nonlinear features.
        fidelity: After `score`, fidelity by layer, (O,); NaN for output rows that no given group holds.
    """

    name: ClassVar[str] = "scap"
    bins: int = 7
    latent: int = 16
    autoencoder: Kind = "residual"
    weight: float = 0.5
    normalisation: str = "rank"
    balance: bool = True
    seed: int = 0
    fidelity: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        known("autoencoder", self.autoencoder, get_args(Kind))
        known("normalisation", self.normalisation, NORMALISATIONS)
        check_size(self.bins, self.latent)
        if not 0 <= self.weight <= 1:
            raise RecipeError(f"weight = {self.weight}: give the share of fidelity, from 0 to 1")

    def score(self, model: nn.Module, groups: Sequence[ChannelGroup], batches: Iterable[Any]) -> dict[str, Tensor]:
        """See `Criterion.score`.

        Raises:
            CalibrationError: NaN or Inf activations, or fewer than 2 images over all processes.
            ModelError: A layer that cannot be watched.
        """
        self.fidelity = {}
        taps = [tap for group in groups for tap in group.taps]
        for tap, values in fields(model, taps, batches, self.bins, self.balance, self._fidelity):
            rows = self.fidelity.setdefault(tap.module, torch.full((len(tap.channel_of_row),), math.nan).double())
            rows[torch.as_tensor(tap.channel_of_row) >= 0] = values
        return {group.name: self._importance(model, group) for group in groups}

    def _importance(self, model: nn.Module, group: ChannelGroup) -> Tensor:
        comparable = NORMALISATIONS[self.normalisation]
        infidelity = fuse(group, [1 - self.fidelity[tap.module] for tap in group.taps], comparable)
        magnitude = fuse(group, [filter_norm(model, tap, 1) for tap in group.taps], comparable)
        return self.weight * infidelity + (1 - self.weight) * magnitude

    def _fidelity(self, tap: Tap, samples: Field) -> Tensor:
        if self.autoencoder == "pca":
            trained = autoencoder.pca(samples, self.latent)
        else:
            trained = autoencoder.residual(samples, self.latent, generator(self.seed, tap.module))
        return trained.fidelity(samples).cpu()
