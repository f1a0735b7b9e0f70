"""Channels leave one at a time, each time the one that the layers which read them miss least.

Block optimal brain surgeon (Hassibi and Stork, 1993; Frantar and Alistarh, 2022, arXiv 2208.11580): a layer with
weight W and second moment H of its input patches loses tr(W_k B⁻¹ W_kᵀ), B = [H⁻¹]_kk, when the columns of channel k go
and the others take over as well as they can; that is the exact increase of tr((W' - W) H (W' - W)ᵀ).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scap_hub.errors import CalibrationError, RecipeError

_TIE = 1e-6
"""Costs that differ by less, relatively, are ties: the channel with the lowest number goes first."""
_COMPACT = 0.8
"""Rows and columns of channels that have left are dropped when fewer than this share remains."""
_PENDING = 256
"""Updates of H⁻¹ wait until their rank is this: one large product is several times faster than many thin ones."""
_STAYS, _LEFT = -1, -2


@dataclass(eq=False)
class _Channels:
    """Channels that are read by equally many columns.

    What has left is known without asking the device: a GPU that is asked at every step waits most of the time.

    Attributes:
        numbers: (c,) of the channels.
        columns: (c, width) that read them.
        blocks: (c, width, width) of H⁻¹; the identity for a channel that has left.
        rows: Which of the c each channel is that is left.
    """

    numbers: Tensor
    columns: Tensor
    blocks: Tensor
    rows: dict[int, int]

    @property
    def width(self) -> int:
        """Columns of a channel."""
        return self.columns.shape[1]

    def update(self, left: Tensor, right: Tensor) -> None:
        """Takes leftᵀ right, both (r, n), off H⁻¹."""
        self.blocks -= left.T[self.columns] @ right.T[self.columns].mT

    def drop(self, channel: int) -> None:
        """A channel has left."""
        row = self.rows.pop(channel)
        self.blocks[row] = torch.eye(self.width, dtype=self.blocks.dtype, device=self.blocks.device)
        if self.rows and len(self.rows) < _COMPACT * len(self.numbers):
            held = torch.tensor(list(self.rows.values()), device=self.numbers.device)
            self.numbers, self.columns, self.blocks = self.numbers[held], self.columns[held], self.blocks[held]
            self.rows = {number: row for row, number in enumerate(self.rows)}


class CompensatedWeight:
    """A weight W that makes up for the channels that have left, and what each of the others would cost.

    After every call, with H the regularised second moment of the columns that are left:

    - `weight` is the W' with the least tr((W' - W) H (W' - W)ᵀ) among those that are 0 where columns have left;
    - H⁻¹ is `_inverse` minus Lᵀ R, where L and R are the `_rank` pending rows of `_left` and `_right`;
    - `_channels` holds [H⁻¹]_kk of every channel k that is left.

    Attributes:
        columns: (n,) numbers of the columns that are still held.
    """

    def __init__(self, weight: Tensor, moment: Tensor, channel_of_column: Tensor, ridge: float) -> None:
        """Starts with every column.

        Args:
            weight: W, (O, n).
            moment: Second moment of the patches, (n, n).
            channel_of_column: (n,) the group's channel that each column reads, -1 for a column that stays.
            ridge: Added to the diagonal of the second moment, relative to its mean.

        Raises:
            CalibrationError: NaN or Inf in the second moment.
            RecipeError: The ridge is too small for this second moment.
        """
        self.columns = torch.arange(len(moment), device=moment.device)
        self._channel = channel_of_column.to(moment.device, copy=True)
        self._inverse = _regular_inverse(moment, ridge)
        self._transposed = weight.T.clone(memory_format=torch.contiguous_format)
        self._energy = ((weight @ moment) * weight).sum().clamp(min=torch.finfo(moment.dtype).tiny)
        self._hold()

    def _hold(self) -> None:
        """Begins anew with the columns that are held, without anything pending."""
        self._channels = self._by_width()
        self._held = len(self.columns)
        widest = max((own.width for own in self._channels), default=0)
        # Where all columns together are fewer, nothing waits for more.
        rows = min(_PENDING, len(self.columns)) + widest
        self._left, self._right = (self._inverse.new_empty(rows, len(self.columns)) for _ in range(2))
        self._rank = 0

    @property
    def weight(self) -> Tensor:
        """The weights of the held columns, compensated for those that left, (O, held)."""
        return self._transposed.T

    def costs(self, channels: int) -> Tensor:
        """Increase of the relative squared output error if a channel left, (channels,); 0 for one that is not read."""
        costs = self._inverse.new_zeros(channels)
        for own in self._channels:
            weight = self._transposed[own.columns]  # (channels, columns, O)
            energy = weight @ weight.mT
            # tr(W_k B⁻¹ W_kᵀ), where B is a number for a channel with one column.
            costs[own.numbers] = (
                (torch.linalg.inv_ex(own.blocks).inverse * energy).sum((1, 2))
                if own.width > 1
                else (energy / own.blocks)[:, 0, 0]
            )
        return costs / self._energy

    def remove(self, channel: int) -> None:
        """Takes the columns k of a channel out; the others compensate.

        With R = [H⁻¹]_k the rows of the inverse, B = [H⁻¹]_kk and C = B⁻¹ R:

            W' = W - W_k C        and        [H without k]⁻¹ = H⁻¹ - Rᵀ C,

        both of which are 0 in the columns k.
        """
        own = next((own for own in self._channels if channel in own.rows), None)
        if own is None:
            return
        k = own.columns[own.rows[channel]]
        rows = self._inverse[k] - self._left[: self._rank, k].T @ self._right[: self._rank]
        block = rows[:, k]
        change = torch.linalg.solve_ex(block, rows).result if own.width > 1 else rows / block
        self._transposed.addmm_(change.T, self._transposed[k], alpha=-1)
        self._transposed.index_fill_(0, k, 0)  # where rounding left a little
        self._channel.index_fill_(0, k, _LEFT)
        self._left[self._rank : self._rank + own.width] = rows
        self._right[self._rank : self._rank + own.width] = change
        self._rank += own.width
        self._held -= own.width
        for others in self._channels:
            others.update(rows, change)
        own.drop(channel)
        if self._rank >= _PENDING:
            self._apply_pending()
            if self._held < _COMPACT * len(self.columns):
                self.compact()

    def compact(self) -> None:
        """Drops the rows and columns of channels that have left."""
        self._apply_pending()
        held = self._channel != _LEFT
        self._inverse, self._transposed = self._inverse[held][:, held], self._transposed[held]
        self.columns, self._channel = self.columns[held], self._channel[held]
        self._hold()

    def _apply_pending(self) -> None:
        self._inverse.addmm_(self._left[: self._rank].T, self._right[: self._rank], alpha=-1)
        self._rank = 0

    def _by_width(self) -> list[_Channels]:
        """The channels whose columns are held, by how many these are."""
        order = self._channel.argsort(stable=True)
        order = order[self._channel[order] > _STAYS]
        numbers, width = self._channel[order].unique_consecutive(return_counts=True)
        start = width.cumsum(0) - width
        channels = []
        for w in width.unique():
            columns = order[start[width == w][:, None] + torch.arange(int(w), device=order.device)]
            own, blocks = numbers[width == w], self._inverse[columns[:, :, None], columns[:, None]]
            channels.append(_Channels(own, columns, blocks, {number: row for row, number in enumerate(own.tolist())}))
        return channels


def _regular_inverse(moment: Tensor, ridge: float) -> Tensor:
    """(H + λ)⁻¹, with λ the ridge times the mean of the diagonal."""
    if not moment.isfinite().all():
        raise CalibrationError("NaN or Inf in the second moment of a layer's input patches; check the images")
    scale = (ridge * moment.diagonal().mean()).clamp(min=torch.finfo(moment.dtype).tiny)
    regular = moment + scale * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    factor, failed = torch.linalg.cholesky_ex(regular)
    rounding = len(regular) * torch.finfo(regular.dtype).eps * regular.diagonal().max()
    if failed or factor.diagonal().square().min() <= rounding:
        raise RecipeError(
            f"ridge = {ridge:g} leaves the second moment of a layer's input patches singular; raise it, such as to 0.01"
        )
    return torch.cholesky_inverse(factor)


def eliminate(
    weights: Sequence[CompensatedWeight], class_of: Tensor, keep: Sequence[int], before: Sequence[int] = ()
) -> list[int]:
    """Eliminates a group's channels, one by one, until `keep[c]` of each class c are left.

    Args:
        weights: Of the layers that read the group; their costs add up.
        class_of: (channels,) class of each channel.
        keep: How many channels of each class stay.
        before: The channels that have left the weights already.

    Returns:
        The channels that left, in this order.

    Raises:
        CalibrationError: A cost is NaN or Inf.
    """
    gone = list(before)
    staying = torch.ones(len(class_of), dtype=torch.bool)
    staying[gone] = False
    left = torch.bincount(class_of[staying], minlength=len(keep)).tolist()
    spare = torch.tensor([have > wanted for have, wanted in zip(left, keep, strict=True)])
    device = weights[0].columns.device
    candidates, on_device, classes = (staying & spare[class_of]).to(device), class_of.to(device), class_of.tolist()
    while any(have > wanted for have, wanted in zip(left, keep, strict=True)):
        costs = torch.stack([weight.costs(len(class_of)) for weight in weights]).sum(0)
        costs = costs.masked_fill(~candidates, math.inf)
        least = costs.min()
        first = (costs <= least * (1 + _TIE)).int().argmax()
        number, cost = torch.stack([first.to(least), least]).tolist()  # both at once: the only wait for the device
        if not math.isfinite(cost):
            raise CalibrationError("NaN or Inf in what channels cost; check the images and the weights")
        channel = int(number)
        candidates[channel] = False
        own = classes[channel]
        left[own] -= 1
        if left[own] == keep[own]:
            candidates &= on_device != own
        gone.append(channel)
        for weight in weights:
            weight.remove(channel)
    return gone
