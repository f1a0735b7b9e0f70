"""Smaller models of the zoo, trained and measured to stand beside the sizes of a pruned one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scap_hub.errors import RecipeError
from scap_hub.recipe import Recipe
from scap_hub.run.baselines import ZOO, smaller_models, tuned_the_same
from scap_hub.run.kept import Kept
from scap_hub.run.report import Measures, measure
from scap_hub.run.stages import Stages
from scap_hub.run.tuning import Tuning
from scap_hub.training.data import Data
from scap_hub.training.distributed import accelerator
from scap_hub.zoo import LoadedModel, load_model


def load_siblings(names: Sequence[str], loaded: LoadedModel, recipe: Recipe, tuning: Tuning) -> dict[str, LoadedModel]:
    """The smaller models, by the names they were given, with a classifier for as many classes as the dense one has.

    Args:
        names: timm names, Hub ids or folders.
        loaded: The dense model.
        recipe: Of the family.
        tuning: How the dense model is trained.

    Raises:
        ModelError: Unknown name, or no network for it.
        RecipeError: A model wants its images in another way than the dense one, its classifier is new and nothing
            trains it, or a single name is given instead of a list.
    """
    if isinstance(names, str):
        raise RecipeError(f'siblings is {names!r}; give a list such as ["{names}"]')
    found = smaller_models([f"{ZOO}{name}" for name in names], loaded, recipe)
    siblings = {name.removeprefix(ZOO): small for name, small in found.items()}
    if not tuning.trains(recipe.finetune):
        size = loaded.preprocessing.input_size
        for name in siblings:
            if load_model(name, False, None, size).num_classes != loaded.num_classes:
                raise RecipeError(
                    f"{name} gets a new classifier for {loaded.num_classes} classes, and nothing trains it: set "
                    "finetune.epochs, or leave it out"
                )
    return siblings


def trained(
    siblings: dict[str, LoadedModel],
    loaded: LoadedModel,
    data: Data,
    recipe: Recipe,
    tuning: Tuning,
    work: Path | None,
) -> dict[str, Measures]:
    """Trains each like the dense and then like the pruned models, in place, and measures it.

    Args:
        siblings: The smaller models.
        loaded: The dense model, which teaches them where the recipe wants a teacher.
        data: Its data.
        recipe: Of the family.
        tuning: How the dense model was trained.
        work: Where weights and measurements are kept; None to keep nothing.
    """
    stages, kept = Stages(recipe.seed), Kept(work)
    size, dense = loaded.preprocessing.input_size, loaded.module

    def one(name: str, small: LoadedModel, place: str) -> Measures:
        module, folder = small.module.to(accelerator().device).eval(), work and work / place
        with stages(f"train {name}"):
            kept.weights(place, module, lambda: tuned_the_same(small, loaded, data, recipe, tuning, folder))
        with stages(f"measure {name}"):
            return kept.value(place, Measures, lambda: measure(module, size, data, teacher=dense))

    return {name: one(name, small, f"sibling-{number}") for number, (name, small) in enumerate(siblings.items())}
