"""What a run will do and take, before it does it."""

from __future__ import annotations

import copy
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from scap_hub.channels import ChannelGroups
from scap_hub.compensation import PASSES
from scap_hub.compensation.tuning import BATCH, TRIALS
from scap_hub.criteria.base import criterion as criterion_named
from scap_hub.errors import DataError, ModelError, ScapHubError, TargetError
from scap_hub.placement import raise_precision
from scap_hub.private import tree_leaves
from scap_hub.progress import announce, tell
from scap_hub.recipe import Recipe
from scap_hub.run.details import SHARES
from scap_hub.run.inputs import load_dense, recipe_of
from scap_hub.run.reachable import Reach, reach_of
from scap_hub.run.repairing import tuning_steps
from scap_hub.run.selecting import keep_of_equal_scores
from scap_hub.run.stages import Stages
from scap_hub.run.tuning import Tuning
from scap_hub.run.unfinished import check_free
from scap_hub.run.wholes import whole_of
from scap_hub.tasks import Task
from scap_hub.text import count as in_short
from scap_hub.text import one_line
from scap_hub.timing.clock import fastest
from scap_hub.training.data import Data
from scap_hub.training.data.batches import known_length
from scap_hub.training.distributed import accelerator, shard
from scap_hub.training.evaluate import count
from scap_hub.zoo import LoadedModel

LONG = 60.0
"""Seconds from which on a run says beforehand what it takes."""
SCORES, DIAGNOSTICS, REPAIR = "scores", "diagnostics", "repair"
FINE_TUNING, MEASURING = "fine-tuning", "measuring"
OTHER_TARGETS = "the report's other targets"
"""Stages by name."""
_ENOUGH = 8
"""Images that are timed on a CPU."""
TIMED = 0.5
"""Seconds for which a call is timed, if two of it do not take longer."""
_ADAMW = 4
"""Weights, gradients and two moments."""


@dataclass(frozen=True)
class Forecast:
    """What a run will do and take.

    Attributes:
        seconds: By stage, for this process's share of the images: what the model computes, without the reading of
            images. Of training, what it takes at the dense model's size; of scores and repair, what they took of other
            models, in forward passes. Without scores where nobody knows what the criterion takes.
        memory: Bytes that training holds at once, at the dense model's size: weights, gradients, moments, the teacher
            and what a batch leaves for its backward pass.
        target: What shall stay, in short form.
        groups: Prunable channel groups; None where they were not looked for, as all that follows.
        channels: Channels in them.
        pinned: How many groups cannot be pruned, by reason.
        macs: Multiply-accumulates of one image before, and about those after.
        params: Parameters before, and about those after.
        least: Share of the dense model's time that the smallest model takes, as measured for a latency target.
    """

    seconds: dict[str, float]
    memory: int
    target: str
    groups: int | None = None
    channels: int = 0
    pinned: dict[str, int] = field(default_factory=dict)
    macs: tuple[int, int | None] = (0, None)
    params: tuple[int, int | None] = (0, None)
    least: float | None = None

    def lines(self) -> list[str]:
        """In words."""
        return [*self.group_lines(), *self.target_lines(), *cost_lines(self.seconds, self.memory)]

    def group_lines(self) -> list[str]:
        """What can be pruned at all, in words; nothing where it was not looked for."""
        if self.groups is None:
            return []
        found = f"channel groups: {self.groups} prunable, with {self.channels:,} channels"
        return [found, *(f"  {number} pinned: {reason}" for reason, number in self.pinned.items())]

    def target_lines(self) -> list[str]:
        """What the target leaves, in words; nothing where it was not looked for."""
        if self.groups is None:
            return []
        found = [f"target {self.target}: {_left('MACs', *self.macs)}, {_left('parameters', *self.params)}"]
        return found if self.least is None else [*found, f"  the smallest model takes {self.least:.3f} of the time"]


def cost_lines(seconds: Mapping[str, float], memory: int) -> list[str]:
    """What a run takes, in words."""
    stages = ", ".join(f"{stage} {_duration(taken)}" for stage, taken in seconds.items() if taken)
    rest = "reading images comes" if SCORES in seconds else "reading images and scores come"
    return [
        f"about {stages or 'nothing'}; {rest} on top",
        f"memory while training: about {in_short(memory)}B" if memory else "no training",
    ]


def forecast(
    model: str | Path | nn.Module | None = None,
    dataset: Any = None,
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    *,
    output_dir: str | Path | None = None,
    checkpoint: str | Path | None = None,
    task: str | Task | None = None,
    **overrides: Any,
) -> Forecast:
    """Says what `prune` with the same arguments will do and take; prunes, trains and writes nothing.

    Model and data are loaded, and one batch is timed.

    Args:
        model: As for `prune`.
        dataset: As for `prune`.
        recipe: As for `prune`.
        output_dir: As for `prune`; that it is free is all that is looked at.
        checkpoint: As for `prune`.
        task: As for `prune`.
        **overrides: As for `prune`.

    Raises:
        ScapHubError: As `prune`, for the mistakes that it finds before it scores.
    """
    recipe = recipe_of(model, dataset, recipe, overrides, checkpoint, task)
    criterion_named(recipe.criterion.name, recipe.criterion.options, recipe.seed)
    if output_dir is not None:
        check_free(output_dir)
    stages = Stages(recipe.seed)
    loaded, data, tuning = load_dense(model, dataset, recipe, stages, task)
    reach = reach_of(loaded, [recipe], stages)
    with stages("timing a batch"):
        return expected(loaded, data, recipe, tuning, reach)


def expected(
    loaded: LoadedModel,
    data: Data,
    recipe: Recipe,
    tuning: Tuning,
    reach: Reach | None = None,
    timed: float = TIMED,
) -> Forecast:
    """The forecast of a run whose model and data are there; both stay as they are.

    Args:
        loaded: The dense model.
        data: Its data.
        recipe: All of it.
        tuning: How the dense model will be trained before.
        reach: What can be pruned, if that is to be told of.
        timed: Seconds for which each call is timed, if two of it do not take longer.
    """
    model, images = loaded.module.to(accelerator().device).eval(), _sample(data)
    trains, tuned, batch = tuning.trains(recipe.finetune), float(tuning_steps(recipe)), recipe.data.batch_size
    if recipe.repair.tune.learning_rate is None:
        tuned *= 1 + TRIALS
    forward, train, saved = _seconds_forward(model, data, images, timed), 0.0, 0
    if trains or tuned:
        train, saved = _training(model, data, images, trains, timed)
    shown = _images(data.train)
    if recipe.finetune.steps and recipe.finetune.epochs:  # which end where the steps do, not with a pass
        shown = recipe.finetune.steps * recipe.finetune.gradient_accumulation * batch // recipe.finetune.epochs
    epoch = shown * train + _images(data.validation) * forward
    epochs = recipe.schedule.steps * recipe.finetune.epochs
    taught = shown * forward if recipe.finetune.distillation.needs_teacher else 0.0
    calibration, steps = _images(data.calibration) * forward, recipe.schedule.steps
    criterion = criterion_named(recipe.criterion.name, recipe.criterion.options, recipe.seed)
    rebuilt = PASSES if recipe.repair.least_squares else float(recipe.repair.batch_norm)
    scores = {}
    if criterion.passes is not None:
        beside = criterion.seconds_beside(model)
        scores[SCORES] = steps * (criterion.passes * calibration + beside)
        if recipe.criterion.diagnostics:  # once more, on half of the images and on the rest
            scores[DIAGNOSTICS] = (1 + criterion.passes) * calibration + 2 * beside
    seconds = {
        f"tuning the dense model{' and its new head' if tuning.new_head else ''}": tuning.epochs * epoch,
        **scores,
        REPAIR: steps * (rebuilt * calibration + tuned * BATCH * (train + forward)),
        FINE_TUNING: epochs * (epoch + taught),
        MEASURING: 2 * _images(data.measured_on) * forward,
    }
    if recipe.finetune.epochs and (whole := whole_of(loaded)) is not None:
        alone = recipe.schedule.steps > 1  # then the part is trained too, after each step
        own = recipe.finetune.epochs * _seconds_of_epoch(*whole, timed)
        seconds[FINE_TUNING] = alone * seconds[FINE_TUNING] + own
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    networks = _ADAMW + (recipe.finetune.distillation.needs_teacher or bool(tuned))
    memory = networks * size + saved * (batch if trains else BATCH) // len(images) if train else 0
    found = Forecast(seconds, memory, str(recipe.target.target))
    return found if reach is None else within(found, loaded, reach, recipe)


class Told(Protocol):
    """The forecast of a run or of a family."""

    @property
    def seconds(self) -> Mapping[str, float]: ...

    def lines(self) -> list[str]:
        """In words."""


def tell_if_long(forecast: Callable[[float], Told]) -> None:
    """Says what a run will take, where that is more than `LONG`.

    Args:
        forecast: Makes it, given the seconds for which to time each call. Two calls are enough to see that a run is
            short, which takes no longer than they do.
    """
    with announce("timing a batch"):
        found = forecast(0.0)
        if sum(found.seconds.values()) > LONG / 2:
            found = forecast(TIMED)
    if sum(found.seconds.values()) > LONG:
        for line in found.lines():
            tell(line)


def within(found: Forecast, loaded: LoadedModel, reach: Reach, recipe: Recipe) -> Forecast:
    """With what is known of the cut: how much of what stays depends on the scores, for which equal ones stand."""
    groups = reach.groups
    costs = count(loaded.module, loaded.preprocessing.input_size)
    macs: tuple[int, int | None] = (costs["macs"], None)
    params: tuple[int, int | None] = (costs["params"], None)
    seconds = dict(found.seconds)
    start = time.perf_counter()
    if (keep := _equal_keep(groups, recipe)) is not None:
        # The report has what other targets would leave: each is chosen in the same way.
        seconds[OTHER_TARGETS] = len(SHARES) * (time.perf_counter() - start)
        stays = groups.staying(keep)
        everything = groups.everything()
        macs = (macs[0], round(macs[0] * groups.macs(stays) / groups.macs(everything)))
        params = (params[0], round(params[0] * groups.params(stays) / groups.params(everything)))
    return Forecast(
        seconds,
        found.memory,
        str(recipe.target.target),
        groups=len(groups.prunable),
        channels=sum(group.size for group in groups.prunable),
        pinned=dict(Counter(group.pinned_because for group in groups if group.pinned_because)),
        macs=macs,
        params=params,
        least=reach.least if recipe.target.target.kind == "latency" else None,
    )


def _sample(data: Data) -> Tensor:
    """Calibration images to time; a few are enough where there is no GPU to fill, and batch norm wants two."""
    with torch.random.fork_rng(devices=[]):  # a loader's workers draw a number
        images = next((batch[0] for batch in data.calibration if len(batch[0])), None)
    if images is None:
        raise DataError("there are no calibration images: none of them can be read, or there are none")
    images = (images if accelerator().device.type == "cuda" else images[:_ENOUGH]).to(accelerator().device)
    return torch.cat([images, images]) if len(images) == 1 else images


@torch.no_grad()
def _seconds_forward(model: nn.Module, data: Data, images: Tensor, timed: float) -> float:
    """Of one image, in eval mode; the first time that a run's model sees a run's images.

    Raises:
        ModelError: They do not go together.
    """
    try:
        return fastest(lambda: data.task.output(model, images), timed) / len(images)
    except (ScapHubError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} does not run on images of {data.name!r}, {tuple(images.shape[1:])} each: "
            f"{one_line(error).rstrip('.')}; give images of the size that it takes"
        ) from error


def _training(model: nn.Module, data: Data, images: Tensor, mode: bool, timed: float) -> tuple[float, int]:
    """Seconds of one image, and bytes that these images leave for the backward pass; a copy is trained.

    `mode`: in training mode, or in eval mode as while tuning.
    """
    pupil = copy.deepcopy(model)
    raise_precision(pupil)
    pupil.train(mode)
    held: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def step() -> None:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = tree_leaves(data.task.output(pupil, images))
            values = [leaf.square().mean() for leaf in outputs if isinstance(leaf, Tensor) and leaf.is_floating_point()]
            torch.stack(values).sum().backward()

    step()
    weights = {parameter.untyped_storage().data_ptr() for parameter in pupil.parameters()}
    saved = sum(size for place, size in held.items() if place not in weights)
    return fastest(step, timed) / len(images), saved


def _seconds_of_epoch(model: nn.Module, data: Data, timed: float) -> float:
    """Of training a model on targets, and measuring it; a copy is trained."""
    pupil = copy.deepcopy(model).to(accelerator().device).train()
    raise_precision(pupil)

    def step() -> None:
        data.task.loss(data.task.output_for(pupil, images, targets), targets).backward()

    with torch.random.fork_rng(devices=[]):  # the order of the images, and what a detector draws
        images, targets = next(iter(shard(data.train)))
        train = fastest(step, timed) / len(images)
    return _images(data.train) * train + _images(data.validation) * _seconds_forward(model, data, images, timed)


def _images(loader: DataLoader | None) -> int:
    """How many images this process sees; 0 where a stream does not tell."""
    images = None if loader is None else known_length(loader)
    return math.ceil((images or 0) / accelerator().num_processes)


def _equal_keep(groups: ChannelGroups, recipe: Recipe) -> dict[str, list[int]] | None:
    """What stays with equal scores; None where only scores say, or several steps go below what a single one can."""
    try:
        return keep_of_equal_scores(groups, recipe.target)
    except TargetError:
        if recipe.schedule.steps == 1:
            raise
        return None


def _left(what: str, before: int, after: int | None) -> str:
    if after is None:
        return f"{what} {in_short(before)} now, then what the scores say"
    return f"{what} {in_short(before)} to about {in_short(after)}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
