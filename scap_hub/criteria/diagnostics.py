"""What a user should know before trusting scores: dead channels, energies, and how stable the ranking is."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scap_hub.channels.groups import ChannelGroup
from scap_hub.criteria.base import Criterion
from scap_hub.criteria.calibration import count_images, image_means, images_of
from scap_hub.criteria.rivals.magnitude import L1
from scap_hub.criteria.rows import fuse
from scap_hub.scores import Scores

_QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
_CONSTANT = 1e-6  # variance relative to the mean square below which a channel says nothing
_IMAGES = 8  # fewer tell nothing about stability


@dataclass(frozen=True)
class Diagnosis:
    """One group's diagnostics.

    Attributes:
        fidelity: Smallest, quartiles and largest fidelity of its rows; None for criteria without one.
        energy: Variance of each channel over images and places, as a share of the group's.
        dead: Channels that are constant on the calibration images.
        l1_correlation: Spearman's rank correlation of the scores with those of `l1`; None where either is constant.
        stability: The same between the rankings from two halves of the calibration images; None with fewer than 8.
    """

    fidelity: tuple[float, ...] | None
    energy: tuple[float, ...]
    dead: tuple[int, ...]
    l1_correlation: float | None
    stability: float | None


def diagnose(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    batches: Collection[Any],
    criterion: Criterion,
    scores: Scores,
) -> dict[str, Diagnosis]:
    """Diagnoses scores; takes one more scoring, on the halves, and one forward pass.

    Args:
        model: What was scored.
        groups: Its groups; those without scores are passed over.
        batches: The calibration batches that were scored.
        criterion: What scored it.
        scores: What it gave.
    """
    groups = [group for group in groups if group.name in scores]
    moments = iter(image_means(model, [tap for group in groups for tap in group.taps], batches, _moments))
    magnitude = L1().score(model, groups, [])
    halves = _halves(model, groups, batches, criterion)
    diagnoses = {}
    for group in groups:
        means, squares = zip(*(next(moments).chunk(2) for _ in group.taps), strict=True)
        variance = fuse(group, [(s - m**2).clamp(min=0) for m, s in zip(means, squares, strict=True)], _as_is)
        square = fuse(group, squares, _as_is)
        name = group.name
        diagnoses[name] = Diagnosis(
            fidelity=_quantiles(group, scores.fidelity) if scores.fidelity else None,
            energy=tuple((variance / variance.sum().clamp(min=torch.finfo(variance.dtype).tiny)).tolist()),
            dead=tuple((variance <= _CONSTANT * square).nonzero()[:, 0].tolist()),
            l1_correlation=_correlation(scores[name], magnitude[name]),
            stability=_correlation(halves[0][name], halves[1][name]) if halves else None,
        )
    return diagnoses


def _halves(
    model: nn.Module, groups: Sequence[ChannelGroup], batches: Collection[Any], criterion: Criterion
) -> list[Mapping[str, Tensor]]:
    """Rankings from every other calibration image, and from the rest."""
    if count_images(batches) < _IMAGES:
        return []
    images = [images_of(batch) for batch in batches]
    halves = [[batch[half::2] for batch in images if len(batch) > half] for half in (0, 1)]
    return [criterion.ranking(model, groups, half) for half in halves]


def _quantiles(group: ChannelGroup, fidelity: Mapping[str, Tensor]) -> tuple[float, ...]:
    rows = [fidelity[tap.module][torch.as_tensor(tap.channel_of_row) >= 0] for tap in group.taps]
    return tuple(torch.cat(rows).quantile(torch.tensor(_QUANTILES, dtype=torch.float64)).tolist())


def _moments(grid: Sequence[int], y: Tensor) -> Tensor:
    flat = y.reshape(*y.shape[:2], -1).float()
    return torch.cat([flat.mean(2), flat.square().mean(2)], 1)


def _as_is(values: Tensor) -> Tensor:
    return values


def _correlation(one: Tensor, other: Tensor) -> float | None:
    if one.max() == one.min() or other.max() == other.min():
        return None
    from scipy.stats import spearmanr  # takes a second to import

    return float(spearmanr(one.numpy(), other.numpy()).statistic)
