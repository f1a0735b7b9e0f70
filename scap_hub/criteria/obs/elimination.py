"""Channels leave one at a time, each time the one that the layers which read them miss least.

Block optimal brain surgeon (Hassibi and Stork, 1993; Frantar and Alistarh, 2022, arXiv 2208.11580): a layer with
weight W and second moment H of its input patches loses tr(W_k B⁻¹ W_kᵀ), B = [H⁻¹]_kk, when the columns of channel k go
and the others take over as well as they can; that is the exact increase of tr((W' - W) H (W' - W)ᵀ).
"""

from __future__ import annotations

from collections.abc import Sequence

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


class CompensatedWeight:
    """A weight W that makes up for the channels that have left, and what each of the others would cost.

    After every call, with H the regularised second moment of the columns that are left:

    - `weight` is the W' with the least tr((W' - W) H (W' - W)ᵀ) among those that are 0 where columns have left;
    - H⁻¹ is `_inverse` minus the sum of Lᵀ R over the pending updates (L, R);
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
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._transposed = weight.T.clone(memory_format=torch.contiguous_format)
        self._energy = ((weight @ moment) * weight).sum().clamp(min=torch.finfo(moment.dtype).tiny)
        self._channels = self._by_width()

    @property
    def weight(self) -> Tensor:
        """The weights of the held columns, compensated for those that left, (O, held)."""
        return self._transposed.T

    def costs(self, channels: int) -> Tensor:
        """Increase of the relative squared output error if a channel left, (channels,); 0 for one that is not read."""
        costs = self._inverse.new_zeros(channels)
        for numbers, columns, block in self._channels:
            weight = self._transposed[columns]  # (channels, columns, O)
            energy = weight @ weight.mT
            # tr(W_k B⁻¹ W_kᵀ), where B is a number for a channel with one column.
            costs[numbers] = (
                (torch.linalg.inv(block) * energy).sum((1, 2)) if block.shape[1] > 1 else (energy / block)[:, 0, 0]
            )
        return costs / self._energy

    def remove(self, channel: int) -> None:
        """Takes the columns k of a channel out; the others compensate.

        With R = [H⁻¹]_k the rows of the inverse, B = [H⁻¹]_kk and C = B⁻¹ R:

            W' = W - W_k C        and        [H without k]⁻¹ = H⁻¹ - Rᵀ C,

        both of which are 0 in the columns k.
        """
        k = (self._channel == channel).nonzero()[:, 0]
        if not len(k):
            return
        rows = self._inverse[k]
        for left, right in self._pending:
            rows -= left[:, k].T @ right
        change = torch.linalg.solve(rows[:, k], rows)
        self._transposed.addmm_(change.T, self._transposed[k], alpha=-1)
        self._transposed[k] = 0  # where rounding left a little
        self._pending.append((rows, change))
        self._channel[k] = _LEFT
        self._channels = [
            (numbers[stays], columns[stays], block[stays] - rows.T[columns[stays]] @ change.T[columns[stays]].mT)
            for numbers, columns, block in self._channels
            if (stays := numbers != channel).any()
        ]
        if sum(len(left) for left, _ in self._pending) >= _PENDING:
            self._apply_pending()
            if (self._channel != _LEFT).sum() < _COMPACT * len(self._channel):
                self.compact()

    def compact(self) -> None:
        """Drops the rows and columns of channels that have left."""
        self._apply_pending()
        held = self._channel != _LEFT
        self._inverse, self._transposed = self._inverse[held][:, held], self._transposed[held]
        self.columns, self._channel = self.columns[held], self._channel[held]
        self._channels = self._by_width()

    def _apply_pending(self) -> None:
        if self._pending:
            left, right = (torch.cat(parts) for parts in zip(*self._pending, strict=True))
            self._inverse.addmm_(left.T, right, alpha=-1)
            self._pending = []

    def _by_width(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Channels with equally many columns: numbers (c,), columns (c, width), blocks of H⁻¹ (c, width, width)."""
        order = self._channel.argsort(stable=True)
        order = order[self._channel[order] > _STAYS]
        numbers, width = self._channel[order].unique_consecutive(return_counts=True)
        start = width.cumsum(0) - width
        channels = []
        for w in width.unique():
            columns = order[start[width == w][:, None] + torch.arange(int(w), device=order.device)]
            channels.append((numbers[width == w], columns, self._inverse[columns[:, :, None], columns[:, None]]))
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
    """
    gone = list(before)
    staying = torch.ones(len(class_of), dtype=torch.bool)
    staying[gone] = False
    left = torch.bincount(class_of[staying], minlength=len(keep)).tolist()
    while True:
        spare = torch.tensor([have > wanted for have, wanted in zip(left, keep, strict=True)])
        candidates = (staying & spare[class_of]).nonzero()[:, 0]
        if not len(candidates):
            return gone
        costs = sum(weight.costs(len(class_of)).cpu() for weight in weights)[candidates]  # type: ignore[index]
        channel = int(candidates[(costs <= costs.min() * (1 + _TIE)).nonzero()[0, 0]])
        staying[channel] = False
        left[int(class_of[channel])] -= 1
        gone.append(channel)
        for weight in weights:
            weight.remove(channel)
