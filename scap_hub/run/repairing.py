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
    settings, tuning = recipe.repair, recipe.repair.tune
    repair(dense, small, plan, images, **settings.model_dump(exclude={"tune"}))
    default = 0 if recipe.finetune.epochs else STEPS
    if steps := default if tuning.steps is None else tuning.steps:
        tune(teacher, small, images, steps=steps, learning_rate=tuning.learning_rate, seed=recipe.seed)
