"""The sizes of a family: their recipes, their names, and the order in which they are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from scap_hub.errors import RecipeError, TargetError
from scap_hub.recipe import Recipe
from scap_hub.run import fingerprints


def member_recipes(base: Recipe, targets: Sequence[str]) -> dict[str, Recipe]:
    """The recipe of each member, by its name; none of them publishes by itself."""
    if isinstance(targets, str) or not targets:
        raise TargetError(f'targets is {targets!r}; give a list such as ["macs=0.75", "macs=0.5"]')
    recipes: dict[str, Recipe] = {}
    for target in targets:
        own = Recipe.resolve(base, target=target, publish_repo_id=None)
        name = str(own.target.target).replace("=", "-")
        if name in recipes:
            raise TargetError(f"target {target!r} is given twice; give each size once")
        recipes[name] = own
    return recipes


def making_order(recipes: Mapping[str, Recipe], teacher: str) -> list[str]:
    """Names of the members in the order in which they are made."""
    if teacher == "dense":
        return list(recipes)
    if teacher != "next-larger":
        raise RecipeError(f"teacher is {teacher!r}; take dense or next-larger")
    settings = next(iter(recipes.values())).finetune
    if not (settings.epochs and settings.distillation.needs_teacher):
        raise RecipeError("teacher is 'next-larger', but nothing is taught: set finetune.epochs and its distillation")
    targets = {name: own.target.target for name, own in recipes.items()}
    kinds = {target.kind for target in targets.values()}
    if len(kinds) > 1 or "threshold" in kinds or any(isinstance(own.value, Mapping) for own in targets.values()):
        raise TargetError("teacher is 'next-larger': give all targets in the same unit, such as macs=0.5, macs=0.25")
    return sorted(targets, key=lambda name: -targets[name].number)


def kept_names(recipes: Mapping[str, Recipe], order: Sequence[str], teacher: str) -> dict[str, str]:
    """Names under which a run keeps what it found for each member, by the member's, in the order given.

    They follow from all that sets two members of the same model, data and recipe apart: the target, and the targets of
    those that taught it. So a call with other targets finds what is the same, and nothing else.
    """
    names: dict[str, str] = {}
    larger: list[object] = []
    for name in order:
        line = [*larger, recipes[name].target.model_dump(mode="json")]
        names[name] = f"size-{fingerprints.of_tensors([], repr(line))[:16]}"
        larger = line if teacher == "next-larger" else []
    return names
