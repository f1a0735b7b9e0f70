"""Spectral complex autoencoder pruning (SCAP, arXiv 2601.09352)."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn

from scap_hub.channels.groups import ChannelGroup, Tap
from scap_hub.criteria.base import NORMALISATIONS, Criterion, fuse, known
from scap_hub.criteria.magnitude import filter_norm
from scap_hub.criteria.random import generator
from scap_hub.criteria.scap import autoencoder
from scap_hub.criteria.scap.field import normalise
from scap_hub.criteria.scap.spectra import onto, spectrum
from scap_hub.criteria.taps import images_of, sized, watch
from scap_hub.errors import RecipeError
from scap_hub.progress import track

MEMORY = 7 * 2**28  # bytes of spectra that a process holds at a time; more of them take further sweeps over the batches

Kind = Literal["residual", "pca"]
Spectra = tuple[Tensor, Tensor]


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
        if self.bins < 1 or self.bins % 2 == 0:
            raise RecipeError(f"bins = {self.bins}: give an odd number, so that frequencies f and -f are kept together")
        if self.latent < 1:
            raise RecipeError(f"latent = {self.latent}: give at least 1")
        if not 0 <= self.weight <= 1:
            raise RecipeError(f"weight = {self.weight}: give the share of fidelity, from 0 to 1")

    def score(self, model: nn.Module, groups: Sequence[ChannelGroup], batches: Iterable[Any]) -> dict[str, Tensor]:
        """See `Criterion.score`.

        Raises:
            CalibrationError: NaN or Inf activations, or fewer than 2 images over all processes.
            ModelError: A layer that cannot be watched.
        """
        self.fidelity = {}
        for tap, values in self._layers(model, [tap for group in groups for tap in group.taps], batches):
            rows = self.fidelity.setdefault(tap.module, torch.full((len(tap.channel_of_row),), math.nan).double())
            rows[torch.as_tensor(tap.channel_of_row) >= 0] = values
        return {group.name: self._importance(model, group) for group in groups}

    def _importance(self, model: nn.Module, group: ChannelGroup) -> Tensor:
        comparable = NORMALISATIONS[self.normalisation]
        infidelity = fuse(group, [1 - self.fidelity[tap.module] for tap in group.taps], comparable)
        magnitude = fuse(group, [filter_norm(model, tap, 1) for tap in group.taps], comparable)
        return self.weight * infidelity + (1 - self.weight) * magnitude

    def _layers(self, model: nn.Module, taps: Sequence[Tap], batches: Iterable[Any]) -> Iterator[tuple[Tap, Tensor]]:
        """Fidelities of the held rows of each tap; the autoencoders are shared out over the processes."""
        state = PartialState()
        batches = sized(batches)
        for some in _rounds(model, taps, batches, self.bins):
            spectra = self._spectra(model, some, batches)
            mine = {}
            for i, tap in enumerate(track(some, "autoencoders")):
                x, y = _gather(spectra[i])
                spectra[i] = None
                if i % state.num_processes == state.process_index:
                    mine[i] = self._fidelity(tap, x, y)
            fidelities = {i: values for part in gather_object([mine]) for i, values in part.items()}
            yield from ((tap, fidelities[i]) for i, tap in enumerate(some))

    def _spectra(self, model: nn.Module, taps: Sequence[Tap], batches: Iterable[Any]) -> list[Spectra | None]:
        """Spectra of this process's images for each tap, in one sweep; None if it has no images."""
        parts: list[list[Spectra]] = [[] for _ in taps]
        for batch in watch(model, taps, batches, self._read_input, self._read_output, "spectra"):
            for part, pair in zip(parts, batch, strict=True):
                part.append(pair)
        spectra: list[Spectra | None] = []
        for part in parts:
            spectra.append((torch.cat([x for x, _ in part]), torch.cat([y for _, y in part])) if part else None)
            part.clear()
        return spectra

    def _read_input(self, tap: Tap, x: Tensor) -> tuple[Sequence[int], Tensor]:
        return x.shape[2:], spectrum(x, x.shape[2:], self.bins)

    def _read_output(self, tap: Tap, read: tuple[Sequence[int], Tensor], y: Tensor) -> Spectra:
        grid, x = read
        held = torch.as_tensor(tap.channel_of_row >= 0, device=y.device)
        return x, spectrum(onto(y if held.all() else y[:, held], grid), grid, self.bins)

    def _fidelity(self, tap: Tap, x: Tensor, y: Tensor) -> Tensor:
        samples = normalise(x, y, self.balance)
        if self.autoencoder == "pca":
            trained = autoencoder.pca(samples, self.latent)
        else:
            trained = autoencoder.residual(samples, self.latent, generator(self.seed, tap.module))
        return trained.fidelity(samples).cpu()


def _gather(spectra: Spectra | None) -> Spectra:
    """The spectra of the images of all processes."""
    if PartialState().num_processes == 1:
        assert spectra is not None  # `watch` refuses to see no images at all
        return spectra
    shards = gather_object([spectra and (spectra[0].cpu(), spectra[1].cpu())])
    held = [shard for shard in shards if shard is not None]
    device = PartialState().device
    return torch.cat([x for x, _ in held]).to(device), torch.cat([y for _, y in held]).to(device)


def _rounds(model: nn.Module, taps: Sequence[Tap], batches: Collection[Any], bins: int) -> Iterator[list[Tap]]:
    """Cuts the taps into runs whose spectra fit into memory; each costs a sweep over the batches.

    Exact scores need all pairs of images, so the spectra of a layer are held together, but not those of all layers.
    """
    first = next(iter(batches), None)
    images = max(gather_object([0 if first is None else len(images_of(first)) * len(batches)]))
    some: list[Tap] = []
    used = 0
    # About the order of execution: a sweep ends at the last layer that it watches.
    order = {path: i for i, (path, _) in enumerate(model.named_modules())}
    for tap in sorted(taps, key=lambda tap: order[tap.module]):
        weight = model.get_parameter(tap.weight)
        width = weight.shape[1] * getattr(model.get_submodule(tap.module), "groups", 1) + len(tap.channel_of_row)
        size = images * width * bins**2 * max(weight.element_size(), 4)
        if some and used + size > MEMORY:
            yield some
            some, used = [], 0
        some.append(tap)
        used += size
    if some:
        yield some
