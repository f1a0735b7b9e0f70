"""What a layer's field looks like: the spectra of its input and of two channels, and what the autoencoder restores."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scap_hub.channels.groups import ChannelGroup
from scap_hub.channels.taps import Tap
from scap_hub.criteria.calibration import watch
from scap_hub.criteria.layouts import on_grid
from scap_hub.criteria.rivals.random import generator
from scap_hub.criteria.scap.autoencoder import residual
from scap_hub.criteria.scap.field import Field, normalise
from scap_hub.criteria.scap.spectra import spectrum

LAYERS = 12
"""Layers at most, evenly spread over the network."""
BINS, LATENT = 7, 16
_DECADES = 3  # of energy, from black to white
_POINTS = 40  # fidelities that are told of each kind


@dataclass(frozen=True)
class Channel:
    """One channel of a layer.

    Attributes:
        row: Its output row.
        fidelity: Mean over the images of the cosine between its field and what the autoencoder restores of it.
        spectrum: (bins, bins) energy, lowest frequency in the middle; 0 to 100 on a logarithmic scale of 3 decades.
        restored: The same of what the autoencoder restores, on the same scale.
    """

    row: int
    fidelity: float
    spectrum: list[list[int]]
    restored: list[list[int]]


@dataclass(frozen=True)
class Portrait:
    """One layer.

    Attributes:
        layer: Module path.
        images: How many images the spectra are of.
        input: As `Channel.spectrum`, of the layer's whole input.
        goes: Of the channels that leave, the one with the lowest importance.
        stays: Of those that stay, the one with the highest.
        fidelity_gone: Fidelities of channels that leave, ascending, 40 of them at most.
        fidelity_kept: The same of those that stay.
    """

    layer: str
    images: int
    input: list[list[int]]
    goes: Channel
    stays: Channel
    fidelity_gone: list[float]
    fidelity_kept: list[float]


def portraits(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, Tensor],
    kept: Mapping[str, Sequence[int]],
    images: Tensor,
) -> list[Portrait]:
    """Portraits of layers that lose channels and whose input is an image, from one forward pass of this process.

    Args:
        model: The dense model.
        groups: Its channel groups.
        scores: (group.size,) importances by group.
        kept: Channels that stay, of the groups that lose any.
        images: (N, C, H, W); 2 at least.
    """
    owners = {group.taps[0]: group for group in groups if group.name in kept and group.name in scores and group.taps}
    taps = _spread(list(owners))
    if not taps:
        return []
    # Not read to its end: it would then ask all processes for their number of images.
    with contextlib.closing(watch(model, taps, [images], _read_input, _read_output)) as passes:  # type: ignore[type-var]
        read = next(passes)
    found = []
    for tap, spectra in zip(taps, read, strict=True):
        if spectra is not None:
            group = owners[tap]
            found.append(_portrait(tap, *spectra, scores[group.name], kept[group.name]))
    return [portrait for portrait in found if portrait is not None]


def _spread(taps: list[Tap]) -> list[Tap]:
    if len(taps) <= LAYERS:
        return taps
    return [taps[round(i * (len(taps) - 1) / (LAYERS - 1))] for i in range(LAYERS)]


def _read_input(tap: Tap, x: Tensor) -> tuple[Sequence[int], Tensor | None]:
    grid = x.shape[2:]
    pictured = len(grid) == 2 and min(grid) >= 3
    return grid, spectrum(x, grid, BINS).cpu() if pictured else None


def _read_output(tap: Tap, read: tuple[Sequence[int], Tensor | None], y: Tensor) -> tuple[Tensor, Tensor, int] | None:
    grid, x = read
    if x is None:
        return None
    spectra = spectrum(on_grid(y, grid), grid, BINS).cpu()
    # A map smaller than the kept bins has another basis, in which there are no frequencies to show.
    return (x, spectra, min(BINS, grid[0])) if spectra.shape[2] == x.shape[2] else None


def _portrait(
    tap: Tap, x: Tensor, y: Tensor, bins: int, scores: Tensor, kept: Sequence[int]
) -> Portrait | None:  # fmt: skip
    """None where no channel that goes, or none that stays, varies over the images."""
    samples = normalise(x, y, balance=True)
    autoencoder = residual(samples, LATENT, generator(0, tap.weight))
    fidelity = autoencoder.fidelity(samples)
    channel = torch.as_tensor(tap.channel_of_row)
    alive = (channel >= 0) & (samples.scale > 0).any(0)
    stays = torch.isin(channel, torch.tensor(list(kept))) & alive
    gone = ~torch.isin(channel, torch.tensor(list(kept))) & alive
    if not stays.any() or not gone.any():
        return None
    worth = scores[channel.clamp(min=0)]
    goes = int(worth.masked_fill(~gone, torch.inf).argmin())
    best = int(worth.masked_fill(~stays, -torch.inf).argmax())

    def pictured(row: int) -> Channel:
        one = Field(samples.x, samples.y[:, [row]], samples.scale[:, [row]])
        restored = (autoencoder.latent(one) @ autoencoder.decoder.T)[:, 0, samples.x.shape[1] :]
        energies = torch.stack([(one.y * one.scale[..., None])[:, 0], restored]).square().mean(1)
        levels = _levels(energies, bins)
        return Channel(row, round(float(fidelity[row]), 4), levels[0].tolist(), levels[1].tolist())

    energy = (x - x.mean(0)).double().square().mean((0, 1))
    return Portrait(
        tap.module, len(x), _levels(energy[None], bins)[0].tolist(), pictured(goes), pictured(best),
        _points(fidelity[gone]), _points(fidelity[stays]),
    )  # fmt: skip


def _levels(energies: Tensor, bins: int) -> Tensor:
    """(n, P) energies on one logarithmic scale: (n, bins, P / bins) integers, the lowest frequency in the middle."""
    share = energies / energies.max().clamp(min=torch.finfo(energies.dtype).tiny)
    levels = (100 * (1 + share.clamp(min=10.0**-_DECADES).log10() / _DECADES)).round().int()
    return torch.fft.fftshift(levels.reshape(len(energies), bins, -1), dim=(1, 2))


def _points(values: Tensor) -> list[float]:
    ordered = values.sort().values
    chosen = torch.linspace(0, len(ordered) - 1, min(len(ordered), _POINTS)).round().long()
    return [round(value, 4) for value in ordered[chosen].tolist()]
