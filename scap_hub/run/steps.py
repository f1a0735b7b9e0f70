"""A step of `prune` that can be called alone, beside those that have a home of their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from scap_hub.channels.groups import ChannelGroup
from scap_hub.criteria.base import Criterion
from scap_hub.criteria.base import criterion as criterion_named
from scap_hub.errors import RecipeError
from scap_hub.plan import PruningPlan
from scap_hub.scores import DEFAULT_CRITERION
from scap_hub.training.distributed import from_main


def refine(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    batches: Iterable[Any],
    plan: PruningPlan,
    criterion: str | Criterion = DEFAULT_CRITERION,
    **options: Any,
) -> PruningPlan:
    """Chooses anew which channels stay, at the numbers that a plan gives every group.

    A criterion that judges channels as a set needs to know how many will stay before it can say which. All others
    give the plan back as it is.

    Args:
        model: The dense model, unchanged on return.
        groups: Its channel groups.
        batches: The calibration batches that were scored.
        plan: What `select` made of the scores.
        criterion: What scored them: its name, or a `Criterion`.
        **options: Of the criterion, where it is given by name.

    Returns:
        The plan of the main process, on all of them.

    Raises:
        RecipeError: Unknown criterion, or an option it does not have or accept.
    """
    if isinstance(criterion, str):
        criterion = criterion_named(criterion, options)
    elif options:
        raise RecipeError(f"options {', '.join(options)} beside a ready criterion; set them when you build it")
    refined = criterion.refine(model, groups, batches, plan)
    return from_main(lambda: refined)
