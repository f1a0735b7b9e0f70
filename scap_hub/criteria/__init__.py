"""Importance criteria: how much a model would miss each channel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from scap_hub.channels.groups import ChannelGroup
from scap_hub.criteria import base
from scap_hub.criteria.base import Criterion, RowCriterion
from scap_hub.criteria.obs.criterion import OBS
from scap_hub.criteria.rivals.activation import Activation
from scap_hub.criteria.rivals.bn_scale import BNScale
from scap_hub.criteria.rivals.fpgm import FPGM
from scap_hub.criteria.rivals.hrank import HRank
from scap_hub.criteria.rivals.magnitude import L1, L2
from scap_hub.criteria.rivals.random import Random
from scap_hub.criteria.rivals.taylor import Taylor
from scap_hub.criteria.scap import Scap, ScapSet
from scap_hub.errors import RecipeError
from scap_hub.scores import Scores

__all__ = [
    "FPGM",
    "L1",
    "L2",
    "OBS",
    "Activation",
    "BNScale",
    "Criterion",
    "HRank",
    "Random",
    "RowCriterion",
    "Scap",
    "ScapSet",
    "Taylor",
    "score",
]


def score(
    model: nn.Module,
    batches: Iterable[Any],
    criterion: str | Criterion = "scap",
    *,
    groups: Sequence[ChannelGroup],
    **options: Any,
) -> Scores:
    """Scores the channels of a model's prunable groups; the higher the importance, the rather it is kept.

    Args:
        model: The dense model; unchanged on return.
        batches: Calibration batches: image tensors (N, C, H, W), tuples that start with one, or dicts with
            "pixel_values". Where several processes run, each gives its own shard and gets the scores of all.
        criterion: Name of a registered criterion, or a `Criterion`.
        groups: The model's channel groups. Those that cannot be pruned, or not be watched (the forward pass uses their
            layers' weights without calling the layers), are passed over, and `select` keeps them whole.
        **options: Of the criterion, where it is given by name.

    Returns:
        {group.name: (group.size,) importances}, float64 on the CPU.

    Raises:
        RecipeError: Unknown criterion, or an option it does not have or accept.
        CalibrationError: Images that cannot be scored.
    """
    if isinstance(criterion, str):
        criterion = base.criterion(criterion, options)
    elif options:
        raise RecipeError(f"options {', '.join(options)} beside a ready criterion; set them when you build it")
    importance = criterion.score(model, [group for group in groups if group.prunable and group.watched], batches)
    return Scores(importance, criterion.scope, dict(getattr(criterion, "fidelity", {})))
