"""The repair of a pruned model as a recipe says it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from scap_hub.compensation import repair, tune
from scap_hub.compensation.tuning import STEPS
from scap_hub.plan import PruningPlan
from scap_hub.recipe import Recipe


def repaired(
    recipe: Recipe, teacher: nn.Module, dense: nn.Module, small: nn.Module, plan: PruningPlan, images: Sequence[Tensor]
) -> None:
    """Repairs a pruned model in place, as far as no labels are needed.

    Args:
        recipe: Its block `repair`; where it trains afterwards, nothing is tuned unless it says so.
        teacher: The dense model of the run.
        dense: The model before this step.
        small: The model after it.
        plan: What stays in this step.
        images: This process's calibration images, in batches.
    """
    repair(dense, small, plan, images, **recipe.repair.model_dump(exclude={"tune"}))
    if steps := tuning_steps(recipe):
        tune(teacher, small, images, steps=steps, learning_rate=recipe.repair.tune.learning_rate, seed=recipe.seed)


def tuning_steps(recipe: Recipe) -> int:
    """How many steps a pruned model is tuned for on the calibration images."""
    default = 0 if recipe.finetune.epochs else STEPS
    return default if recipe.repair.tune.steps is None else recipe.repair.tune.steps
