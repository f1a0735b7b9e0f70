"""Which channels a step of the schedule keeps."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from scap_hub.channels.groups import ChannelGroups
from scap_hub.deploy.opened import check_runtime, opened
from scap_hub.deploy.widths import liked_multiple
from scap_hub.plan import PruningPlan
from scap_hub.progress import announce
from scap_hub.recipe import Recipe
from scap_hub.recipe.settings import TargetSettings
from scap_hub.run.report import Selection
from scap_hub.scores import Scores
from scap_hub.selection.latency import least_share, select_latency
from scap_hub.selection.select import chosen, importance_of, kept_importance, select
from scap_hub.selection.target import Target
from scap_hub.training.distributed import accelerator, from_main


def for_the_runtime(recipe: Recipe) -> Recipe:
    """The recipe with the multiple of channels that its runtime likes, where it asks for "auto".

    Raises:
        ScapHubError: The runtime is not installed; names the extra.
    """
    target, int8 = recipe.target, recipe.deploy.int8
    check_runtime(target.runtime)
    if target.round_to != "auto":
        return recipe
    runtime = "onnxruntime" if int8 and target.runtime == "torch" else target.runtime
    with announce(f"measuring which multiple of channels {runtime} likes"):
        multiple = from_main(lambda: liked_multiple(runtime, int8, accelerator().device))
    return recipe.model_copy(update={"target": target.model_copy(update={"round_to": multiple})})


def keep_of_equal_scores(groups: ChannelGroups, settings: TargetSettings) -> dict[str, list[int]] | None:
    """What a target keeps if all channels score alike; None for a target that depends on scores or a measured time.

    Raises:
        TargetError: The target cannot be reached; says what can.
    """
    if settings.target.kind not in ("macs", "params", "ratio"):
        return None
    return chosen(groups, _equal(groups), settings.target, settings.multiple, settings.floor, "uniform")


def least_latency(dense: nn.Module, groups: ChannelGroups, recipe: Recipe, images: Tensor) -> float:
    """The share of the dense model's time that the smallest model takes, measured on the main process.

    Args:
        dense: The dense model.
        groups: Its channel groups.
        recipe: Its blocks `target` and `deploy`.
        images: As many as will be run at once, where the model is.

    Raises:
        TargetError: Nothing can be pruned.
    """
    settings = recipe.target
    return from_main(
        lambda: least_share(
            dense, groups, _equal(groups), images, settings.multiple, floor=settings.floor,
            built=lambda model: opened(model, images, settings.runtime, recipe.deploy.int8),
        )
    )  # fmt: skip


def _equal(groups: ChannelGroups) -> dict[str, Tensor]:
    return {group.name: torch.ones(group.size) for group in groups.prunable}


def select_step(
    dense: nn.Module,
    small: nn.Module,
    groups: ChannelGroups,
    scores: Scores,
    recipe: Recipe,
    scope: str,
    step: int,
    images: Tensor,
) -> tuple[PruningPlan, Selection]:
    """The plan of one step, and what it came to.

    Args:
        dense: The dense model; a budget of latency is a share of its time.
        small: The model that the step starts from.
        groups: Its channel groups.
        scores: Of these.
        recipe: Its blocks `target`, `schedule` and `deploy`.
        scope: Where scores are compared.
        step: Its number, from 0.
        images: As many as will be run at once, where the model is.
    """
    settings, steps = recipe.target, recipe.schedule.steps
    table = share = budget = None
    met = True
    if settings.target.kind == "latency":
        # Of the dense model's time, so that what one step misses the next makes good.
        choice = select_latency(
            small, groups, scores, settings.target.share((step + 1) / steps).number, images, settings.multiple,
            floor=settings.floor, scope=scope, reference=dense,
            built=lambda model: opened(model, images, settings.runtime, recipe.deploy.int8),
        )  # fmt: skip
        plan, share, target, table, met = choice.plan, choice.share, choice.target, choice.table, choice.met
        budget = choice.wanted.number
    else:
        target = settings.target.share(1 / steps)
        plan = select(groups, scores, target, settings.multiple, floor=settings.floor, scope=scope)
    if target.kind == "threshold":
        _warn_of_one_side(target, groups, scores)
    importance = kept_importance(plan, scores)
    free = importance_of(chosen(groups, scores, target, 1, settings.floor, scope, table), scores)
    return plan, Selection(importance, max(0.0, free - importance), share, met, budget)


def _warn_of_one_side(threshold: Target, groups: ChannelGroups, scores: Scores) -> None:
    """Warns of a threshold with all channels on one side of it: somebody else's scale, or a slip."""
    found = torch.cat([scores[group.name].flatten().double() for group in groups.prunable if group.name in scores])
    least, most = float(found.min()), float(found.max())
    if least < threshold.number <= most:
        return
    what = "every channel reaches it, so none goes" if least >= threshold.number else (
        "no channel reaches it, so every group is cut to its floor"
    )  # fmt: skip
    warnings.warn(f"{threshold}: {what}; importances lie between {least:.3g} and {most:.3g}", stacklevel=2)
