"""What pruning must beat besides other criteria: the same small network from scratch, and a smaller one of the zoo."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from torch import nn

from scap_hub.errors import ModelError, RecipeError
from scap_hub.recipe import Recipe
from scap_hub.run.pruning import prune_loaded
from scap_hub.run.report import Measures
from scap_hub.run.stages import Stages
from scap_hub.run.tuning import Tuning, tune_dense
from scap_hub.selection.target import Target
from scap_hub.surgery import apply_plan
from scap_hub.training.data import Data
from scap_hub.training.evaluate import count
from scap_hub.training.finetune import finetune
from scap_hub.zoo import LoadedModel, load_model
from scap_hub.zoo.building import rebuild

SCRATCH = {"scratch": 1, "scratch-2x": 2}
"""How many times the fine-tuning's epochs each trains for."""
ZOO = "zoo:"
"""Before the name of a smaller model."""

History = list[dict[str, float]]


def is_baseline(name: str) -> bool:
    """Whether a name in a comparison is a baseline's, not a criterion's."""
    return name in SCRATCH or name.startswith(ZOO)


def check_trains(name: str, recipe: Recipe) -> None:
    """Makes sure that the recipe trains what learns from nothing else.

    Raises:
        RecipeError: It does not.
    """
    if name in SCRATCH and not recipe.finetune.epochs:
        raise RecipeError(f"{name!r} is trained for the fine-tuning's epochs, of which there are none: set --epochs")


def from_scratch(
    name: str, loaded: LoadedModel, data: Data, recipe: Recipe, before: Measures, scores: Path
) -> tuple[nn.Module, History]:
    """The network that the recipe's criterion leaves, trained from random weights as the pruned one is fine-tuned.

    Args:
        name: One of `SCRATCH`.
        loaded: The dense model, which teaches where the recipe wants a teacher.
        data: Its data.
        recipe: Of the pruned model; its schedule's rounds count as one.
        before: What was measured of the dense model.
        scores: Folder of the scores that runs share.

    Returns:
        The trained network, and its training as `Report.history`.

    Raises:
        RecipeError: A module has weights of its own and no `reset_parameters`.
    """
    nothing_trained = dict.fromkeys(("finetune_epochs", "repair_tune_steps"), 0) | {"finetune_steps": None}
    no_repair = dict.fromkeys(("repair_least_squares", "repair_batch_norm"), False)
    choice = Recipe.resolve(recipe, schedule_steps=1, **nothing_trained, **no_repair)
    plan = prune_loaded(loaded, data, choice, before, scores=scores).plan
    small = apply_plan(_untrained(loaded), plan)
    settings = recipe.finetune.lasting(recipe.finetune.epochs * SCRATCH[name])
    return small, finetune(small, data, settings, loaded.module, seed=recipe.seed)


def _untrained(loaded: LoadedModel) -> nn.Module:
    """The dense model with random weights."""
    try:
        return rebuild(loaded.zoo, loaded.config)
    except ModelError:  # only its owner can build it
        return _reset(copy.deepcopy(loaded.module))


def _reset(module: nn.Module) -> nn.Module:
    """Draws all weights anew."""
    for part in module.modules():
        reset = getattr(part, "reset_parameters", None)
        if reset is not None:
            reset()
        elif list(part.parameters(recurse=False)):
            raise RecipeError(
                f"a {type(part).__name__} has weights of its own, and no reset_parameters() that draws them anew: give "
                "it one, or leave out the baselines from scratch"
            )
    return module


def smaller_models(names: Iterable[str], loaded: LoadedModel, recipe: Recipe) -> dict[str, LoadedModel]:
    """The zoo's models among the names of a comparison, loaded.

    Raises:
        ModelError: Unknown name, or no network for it.
        RecipeError: A model wants its images in another way than the dense one.
    """
    found = {}
    for name in names:
        if not name.startswith(ZOO):
            continue
        small = load_model(
            name.removeprefix(ZOO), recipe.model.pretrained, loaded.num_classes, loaded.preprocessing.input_size
        )
        if small.preprocessing != loaded.preprocessing:
            own, dense = asdict(small.preprocessing), asdict(loaded.preprocessing)
            differ = [key for key in own if own[key] != dense[key]]
            theirs, ours = (", ".join(f"{key}={way[key]!r}" for key in differ) for way in (own, dense))
            raise RecipeError(
                f"{small.name} wants its images as {theirs}, the dense model as {ours}: compare with one that is fed "
                "the same way"
            )
        found[name] = small
    return found


def fitting_target(small: LoadedModel, loaded: LoadedModel, targets: Sequence[str]) -> str:
    """The target that comes nearest to what a smaller model costs.

    Args:
        small: The smaller model.
        loaded: The dense one.
        targets: As written; one in MACs or parameters is needed.

    Raises:
        RecipeError: None is.
    """
    costs, dense = (count(model.module, model.preprocessing.input_size) for model in (small, loaded))
    distances = {}
    for written in targets:
        target = Target.of(written)
        if target.kind in ("macs", "params"):
            distances[written] = abs(math.log(costs[target.kind] / dense[target.kind] / target.number))
    if not distances:
        raise RecipeError(f"{small.name} needs a target in MACs or parameters to be compared at, such as macs=0.5")
    return min(distances, key=distances.__getitem__)


def tuned_the_same(
    small: LoadedModel, loaded: LoadedModel, data: Data, recipe: Recipe, tuning: Tuning, work: Path | None = None
) -> tuple[nn.Module, History]:
    """A smaller model of the zoo with the training of both the dense and the pruned model.

    Args:
        small: The smaller model; trained in place.
        loaded: The dense model, which teaches where the recipe wants a teacher.
        data: Its data.
        recipe: Of the pruned model.
        tuning: How the dense model was trained.
        work: Where checkpoints are kept.

    Returns:
        The model, and its fine-tuning as `Report.history`.
    """
    tune_dense(small, data, recipe, tuning, Stages(recipe.seed), work)
    history: History = []
    if recipe.finetune.epochs:
        folder = work and work / "training"
        history = finetune(small.module, data, recipe.finetune, loaded.module, folder, seed=recipe.seed)
    return small.module, history
