"""Channels leave one at a time, each time the one that the layers which read them miss least.

Block optimal brain surgeon (Hassibi and Stork, 1993; Frantar and Alistarh, 2022, arXiv 2208.11580): a layer with
weight W and second moment H of its input patches loses tr(W_k B⁻¹ W_kᵀ), B = [H⁻¹]_kk, when the columns of channel k go
and the others take over as well as they can; that is the exact increase of tr((W' - W) H (W' - W)ᵀ).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_TIE = 1e-6
"""Costs that differ by less, relatively, are ties: the channel with the lowest number goes first."""
_COMPACT = 0.8
"""Rows and columns of channels that are gone are dropped when fewer than this share is left."""


class Reading:
    """One layer's view of a group while its channels leave.

    Attributes:
        columns: (n,) numbers of the columns that are still held.
    """

    def __init__(self, weight: Tensor, gram: Tensor, owner: Tensor, ridge: float) -> None:
        """Starts with every column.

        Args:
            weight: W, (O, n).
            gram: Second moment of the patches, (n, n).
            owner: (n,) the group's channel that each column belongs to, -1 for a column that stays.
            ridge: Added to the diagonal of the Gram matrix, relative to its mean.
        """
        size = len(gram)
        scale = (ridge * gram.diagonal().mean()).clamp(min=torch.finfo(gram.dtype).tiny)
        regular = gram + scale * torch.eye(size, dtype=gram.dtype, device=gram.device)
        self.columns = torch.arange(size, device=gram.device)
        self._owner = owner.to(gram.device, copy=True)
        # H⁻¹ above W: elimination is the same update for both.
        self._state = torch.cat([torch.cholesky_inverse(torch.linalg.cholesky(regular)), weight])
        self._energy = ((weight @ gram) * weight).sum().clamp(min=torch.finfo(gram.dtype).tiny)
        self._size = size
        self._places = self._by_width()

    @property
    def weight(self) -> Tensor:
        """The weights of the held columns, compensated for those that left, (O, held)."""
        return self._state[len(self.columns) :]

    def costs(self, channels: int) -> Tensor:
        """Increase of the relative squared output error if a channel left, (channels,); 0 for one that is not read."""
        costs = self._state.new_zeros(channels)
        inner = len(self.columns)
        for own, columns in self._places:
            block = self._state[columns[:, :, None], columns[:, None]]
            weight = self._state[inner:, columns.flatten()].T.unflatten(0, columns.shape)  # (channels, columns, O)
            energy = weight @ weight.mT
            costs[own] = (
                (torch.linalg.inv(block) * energy).sum((1, 2)) if block.shape[1] > 1 else (energy / block)[:, 0, 0]
            )
        return costs / self._energy

    def remove(self, channel: int) -> None:
        """Takes a channel's columns out; the others compensate."""
        gone = (self._owner == channel).nonzero()[:, 0]
        if not len(gone):
            return
        change = torch.linalg.solve(self._state[gone][:, gone], self._state[gone])
        self._state.addmm_(self._state[:, gone], change, alpha=-1)
        self._state[:, gone] = 0
        self._owner[gone] = -2
        held = self._owner != -2
        if held.sum() < _COMPACT * len(held):
            self.compact()
        else:
            self._places = [(own[own != channel], columns[own != channel]) for own, columns in self._places]

    def compact(self) -> None:
        """Forgets the rows and columns that are gone."""
        held = self._owner != -2
        rows = torch.cat([held, held.new_ones(len(self._state) - len(held))])
        self._state = self._state[rows][:, held]
        self.columns, self._owner = self.columns[held], self._owner[held]
        self._places = self._by_width()

    def _by_width(self) -> list[tuple[Tensor, Tensor]]:
        """Channels with equally many columns: their numbers (c,) and columns (c, width)."""
        order = self._owner.argsort(stable=True)
        order = order[self._owner[order] >= 0]
        own, width = self._owner[order].unique_consecutive(return_counts=True)
        start = width.cumsum(0) - width
        return [
            (own[width == w], order[start[width == w][:, None] + torch.arange(int(w), device=own.device)])
            for w in width.unique()
        ]


def eliminate(readings: Sequence[Reading], kind: Tensor, keep: Sequence[int]) -> list[int]:
    """Eliminates a group's channels, one by one, until `keep[k]` of each kind k are left.

    Args:
        readings: Of the layers that read the group; costs add up.
        kind: (channels,) a number for each channel.
        keep: How many channels of each kind stay.

    Returns:
        The channels that left, in this order.
    """
    left = torch.bincount(kind, minlength=len(keep)).tolist()
    staying = torch.ones(len(kind), dtype=torch.bool)
    gone: list[int] = []
    while True:
        spare = torch.tensor([have > wanted for have, wanted in zip(left, keep, strict=True)])
        candidates = (staying & spare[kind]).nonzero()[:, 0]
        if not len(candidates):
            return gone
        costs = sum(reading.costs(len(kind)).cpu() for reading in readings)[candidates]  # type: ignore[index]
        channel = int(candidates[(costs <= costs.min() * (1 + _TIE)).nonzero()[0, 0]])
        staying[channel] = False
        left[int(kind[channel])] -= 1
        gone.append(channel)
        for reading in readings:
            reading.remove(channel)
