"""The repair of a pruned model as a recipe says it."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from scap_hub.compensation import repair, tune
from scap_hub.compensation.tuning import STEPS
from scap_hub.plan import PruningPlan
from scap_hub.recipe import Recipe
from scap_hub.tasks import Task


def repaired(
    recipe: Recipe,
    task: Task,
    teacher: nn.Module,
    dense: nn.Module,
    small: nn.Module,
    plan: PruningPlan,
    images: Sequence[Tensor],
) -> None:
    """Repairs a pruned model in place, as far as no labels are needed.

    Args:
        recipe: Its block `repair`; where it trains afterwards, nothing is tuned unless it says so.
        task: What the model is for, which says how outputs are compared.
        teacher: The dense model of the run.
        dense: The model before this step.
        small: The model after it.
        plan: What stays in this step.
        images: This process's calibration images, in batches.
    """
    repair(dense, small, plan, images, **recipe.repair.model_dump(exclude={"tune"}))
    if steps := tuning_steps(recipe):
        rate, distance = recipe.repair.tune.learning_rate, None if task.in_place else functools.partial(apart, task)
        tune(teacher, small, images, steps=steps, learning_rate=rate, seed=recipe.seed, distance=distance)


def apart(task: Task, small: nn.Module, dense: nn.Module, images: Tensor) -> Tensor:
    """How far a pruned model's outputs are from the dense one's, as the task compares them."""
    with torch.no_grad():
        guide = task.output(dense, images)
    return task.distance(task.output(small, images), guide, 1.0)


def tuning_steps(recipe: Recipe) -> int:
    """How many steps a pruned model is tuned for on the calibration images."""
    default = 0 if recipe.finetune.epochs else STEPS
    return default if recipe.repair.tune.steps is None else recipe.repair.tune.steps
