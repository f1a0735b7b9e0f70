"""The pipeline: a model name in; a pruned, repaired, fine-tuned, measured model out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from accelerate.utils import set_seed
from torch import Tensor, nn

from scap_hub.channels.groups import ChannelGroups
from scap_hub.compensation import repair
from scap_hub.criteria.base import Criterion
from scap_hub.criteria.base import criterion as criterion_named
from scap_hub.criteria.diagnostics import Diagnosis, diagnose
from scap_hub.errors import TargetError, VerificationError
from scap_hub.hub.checkpoint import check_output
from scap_hub.hub.uniform import plain_config
from scap_hub.placement import half_precisions, lower_precision, raised
from scap_hub.plan import PruningPlan
from scap_hub.recipe import Recipe
from scap_hub.run.candidates import candidates
from scap_hub.run.inputs import example, load_dense, shard_calibration
from scap_hub.run.report import GroupReport, Measures, Report, Selection, measure
from scap_hub.run.result import Result
from scap_hub.run.score_cache import kept_scores
from scap_hub.run.stages import Stages
from scap_hub.run.steps import refine
from scap_hub.run.unfinished import kept_beside
from scap_hub.run.verification import Verdict, beyond_repair, failing_plan_beside, verified
from scap_hub.scores import Scores
from scap_hub.selection.latency import select_latency
from scap_hub.selection.select import kept_importance, select
from scap_hub.surgery import apply_plan
from scap_hub.timing.clock import milliseconds
from scap_hub.training.data import Data
from scap_hub.training.distributed import accelerator, from_main
from scap_hub.training.finetune import finetune
from scap_hub.zoo import LoadedModel


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
        VerificationError: No plan was found that is right; `error.plan` is the smallest that is wrong.
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

    with kept_beside(output_dir) as work, failing_plan_beside(output_dir):
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
    given = loaded.module.to(accelerator().device).eval()
    with stages("load"):
        calibration = shard_calibration(data, recipe.data.batch_size)
    if before is None:
        with stages("measure dense"):
            before = measure(given, loaded.preprocessing.input_size, data)

    dense = raised(given)
    pipeline = _Pipeline(replace(loaded, module=dense), data, recipe, criterion, calibration, work, scores, stages)
    small: nn.Module = dense
    steps: list[_Step] = []
    while len(steps) < recipe.schedule.steps:
        small, step = pipeline.step(small, steps)
        steps.append(step)

    lower_precision(small, half_precisions(given))
    with stages("measure pruned"):
        after = measure(small, loaded.preprocessing.input_size, data)
    if recipe.evaluate.latency:
        with stages("measure latency"):
            # In turns, so that whatever else the machine does slows both alike.
            images = example(small, loaded, recipe.evaluate.batch_size)
            times = milliseconds([(given, images), (small, images)])
            before, after = replace(before, latency_ms=times[0]), replace(after, latency_ms=times[1])
    plan = _joined(steps[0].groups, [step.plan for step in steps])
    return Result(small, plan, _report(before, after, plan, steps, stages, data), recipe, loaded, data.task)


@dataclass(frozen=True)
class _Step:
    """What one step of the schedule found and did; the channels are those of the model that the step started from."""

    groups: ChannelGroups
    scores: Scores
    diagnoses: dict[str, Diagnosis]
    plan: PruningPlan
    selection: Selection
    verdicts: list[Verdict]
    history: list[dict[str, float]]

    @property
    def pinned(self) -> dict[str, str]:
        """Groups that cannot be pruned, with the reason."""
        return {group.name: group.pinned_because for group in self.groups if group.pinned_because}


_ROUNDS = 4
"""How often a plan is made before the run gives up, if each is found to be wrong."""


class _Proven(NamedTuple):
    """A plan that was verified, or that cannot be; groups that were found guilty on the way are pinned."""

    groups: ChannelGroups
    plan: PruningPlan
    selection: Selection
    small: nn.Module
    verdict: Verdict


@dataclass(frozen=True)
class _Pipeline:
    """One step of the schedule, with all that the steps have in common."""

    loaded: LoadedModel
    data: Data
    recipe: Recipe
    criterion: Criterion
    calibration: list[Tensor]
    work: Path | None
    cache: Path | None
    stages: Stages

    def step(self, model: nn.Module, earlier: Sequence[_Step]) -> tuple[nn.Module, _Step]:
        """Makes a model one step smaller than the earlier ones; without any it is the dense one."""
        recipe, stages, calibration = self.recipe, self.stages, self.calibration
        number = len(earlier)
        with stages("channel groups"):
            groups = candidates(model, example(model, self.loaded), recipe.protect)
            groups = groups.pinned(_still_guilty(groups, earlier))
        with stages("scores"):
            scores = kept_scores(self.cache, model, calibration, self.criterion, groups)
        diagnoses = {}
        if number == 0 and recipe.criterion.diagnostics:
            with stages("diagnostics"):
                diagnoses = diagnose(model, groups, calibration, self.criterion, scores)
        groups, plan, selection, small, verdict = self._proven(model, groups, scores, number)
        verdicts = [verdict, *self._joined_verdict(earlier, plan)]
        if recipe.publish.layout == "uniform" and number + 1 == recipe.schedule.steps:
            plain_config(self.loaded, small)  # refuses before the training what saving would refuse after it
        with stages("repair"):
            repair(model, small, plan, calibration, **recipe.repair.model_dump())
        history = []
        if recipe.finetune.epochs:
            with stages("fine-tuning"):
                folder = self.work and self.work / f"training-{number}"
                dense = self.loaded.module
                history = finetune(small, self.data, recipe.finetune, dense, folder, seed=recipe.seed)
        return small, _Step(groups, scores, diagnoses, plan, selection, verdicts, history)

    def _proven(self, model: nn.Module, groups: ChannelGroups, scores: Scores, number: int) -> _Proven:
        """Selection, refinement and surgery, made anew without the groups that the verification finds guilty."""
        fault: VerificationError | None = None
        for _ in range(_ROUNDS):
            try:
                with self.stages("selection"):
                    plan, selection = self._selected(model, groups, scores, number)
            except TargetError as error:
                if fault is None:
                    raise
                raise beyond_repair(fault) from error  # too little is left to prune
            # A threshold names the channels themselves, a budget only how many.
            if self.recipe.target.threshold is None:
                with self.stages("refinement"):
                    plan = refine(model, groups, self.calibration, plan, self.criterion)
            with self.stages("surgery"):
                small = apply_plan(model, plan)
            verdict = self._verdict(model, groups, plan)
            if verdict.fault is None:
                return _Proven(groups, plan, selection, small, verdict)
            fault, groups = verdict.fault, groups.pinned(verdict.guilty)
        assert fault is not None
        raise beyond_repair(fault)

    def _verdict(self, model: nn.Module, groups: ChannelGroups, plan: PruningPlan) -> Verdict:
        with self.stages("verification"):
            return verified(model, groups, plan, self.calibration[0], insist=self.recipe.evaluate.verify)

    def _joined_verdict(self, earlier: Sequence[_Step], plan: PruningPlan) -> list[Verdict]:
        """Verifies what all steps do together to the dense model, which is the plan that is saved."""
        if not earlier:
            return []
        groups = earlier[0].groups
        joined = _joined(groups, [*(step.plan for step in earlier), plan])
        verdict = self._verdict(self.loaded.module, groups, joined)
        if verdict.fault is not None:
            raise beyond_repair(verdict.fault)
        return [verdict]

    def _selected(
        self, model: nn.Module, groups: ChannelGroups, scores: Scores, number: int
    ) -> tuple[PruningPlan, Selection]:
        """Decided once: ranks may differ in the last bit of a score, never in the plan."""
        recipe = self.recipe
        scope = scores.scope if recipe.target.scope == "auto" else recipe.target.scope
        images = example(model, self.loaded, recipe.target.batch_size)
        return from_main(lambda: _select(self.loaded.module, model, groups, scores, recipe, scope, number, images))


def _select(
    dense: nn.Module,
    small: nn.Module,
    groups: ChannelGroups,
    scores: Scores,
    recipe: Recipe,
    scope: str,
    step: int,
    images: Tensor,
) -> tuple[PruningPlan, Selection]:
    """The plan of one step, and what it came to."""
    settings, steps = recipe.target, recipe.schedule.steps
    table = share = budget = None
    met = True
    if settings.target.kind == "latency":
        # Of the dense model's time, so that what one step misses the next makes good.
        choice = select_latency(
            small, groups, scores, settings.target.share((step + 1) / steps).number, images, settings.round_to,
            floor=settings.floor, scope=scope, reference=dense,
        )  # fmt: skip
        plan, share, target, table, met = choice.plan, choice.share, choice.target, choice.table, choice.met
        budget = choice.wanted.number
    else:
        target = settings.target.share(1 / steps)
        plan = select(groups, scores, target, settings.round_to, floor=settings.floor, scope=scope)
    importance = kept_importance(plan, scores)
    free = select(groups, scores, target, 1, floor=settings.floor, scope=scope, latency=table)
    return plan, Selection(importance, max(0.0, kept_importance(free, scores) - importance), share, met, budget)


def _still_guilty(groups: ChannelGroups, earlier: Sequence[_Step]) -> dict[str, str]:
    """Groups that an earlier step found guilty."""
    names = groups.by_name
    found = {name: why for step in earlier for name, why in step.pinned.items()}
    return {name: why for name, why in found.items() if name in names}


def _joined(groups: ChannelGroups, plans: Sequence[PruningPlan]) -> PruningPlan:
    """One plan for the dense model that does what several do one after another."""
    kept: dict[str, list[int]] = {}
    for plan in plans:
        for name in plan.groups:
            stays = plan.kept(name)
            kept[name] = [kept[name][index] for index in stays] if name in kept else stays
    return PruningPlan.from_keep(groups, kept)


def _report(
    before: Measures, after: Measures, plan: PruningPlan, steps: Sequence[_Step], stages: Stages, data: Data
) -> Report:
    """What is told of a run; groups, scores and diagnoses are those of the dense model."""
    first = steps[0]
    verdicts = [verdict for step in steps for verdict in step.verdicts]
    unverified = next((verdict.unverified for verdict in verdicts if verdict.unverified), None)
    return Report(
        before,
        after,
        groups={
            group.name: GroupReport(
                group.size,
                plan.kept(group.name) if group.name in plan.groups else list(range(group.size)),
                first.scores[group.name].tolist(),
                first.diagnoses.get(group.name),
            )
            for group in first.groups
            if group.name in first.scores
        },
        stages=stages.seconds,
        history=[row for step in steps for row in step.history],
        pinned=first.pinned,
        verified=None if unverified else max(verdict.difference or 0.0 for verdict in verdicts),
        unverified=unverified,
        selections=[step.selection for step in steps],
        metric=data.task.metric,
        skipped=data.skipped(),
    )
