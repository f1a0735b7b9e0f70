"""Whether a target can be reached, told before anything is trained or scored."""

from __future__ import annotations

from collections.abc import Sequence

from scap_hub.channels import ChannelGroups
from scap_hub.placement import raised
from scap_hub.recipe import Recipe
from scap_hub.run.candidates import candidates
from scap_hub.run.inputs import example
from scap_hub.run.selecting import keep_of_equal_scores
from scap_hub.run.stages import Stages
from scap_hub.training.distributed import accelerator
from scap_hub.zoo import LoadedModel


def groups_of(loaded: LoadedModel, recipe: Recipe, stages: Stages) -> ChannelGroups:
    """The channel groups of a dense model that a recipe lets prune, before the run."""
    with stages("channel groups"):
        net = raised(loaded.module.to(accelerator().device).eval())
        return candidates(net, example(net, loaded), recipe.protect)


def check_reachable(loaded: LoadedModel, recipes: Sequence[Recipe]) -> ChannelGroups | None:
    """Makes sure that a model can be pruned to each target, as far as that can be known beforehand.

    Args:
        loaded: The dense model.
        recipes: They differ by their targets alone.

    Returns:
        The model's groups; None with several steps, as what each may remove follows from what the one before left.

    Raises:
        TargetError: One of them cannot be reached; says what can.
    """
    first = recipes[0]
    if first.schedule.steps > 1:
        return None
    groups = groups_of(loaded, first, Stages(first.seed))
    for recipe in recipes:
        keep_of_equal_scores(groups, recipe.target)
    return groups
