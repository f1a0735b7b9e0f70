"""What becomes of a whole model, of which a part is pruned, where there are targets: it is fine-tuned and measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from scap_hub.errors import RecipeError
from scap_hub.recipe import Recipe
from scap_hub.run.kept import Kept
from scap_hub.run.parts import LoadedPart
from scap_hub.run.repairing import tuning_steps
from scap_hub.run.result import Result
from scap_hub.run.stages import Stages
from scap_hub.training.callbacks import Callback
from scap_hub.training.data import Data
from scap_hub.training.evaluate import evaluate
from scap_hub.training.finetune import finetune
from scap_hub.zoo import LoadedModel


def whole_of(loaded: LoadedModel) -> tuple[nn.Module, Data] | None:
    """The whole that is trained once a part of it was pruned, and on what; None where there is none."""
    if not isinstance(loaded, LoadedPart) or loaded.targets is None:
        return None
    return loaded.whole.module, loaded.targets


def of_part(loaded: LoadedModel, recipe: Recipe) -> Recipe:
    """What is done with what is pruned: a part is not trained by itself where the whole is trained right after it."""
    if not _trained_alone(loaded, recipe):
        return recipe
    tune = recipe.repair.tune.model_copy(update={"steps": tuning_steps(recipe)})  # as if it were trained
    repair = recipe.repair.model_copy(update={"tune": tune})
    return recipe.model_copy(update={"finetune": recipe.finetune.lasting(0), "repair": repair})


def check_taught(loaded: LoadedModel, recipe: Recipe, teacher: str) -> None:
    """Makes sure that who teaches the sizes of a family is heard.

    Raises:
        RecipeError: The whole is trained, which learns from targets alone.
    """
    if teacher != "dense" and _trained_alone(loaded, recipe):
        raise RecipeError(f"teacher is {teacher!r}, but a whole detector learns from its targets alone: leave it out")


def dense_figures(loaded: LoadedModel, stages: Stages, work: Path | None) -> dict[str, float]:
    """The metrics of the dense whole by their names; none where there are no targets, or no part is pruned."""
    whole = whole_of(loaded)
    return {} if whole is None else _figures("dense", *whole, stages, work)


def fine_tuned(
    result: Result,
    loaded: LoadedModel,
    dense: dict[str, float],
    recipe: Recipe,
    stages: Stages,
    work: Path | None,
    callbacks: Sequence[Callback],
) -> Result:
    """A result of which the whole is trained, in place, and measured.

    Args:
        result: Of a run, with the part in its place.
        loaded: What was pruned; only parts of models are of interest.
        dense: What `dense_figures` gave.
        recipe: Of the run.
        stages: Where the seconds are counted.
        work: Where what is found is kept.
        callbacks: As for `prune`.
    """
    whole, report = whole_of(loaded), result.report
    if whole is None or report.whole is None:
        return result
    _, data = whole
    if recipe.finetune.epochs:
        with stages("fine-tuning"):
            folder = work and work / "training-whole"
            report.history += finetune(
                result.model, data, recipe.finetune, output_dir=folder, seed=recipe.seed, callbacks=callbacks
            )
    pruned = _figures("pruned", result.model, data, stages, work)
    report.whole = replace(report.whole, figures={name: (dense[name], pruned[name]) for name in dense})
    report.stages = stages.seconds
    return replace(result, recipe=recipe)


def _trained_alone(loaded: LoadedModel, recipe: Recipe) -> bool:
    """Whether only the whole is trained, not what is pruned of it."""
    return whole_of(loaded) is not None and recipe.schedule.steps == 1


def _figures(which: str, model: nn.Module, data: Data, stages: Stages, work: Path | None) -> dict[str, float]:
    loader, task = data.measured_on, data.task
    if loader is None:
        return {}

    def measured() -> dict[str, float]:
        found = evaluate(model, loader, task=task)
        return {metric.name: found[metric.key] for metric in (task.metric, *task.others)}

    with stages(f"measure {which} whole"):
        return Kept(work).value(f"whole-{which}", dict[str, float], measured)
