"""The pipeline: a model name in; a pruned, repaired, fine-tuned, measured model out."""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn

from scap_hub.channels.groups import ChannelGroup, channel_groups
from scap_hub.compensation import repair
from scap_hub.criteria.base import criterion as criterion_named
from scap_hub.criteria.diagnostics import Diagnosis, diagnose
from scap_hub.errors import CalibrationError, DataError, RecipeError, ScapHubError
from scap_hub.hub.checkpoint import check_output
from scap_hub.hub.uniform import plain_config
from scap_hub.plan import PruningPlan
from scap_hub.progress import announce, track
from scap_hub.recipe import DataSettings, Recipe, TargetSettings
from scap_hub.run.report import GroupReport, Measures, Report, Selection, measure
from scap_hub.run.result import Result
from scap_hub.run.score_cache import kept_scores
from scap_hub.scores import Scores
from scap_hub.selection.select import kept_importance, select, select_latency
from scap_hub.surgery import apply_plan
from scap_hub.timing.clock import milliseconds
from scap_hub.training.data import Data, load_data
from scap_hub.training.distributed import accelerator, from_main
from scap_hub.training.finetune import finetune
from scap_hub.zoo import LoadedModel, load_model

CALIBRATION_SET = "timm/mini-imagenet"
"""Small public set for models trained on ImageNet or a superset of it; used without its labels."""
_IMAGENET_CLASSES = (1000, 1001, 11821, 21841, 21843)


def prune(
    model: str | Path | nn.Module | None = None,
    dataset: Any = None,
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    *,
    output_dir: str | Path | None = None,
    **overrides: Any,
) -> Result:
    """Makes a model smaller and faster: scores its channels, removes the least important, repairs, fine-tunes.

    Args:
        model: timm name, Hub id or folder, or an nn.Module (which is left untouched); the recipe's if left out.
        dataset: "digits", Hub id, image folder, `datasets.Dataset(Dict)` or DataLoader; the recipe's if left out.
            Without any, models trained on ImageNet use unlabelled images of timm/mini-imagenet.
        recipe: Shipped name ("half-macs"), path, dict or `Recipe`.
        output_dir: Where to save the result, absent or empty; scores and checkpoints of the fine-tuning are kept beside
            it until the end, so that the same call resumes.
        **overrides: Recipe values that win: target="macs=0.5", criterion="scap", finetune_epochs=3, seed=0, ...

    Raises:
        ScapHubError: One of its subclasses, for anything wrong with the model, the data, the recipe or the target.
    """
    if isinstance(model, str | Path):
        overrides["model_name"] = str(model)
    if isinstance(dataset, str | Path):
        overrides["data_dataset"] = str(dataset)
    recipe = Recipe.resolve(recipe, **overrides)
    criterion_named(recipe.criterion.name, recipe.criterion.options)  # a mistake is told before any work
    if output_dir is not None:
        check_output(output_dir)
    set_seed(recipe.seed)
    stages = Stages()

    with _kept_beside(output_dir) as work:
        loaded, data = load_dense(model, dataset, recipe, work, stages)
        result = prune_loaded(loaded, data, recipe, work=work, scores=work and work / "scores", stages=stages)
        if output_dir is not None:
            from_main(lambda: result.save_pretrained(output_dir))
    if (repo_id := recipe.publish.repo_id) is not None:
        from_main(lambda: result.push_to_hub(repo_id, recipe.publish.private))
    return result


def prune_loaded(
    loaded: LoadedModel,
    data: Data,
    recipe: Recipe,
    before: Measures | None = None,
    *,
    work: Path | None = None,
    scores: Path | None = None,
    stages: Stages | None = None,
) -> Result:
    """`prune` from where model and data are there to where the result is measured; nothing is saved.

    Args:
        loaded: The dense model, trained; unchanged but for its device.
        data: Its data.
        recipe: Its blocks from `criterion` to `evaluate`.
        before: What was measured of the dense model; measured here if left out.
        work: Where checkpoints of the fine-tuning are kept.
        scores: Where scores are kept; see `kept_scores`.
        stages: Where the seconds are counted.
    """
    stages = stages or Stages()
    criterion = criterion_named(recipe.criterion.name, recipe.criterion.options, recipe.seed)
    scope = criterion.scope if recipe.target.scope == "auto" else recipe.target.scope
    dense = loaded.module.to(accelerator().device).eval()
    with stages("load"):
        calibration = shard_calibration(data, recipe.data.batch_size)
    if before is None:
        with stages("measure dense"):
            before = measure(dense, loaded.preprocessing.input_size, data)

    small, history, selections = dense, [], []
    kept: dict[str, list[int]] = {}
    for step in range(recipe.schedule.steps):
        with stages("channel groups"):
            groups = _scorable(_protected(channel_groups(small, example(small, loaded)), recipe.protect))
        with stages("scores"):
            importance = kept_scores(scores, small, calibration, criterion, groups)
        if step == 0:
            dense_groups, dense_scores = groups, importance
            with stages("diagnostics"):
                diagnoses = (
                    diagnose(small, groups, calibration, criterion, importance) if recipe.criterion.diagnostics else {}
                )
        with stages("selection"):
            # Decided once: ranks may differ in the last bit of a score, never in the plan.
            images = example(small, loaded, recipe.target.batch_size)
            step_plan, selection = from_main(
                lambda: _select(dense, small, groups, importance, recipe, scope, step, images)  # noqa: B023
            )
            selections.append(selection)
        with stages("refinement"):
            refined = criterion.refine(small, groups, calibration, step_plan)
            step_plan = from_main(lambda: refined)  # noqa: B023
        with stages("surgery"):
            larger, small = small, apply_plan(small, step_plan)
            kept = _composed(kept, step_plan)
            if recipe.publish.layout == "uniform" and step + 1 == recipe.schedule.steps:
                plain_config(loaded, small)  # refuses before the training what saving would refuse after it
        with stages("repair"):
            repair(
                larger, small, step_plan, calibration,
                least_squares=recipe.repair.least_squares,
                ridge=recipe.repair.ridge,
                batch_norm=recipe.repair.batch_norm,
            )  # fmt: skip
        with stages("fine-tuning"):
            if recipe.finetune.epochs:
                folder = work and work / f"training-{step}"
                history += finetune(small, data, recipe.finetune, dense, folder, seed=recipe.seed)

    with stages("measure pruned"):
        after = measure(small, loaded.preprocessing.input_size, data)
        if recipe.evaluate.latency:
            # In turns, so that whatever else the machine does slows both alike.
            images = example(small, loaded, recipe.evaluate.batch_size)
            times = milliseconds([(dense, images), (small, images)])
            before, after = replace(before, latency_ms=times[0]), replace(after, latency_ms=times[1])
    plan = PruningPlan.from_keep(dense_groups, kept)
    pinned = {group.name: group.pinned_because for group in dense_groups if group.pinned_because}
    reports = _group_reports(dense_groups, dense_scores, kept, diagnoses)
    report = Report(before, after, reports, stages.seconds, history, pinned, selections)
    return Result(small, plan, report, recipe, loaded)


def load_dense(
    model: Any, dataset: Any, recipe: Recipe, work: Path | None = None, stages: Stages | None = None
) -> tuple[LoadedModel, Data]:
    """The dense model, tuned if the recipe says so, and the data as the model wants it."""
    stages, settings = stages or Stages(), recipe.model
    with stages("load"):
        source = settings.name if model is None else model
        if source is None:
            raise RecipeError("no model; pass a name or a module, or set model.name in the recipe")
        loaded = load_model(source, settings.pretrained, settings.num_classes, settings.input_size)
        if loaded.module is model:
            # The caller's module stays as it is, on its own device.
            loaded = replace(loaded, module=copy.deepcopy(model))
        data = data_for(loaded, dataset, recipe)
        if data.labels and len(data.labels) != loaded.num_classes:
            loaded = load_model(source, settings.pretrained, len(data.labels), settings.input_size)
        if data.labels and not loaded.labels and len(data.labels) == loaded.num_classes:
            loaded = replace(loaded, labels=data.labels)
    if recipe.finetune.dense_epochs:
        with stages("tune dense"):
            tuning = recipe.finetune.model_copy(update={"epochs": recipe.finetune.dense_epochs})
            finetune(loaded.module, data, tuning, output_dir=work and work / "training-dense", seed=recipe.seed)
    return loaded, data


def data_for(loaded: LoadedModel, dataset: Any, recipe: Recipe) -> Data:
    """The data as the model wants it; the recipe's seed chooses the calibration images."""
    choices = recipe.data
    if dataset is None and choices.dataset is None:
        choices = _public_images(loaded, choices)
    return load_data(
        dataset,
        loaded.preprocessing,
        choices,
        num_classes=loaded.num_classes,
        new_head=recipe.finetune.dense_epochs > 0 and recipe.model.num_classes is None,
        seed=recipe.seed,
    )


def _public_images(loaded: LoadedModel, settings: DataSettings) -> DataSettings:
    """Data settings for a model that was given no data: images of what it was trained on."""
    if loaded.num_classes not in _IMAGENET_CLASSES or loaded.preprocessing.input_size[0] != 3:
        raise DataError(
            f"{loaded.name} with {loaded.num_classes} classes was given no data set, and no public one is known to fit "
            "it; pass dataset=..., unlabelled images like those that it was trained on suffice"
        )
    return settings.model_copy(update={"dataset": CALIBRATION_SET, "streaming": True, "labels": False})


def shard_calibration(data: Data, batch_size: int) -> list[Tensor]:
    """This process's calibration images in batches, kept for the whole run; every image is on exactly one process."""
    here = accelerator()
    images = torch.cat([batch[0] for batch in track(data.calibration, "calibration images")])
    if len(images) < here.num_processes:
        raise CalibrationError(
            f"{len(images)} calibration images cannot be shared out over {here.num_processes} processes: give more"
        )
    return list(images[here.process_index :: here.num_processes].split(batch_size))


def example(model: nn.Module, loaded: LoadedModel, images: int = 1) -> Tensor:
    """An input of as many images, where the model is."""
    parameter = next(model.parameters())
    return torch.zeros(images, *loaded.preprocessing.input_size, device=parameter.device, dtype=parameter.dtype)


def _protected(groups: list[ChannelGroup], patterns: Sequence[str]) -> list[ChannelGroup]:
    """Pins the groups of which a producer's path matches a pattern."""
    for pattern in patterns:
        matching = [g for g in groups if any(fnmatch.fnmatchcase(path, pattern) for path in g.producers)]
        if not matching:
            raise RecipeError(
                f"protect: {pattern!r} matches no layer that computes channels; `scap-hub inspect` lists them"
            )
        reason = f"is protected by {pattern!r}"
        groups = [
            replace(group, prunable=False, pinned_because=group.pinned_because or reason)
            if group in matching
            else group
            for group in groups
        ]
    return groups


def _scorable(groups: list[ChannelGroup]) -> list[ChannelGroup]:
    """Pins the groups that no criterion can watch."""
    reason = "is computed from the weights of a layer that is not called, so nothing of it can be scored"
    return [
        replace(group, prunable=False, pinned_because=reason) if group.prunable and not group.watched else group
        for group in groups
    ]


def _select(
    dense: nn.Module,
    small: nn.Module,
    groups: list[ChannelGroup],
    scores: Scores,
    recipe: Recipe,
    scope: str,
    step: int,
    images: Tensor,
) -> tuple[PruningPlan, Selection]:
    """The plan of one step, and what it came to."""
    settings, steps = recipe.target, recipe.schedule.steps
    target: str | dict[str, float]
    table = share = None
    if settings.latency is not None:
        # Of the dense model's time, so that what one step misses the next makes good.
        fraction = settings.latency ** ((step + 1) / steps)
        choice = select_latency(
            small, groups, scores, fraction, images, settings.round_to,
            floor=settings.floor, scope=scope, reference=dense,
        )  # fmt: skip
        plan, share, target, table = choice.plan, choice.share, choice.target, choice.table
    else:
        target = _step_target(settings, steps)
        plan = select(groups, scores, target, settings.round_to, floor=settings.floor, scope=scope)
    importance = kept_importance(plan, scores)
    free = select(groups, scores, target, 1, floor=settings.floor, scope=scope, latency=table)
    return plan, Selection(importance, max(0.0, kept_importance(free, scores) - importance), share)


def _step_target(settings: TargetSettings, steps: int) -> str | dict[str, float]:
    """What stays in each of equal steps: their product is the target."""
    kind, value = settings.budget
    if kind == "threshold":
        return f"threshold={value}"
    if isinstance(value, Mapping):
        return {name: fraction ** (1 / steps) for name, fraction in value.items()}
    return f"{kind}={value ** (1 / steps)}"


def _composed(kept: dict[str, list[int]], plan: PruningPlan) -> dict[str, list[int]]:
    """What stays of the dense model's groups after one more step."""
    after = dict(kept)
    for name in plan.groups:
        own = plan.kept(name)
        after[name] = [kept[name][index] for index in own] if name in kept else own
    return after


def _group_reports(
    groups: list[ChannelGroup],
    scores: Scores,
    kept: dict[str, list[int]],
    diagnoses: dict[str, Diagnosis],
) -> dict[str, GroupReport]:
    return {
        group.name: GroupReport(
            group.size,
            kept.get(group.name, list(range(group.size))),
            scores[group.name].tolist(),
            diagnoses.get(group.name),
        )
        for group in groups
        if group.name in scores
    }


@contextlib.contextmanager
def _kept_beside(output_dir: str | Path | None) -> Iterator[Path | None]:
    """Where a run keeps what it has found until its result is saved: beside it, hidden; None where nothing is saved."""
    if output_dir is None:
        yield None
        return
    output = Path(output_dir).expanduser()
    work = output.with_name(f".{output.name}.unfinished")
    try:
        yield work
    except ScapHubError:
        # A mistake leaves nothing behind, but training that was done stays.
        if accelerator().is_main_process and not any(work.glob("training-*")):
            shutil.rmtree(work, ignore_errors=True)
        raise
    from_main(lambda: shutil.rmtree(work, ignore_errors=True))


class Stages:
    """Seconds by stage; a stage that runs again adds up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        with announce(name):
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
