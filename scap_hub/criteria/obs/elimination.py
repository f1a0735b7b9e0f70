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
_RANK = 256
"""Updates of H⁻¹ wait until there are so many: one large product is several times faster than many thin ones."""


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
        # H⁻¹ is the product of what is waiting subtracted from this.
        self._inverse = torch.cholesky_inverse(torch.linalg.cholesky(regular))
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._transposed = weight.T.clone(memory_format=torch.contiguous_format)
        self._energy = ((weight @ gram) * weight).sum().clamp(min=torch.finfo(gram.dtype).tiny)
        self._places = self._by_width()

    @property
    def weight(self) -> Tensor:
        """The weights of the held columns, compensated for those that left, (O, held)."""
        return self._transposed.T

    def costs(self, channels: int) -> Tensor:
        """Increase of the relative squared output error if a channel left, (channels,); 0 for one that is not read."""
        costs = self._inverse.new_zeros(channels)
        for own, columns, block in self._places:
            weight = self._transposed[columns]  # (channels, columns, O)
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
        rows = self._inverse[gone]
        for left, right in self._waiting:
            rows -= left[:, gone].T @ right
        change = torch.linalg.solve(rows[:, gone], rows)
        self._transposed.addmm_(change.T, self._transposed[gone], alpha=-1)
        self._transposed[gone] = 0
        self._waiting.append((rows, change))
        self._owner[gone] = -2
        self._places = [
            (own[stays], columns[stays], block[stays] - rows.T[columns[stays]] @ change.T[columns[stays]].mT)
            for own, columns, block in self._places
            if (stays := own != channel).any()
        ]
        if sum(len(left) for left, _ in self._waiting) >= _RANK:
            self._update()
            if (self._owner != -2).sum() < _COMPACT * len(self._owner):
                self.compact()

    def compact(self) -> None:
        """Forgets the rows and columns that are gone."""
        self._update()
        held = self._owner != -2
        self._inverse, self._transposed = self._inverse[held][:, held], self._transposed[held]
        self.columns, self._owner = self.columns[held], self._owner[held]
        self._places = self._by_width()

    def _update(self) -> None:
        if self._waiting:
            left, right = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
            self._inverse.addmm_(left.T, right, alpha=-1)
            self._waiting = []

    def _by_width(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Channels with equally many columns: numbers (c,), columns (c, width), blocks of H⁻¹ (c, width, width)."""
        order = self._owner.argsort(stable=True)
        order = order[self._owner[order] >= 0]
        own, width = self._owner[order].unique_consecutive(return_counts=True)
        start = width.cumsum(0) - width
        places = []
        for w in width.unique():
            columns = order[start[width == w][:, None] + torch.arange(int(w), device=own.device)]
            places.append((own[width == w], columns, self._inverse[columns[:, :, None], columns[:, None]]))
        return places


def eliminate(readings: Sequence[Reading], kind: Tensor, keep: Sequence[int], before: Sequence[int] = ()) -> list[int]:
    """Eliminates a group's channels, one by one, until `keep[k]` of each kind k are left.

    Args:
        readings: Of the layers that read the group; costs add up.
        kind: (channels,) a number for each channel.
        keep: How many channels of each kind stay.
        before: The channels that have left the readings already.

    Returns:
        The channels that left, in this order.
    """
    gone = list(before)
    staying = torch.ones(len(kind), dtype=torch.bool)
    staying[gone] = False
    left = torch.bincount(kind[staying], minlength=len(keep)).tolist()
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
