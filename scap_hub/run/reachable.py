"""Whether a target can be reached, told before anything is trained or scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scap_hub.channels import ChannelGroups
from scap_hub.placement import raised
from scap_hub.recipe import Recipe
from scap_hub.run.candidates import candidates
from scap_hub.run.inputs import example
from scap_hub.run.kept import Kept
from scap_hub.run.selecting import keep_of_equal_scores, least_latency
from scap_hub.run.stages import Stages
from scap_hub.selection.latency import too_slow
from scap_hub.training.distributed import accelerator
from scap_hub.zoo import LoadedModel


@dataclass(frozen=True)
class Reach:
    """What can be pruned of a dense model.

    Attributes:
        groups: Its channel groups.
        least: Share of its time that the smallest model takes, as measured; None where no target is of that.
    """

    groups: ChannelGroups
    least: float | None = None


def reach_of(loaded: LoadedModel, recipes: Sequence[Recipe], stages: Stages, work: Path | None = None) -> Reach:
    """What can be pruned of a dense model, once it is sure that each target can be reached.

    That cannot be known of several steps, as what each may remove follows from what the one before left. A threshold
    can always be reached: groups of which no channel reaches it stay at their floor.

    Args:
        loaded: The dense model.
        recipes: They differ by their targets alone.
        stages: Where the seconds are counted.
        work: Where what was measured is kept, so that a run that takes up is not stopped by noise in a time.

    Raises:
        TargetError: One of them cannot be reached; says what can.
    """
    first = recipes[0]
    with stages("reachable targets"):
        net = raised(loaded.module.to(accelerator().device).eval())
        groups = candidates(net, example(net, loaded), first.protect)
    if first.schedule.steps > 1:
        return Reach(groups)
    targets = [recipe.target.target for recipe in recipes]
    for recipe in recipes:
        keep_of_equal_scores(groups, recipe.target)
    budgets = [target for target in targets if target.kind == "latency"]
    if not budgets:
        return Reach(groups)
    with stages("measuring the smallest model"):
        images = example(net, loaded, first.target.batch_size)
        least = Kept(work).value("least-latency", float, lambda: least_latency(net, groups, first, images))
    for target in budgets:
        if too_slow(least, target):
            raise target.unreachable(least)
    return Reach(groups, least)


def check_reachable(loaded: LoadedModel, recipes: Sequence[Recipe], work: Path | None = None) -> Reach | None:
    """`reach_of`, for a run; None with several steps, of which nothing can be known beforehand."""
    first = recipes[0]
    return None if first.schedule.steps > 1 else reach_of(loaded, recipes, Stages(first.seed), work)
