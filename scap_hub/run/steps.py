"""Steps of `prune` that can be called alone, beside those that have a home of their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from scap_hub.channels.groups import ChannelGroup
from scap_hub.compensation.least_squares import compensate, recalibrate
from scap_hub.criteria.base import Criterion
from scap_hub.criteria.base import criterion as criterion_named
from scap_hub.errors import RecipeError
from scap_hub.plan import PruningPlan
from scap_hub.training.distributed import from_main


def refine(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    batches: Iterable[Any],
    plan: PruningPlan,
    criterion: str | Criterion = "scap-set",
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


def repair(
    dense: nn.Module,
    small: nn.Module,
    plan: PruningPlan,
    batches: Iterable[Any],
    *,
    least_squares: bool = True,
    ridge: float = 0.01,
    batch_norm: bool = True,
) -> dict[str, tuple[float, float]]:
    """Makes good in place, without training, what can be made good of the channels that left.

    Args:
        dense: The model before surgery, unchanged.
        small: `apply_plan(dense, plan)`; changed in place.
        plan: What stays.
        batches: Calibration batches; this process's share.
        least_squares: Whether to re-solve the weights of each layer that lost inputs.
        ridge: Of that least-squares problem, relative to the mean energy of an input.
        batch_norm: Whether batch norms take their statistics anew.

    Returns:
        For each layer that was solved anew the relative squared error of its output, before and after.
    """
    if least_squares:
        return compensate(dense, small, plan, batches, ridge, batch_norm=batch_norm)
    if batch_norm:
        recalibrate(small, batches)
    return {}
