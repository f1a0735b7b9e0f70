"""Importance criteria: how much a model would miss each channel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scap_hub.channels.groups import ChannelGroup
from scap_hub.criteria import base
from scap_hub.criteria.base import Criterion
from scap_hub.criteria.obs.criterion import OBS
from scap_hub.criteria.rivals.activation import Activation
from scap_hub.criteria.rivals.bn_scale import BNScale
from scap_hub.criteria.rivals.fpgm import FPGM
from scap_hub.criteria.rivals.hrank import HRank
from scap_hub.criteria.rivals.magnitude import L1, L2
from scap_hub.criteria.rivals.random import Random
from scap_hub.criteria.rivals.taylor import Taylor
from scap_hub.criteria.rows import RowCriterion
from scap_hub.criteria.scap.criterion import Scap
from scap_hub.criteria.scap.scap_set import ScapSet
from scap_hub.errors import CalibrationError, RecipeError
from scap_hub.scores import DEFAULT_CRITERION, Scores

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
    criterion: str | Criterion = DEFAULT_CRITERION,
    *,
    groups: Sequence[ChannelGroup],
    **options: Any,
) -> Scores:
    """Scores the channels of a model's prunable groups; the higher the importance, the rather it is kept.

    Args:
        model: The dense model; unchanged on return.
        batches: Calibration batches: image tensors (N, C, H, W), tuples that start with one, or dicts with
            "pixel_values". Where several processes run, each gives its own share and gets the scores of all.
        criterion: Name of a registered criterion, "path.py:MyCriterion" for one in a file, or a `Criterion`.
        groups: The model's channel groups. Those that cannot be pruned, or not be watched (the forward pass uses their
            layers' weights without calling the layers), are passed over, and `select` keeps them whole.
        **options: Of the criterion, where it is given by name.

    Returns:
        {group.name: (group.size,) importances}, float64 on the CPU, with the scope in which they are compared and, for
        `scap`, the fidelities.

    Raises:
        RecipeError: Unknown criterion, an option that it does not have or accept, or scores that do not fit the groups.
        CalibrationError: Images that cannot be scored, or scores that are not finite.
        ModelError: A layer that cannot be watched.
    """
    criterion = _ready(criterion, options)
    groups = [group for group in groups if group.prunable and group.watched]
    found = criterion.score(model, groups, batches)
    if not isinstance(found, Scores):
        found = Scores(found, criterion.scope)
    importance = _checked(found, type(criterion).__name__, groups)
    return Scores(importance, found.scope, found.fidelity)


def _ready(criterion: str | Criterion, options: dict[str, Any]) -> Criterion:
    if isinstance(criterion, str):
        return base.criterion(criterion, options)
    if options:
        raise RecipeError(f"options {', '.join(options)} beside a ready criterion; set them when you build it")
    return criterion


def _checked(scores: Scores, kind: str, groups: Sequence[ChannelGroup]) -> dict[str, Tensor]:
    """Importances in float64 on the CPU, in the order of the groups; a group may have none."""
    if unknown := scores.keys() - {group.name for group in groups}:
        raise RecipeError(f"{kind} scores {sorted(unknown)[0]!r}, which is none of the groups that it was given")
    importance = {}
    for group in groups:
        if group.name not in scores:
            continue
        values = torch.as_tensor(scores[group.name]).detach().to("cpu", torch.float64)
        if values.shape != (group.size,):
            raise RecipeError(
                f"{kind} gives scores of shape {tuple(values.shape)} for group {group.name!r}; "
                f"give one for each of its {group.size} channels"
            )
        if not values.isfinite().all():
            raise CalibrationError(
                f"{kind} gives NaN or Inf for group {group.name!r}; check the model's weights and the images"
            )
        importance[group.name] = values
    return importance
