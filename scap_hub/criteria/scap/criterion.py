"""Spectral complex autoencoder pruning (SCAP, arXiv 2601.09352)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from scap_hub.channels.groups import ChannelGroup
from scap_hub.channels.taps import Tap
from scap_hub.criteria.base import Criterion, one_of, share, whole_number
from scap_hub.criteria.rivals.magnitude import filter_norm
from scap_hub.criteria.rivals.random import generator
from scap_hub.criteria.rows import NORMALISATIONS, fuse
from scap_hub.criteria.scap import autoencoder
from scap_hub.criteria.scap.field import Field
from scap_hub.criteria.scap.sweep import fields
from scap_hub.errors import RecipeError
from scap_hub.scores import Scores

Kind = Literal["residual", "pca"]


def check_size(bins: int, latent: int) -> None:
    """Checks the options that size a field and its autoencoder.

    Raises:
        RecipeError: One is out of range.
    """
    whole_number("bins", bins, 1)
    if bins % 2 == 0:
        raise RecipeError(f"bins = {bins}: give an odd number, so that frequencies f and -f are kept together")
    whole_number("latent", latent, 1)


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
    """

    name: ClassVar[str] = "scap"
    passes: ClassVar[float | None] = 2.0
    bins: int = 7
    latent: int = 16
    autoencoder: Kind = "residual"
    weight: float = 0.5
    normalisation: str = "rank"
    balance: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("autoencoder", self.autoencoder, get_args(Kind))
        one_of("normalisation", self.normalisation, NORMALISATIONS)
        check_size(self.bins, self.latent)
        share("weight", self.weight, "fidelity")

    def score(self, model: nn.Module, groups: Sequence[ChannelGroup], batches: Iterable[Any]) -> Scores:
        """See `Criterion.score`; the scores hold the fidelities.

        Raises:
            CalibrationError: NaN or Inf activations, or fewer than 2 images over all processes.
            ModelError: A layer that cannot be watched.
        """
        taps = [tap for group in groups for tap in group.taps]
        fidelity: dict[str, Tensor] = {}
        for tap, values in fields(model, taps, batches, self.bins, self.balance, self._fidelity):
            rows = fidelity.setdefault(tap.module, torch.full((len(tap.channel_of_row),), math.nan).double())
            rows[torch.as_tensor(tap.channel_of_row) >= 0] = values
        importance = {group.name: self._importance(model, group, fidelity) for group in groups}
        return Scores(importance, self.scope, fidelity)

    def _importance(self, model: nn.Module, group: ChannelGroup, fidelity: Mapping[str, Tensor]) -> Tensor:
        comparable = NORMALISATIONS[self.normalisation]
        infidelity = fuse(group, [1 - fidelity[tap.module] for tap in group.taps], comparable)
        magnitude = fuse(group, [filter_norm(model, tap, 1) for tap in group.taps], comparable)
        return self.weight * infidelity + (1 - self.weight) * magnitude

    def _fidelity(self, tap: Tap, samples: Field) -> Tensor:
        if self.autoencoder == "pca":
            trained = autoencoder.pca(samples, self.latent)
        else:
            trained = autoencoder.residual(samples, self.latent, generator(self.seed, tap.module))
        return trained.fidelity(samples).cpu()
