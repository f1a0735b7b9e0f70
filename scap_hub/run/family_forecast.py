"""What a family of sizes will do and take, before it does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from scap_hub.criteria.base import criterion as criterion_named
from scap_hub.recipe import Recipe
from scap_hub.run.forecast import (
    DIAGNOSTICS,
    FINE_TUNING,
    MEASURING,
    OTHER_TARGETS,
    REPAIR,
    SCORES,
    TIMED,
    Forecast,
    cost_lines,
    expected,
    within,
)
from scap_hub.run.inputs import load_dense, recipe_of
from scap_hub.run.members import making_order, member_recipes
from scap_hub.run.reachable import Reach, reach_of
from scap_hub.run.siblings import load_siblings
from scap_hub.run.stages import Stages
from scap_hub.run.tuning import Tuning
from scap_hub.run.unfinished import check_free
from scap_hub.training.data import Data
from scap_hub.zoo import LoadedModel


@dataclass(frozen=True)
class FamilyForecast:
    """What a family will do and take.

    Attributes:
        sizes: What `forecast` says of each size alone, by its name.
        seconds: As `Forecast.seconds`, of the whole family, with the training of smaller models of the zoo.
        memory: As `Forecast.memory`, of the one that holds most.
    """

    sizes: dict[str, Forecast]
    seconds: dict[str, float]
    memory: int

    def lines(self) -> list[str]:
        """In words."""
        sizes = list(self.sizes.values())
        targets = [line for size in sizes for line in size.target_lines()]
        return [*sizes[0].group_lines(), *targets, *cost_lines(self.seconds, self.memory)]


def forecast_family(
    model: str | Path | nn.Module | None = None,
    dataset: Any = None,
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    *,
    targets: Sequence[str],
    siblings: Sequence[str] = (),
    teacher: str = "dense",
    output_dir: str | Path | None = None,
    checkpoint: str | Path | None = None,
    **overrides: Any,
) -> FamilyForecast:
    """Says what `prune_family` with the same arguments will do and take; prunes, trains and writes nothing.

    Args:
        model: As for `prune_family`.
        dataset: As for `prune_family`.
        recipe: As for `prune_family`.
        targets: As for `prune_family`.
        siblings: As for `prune_family`.
        teacher: As for `prune_family`.
        output_dir: As for `prune_family`; that it is free is all that is looked at.
        checkpoint: As for `prune_family`.
        **overrides: As for `prune_family`.

    Raises:
        ScapHubError: As `prune_family`, for the mistakes that it finds before it scores.
    """
    base = recipe_of(model, dataset, recipe, overrides, checkpoint)
    recipes = member_recipes(base, targets)
    making_order(recipes, teacher)
    criterion_named(base.criterion.name, base.criterion.options, base.seed)
    if output_dir is not None:
        check_free(output_dir)
    stages = Stages(base.seed)
    loaded, data, tuning = load_dense(model, dataset, base, stages)
    with stages("load"):
        smaller = load_siblings(siblings, loaded, base, tuning)
    reach = reach_of(loaded, list(recipes.values()), stages)
    with stages("timing a batch"):
        return expected_family(loaded, data, recipes, tuning, reach, smaller)


def expected_family(
    loaded: LoadedModel,
    data: Data,
    recipes: Mapping[str, Recipe],
    tuning: Tuning,
    reach: Reach | None,
    smaller: Mapping[str, LoadedModel],
    timed: float = TIMED,
) -> FamilyForecast:
    """The forecast of a family whose models and data are there; of what can be pruned, where that is known."""
    first = next(iter(recipes.values()))
    dense = expected(loaded, data, first, tuning, timed=timed)  # what is timed depends on no target
    sizes = {name: dense if reach is None else within(dense, loaded, reach, own) for name, own in recipes.items()}
    seconds = dict(dense.seconds)
    for stage in (REPAIR, FINE_TUNING):
        seconds[stage] *= len(sizes)
    seconds[MEASURING] *= (1 + len(sizes)) / 2  # for one size the dense model is measured too
    seconds[OTHER_TARGETS] = max(size.seconds.get(OTHER_TARGETS, 0.0) for size in sizes.values())
    found = {name: expected(small, data, first, tuning, timed=timed) for name, small in smaller.items()}
    for name, own in found.items():
        pruning = (SCORES, DIAGNOSTICS, REPAIR)
        took = {stage: own_seconds for stage, own_seconds in own.seconds.items() if stage not in pruning}
        seconds[f"training and measuring {name}"] = sum(took.values()) - took[MEASURING] / 2
    return FamilyForecast(sizes, seconds, max(told.memory for told in (dense, *found.values())))
