"""Steps of `prune` that can be called alone, beside those that have a home of their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from scap_hub.channels.groups import ChannelGroup
from scap_hub.compensation import tuning
from scap_hub.criteria.base import Criterion
from scap_hub.criteria.base import criterion as criterion_named
from scap_hub.criteria.calibration import images_of
from scap_hub.errors import RecipeError
from scap_hub.plan import PruningPlan
from scap_hub.recipe.settings import DistillationSettings
from scap_hub.run.repairing import distance_of
from scap_hub.scores import DEFAULT_CRITERION
from scap_hub.tasks import Task
from scap_hub.tasks.registry import task_of
from scap_hub.training.distributed import from_main
from scap_hub.zoo import load_model


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


def tune(
    dense: nn.Module,
    small: nn.Module,
    batches: Iterable[Any],
    *,
    task: str | Task | None = None,
    steps: int = tuning.STEPS,
    learning_rate: float | None = None,
    seed: int = 0,
) -> tuple[float, float]:
    """Tunes a repaired model in place on the calibration images, without labels, as `prune` does.

    Args:
        dense: The model before surgery.
        small: The pruned model, repaired.
        batches: Calibration batches (this process's share, not empty); images only are used.
        task: What the models are for, which says how their outputs are compared: its name, or a `Task`; found from the
            dense model if left out.
        steps: Of AdamW, over one cycle of the learning rate; 0 does nothing.
        learning_rate: The highest one; if left out, the highest of three that does no harm in short trials.
        seed: Of what is drawn.

    Returns:
        The distance of the outputs, before and after, see `scap_hub.compensation.tune`.

    Raises:
        CalibrationError: Fewer than 2 images over all processes, or outputs that are not finite.
        RecipeError: No such task.
    """
    batches = list(batches)
    distance = None
    if batches and (images := images_of(batches[0])).ndim == 4:
        channels, height, width = images.shape[1:]
        known = task_of(load_model(dense, input_size=(channels, height, width)), task)
        distance = distance_of(known, DistillationSettings().temperature)
    return tuning.tune(dense, small, batches, steps=steps, learning_rate=learning_rate, seed=seed, distance=distance)
