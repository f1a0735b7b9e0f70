"""The repair of a pruned model as a recipe says it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from scap_hub.compensation import repair, tune
from scap_hub.compensation.tuning import STEPS, Distance
from scap_hub.plan import PruningPlan
from scap_hub.recipe import Recipe
from scap_hub.tasks import Task
from scap_hub.tasks.outputs import Unlabelled


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
        rate = recipe.repair.tune.learning_rate
        distance = distance_of(task, recipe.finetune.distillation.temperature)
        tune(teacher, small, images, steps=steps, learning_rate=rate, seed=recipe.seed, distance=distance)


def distance_of(task: Task, temperature: float) -> Distance | None:
    """How a task compares the outputs of two models for the same images; None where place by place is right.

    Args:
        task: What the models are for.
        temperature: As for `Task.distance`.
    """
    known = task.inner if isinstance(task, Unlabelled) else task
    if not known.by_distance:
        return None

    def distance(small: nn.Module, dense: nn.Module, images: Tensor) -> Tensor:
        with torch.no_grad():
            guide = known.output(dense, images)
        return known.distance(known.output(small, images), guide, temperature)

    return distance


def tuning_steps(recipe: Recipe) -> int:
    """How many steps a pruned model is tuned for on the calibration images."""
    default = 0 if recipe.finetune.epochs else STEPS
    return default if recipe.repair.tune.steps is None else recipe.repair.tune.steps
