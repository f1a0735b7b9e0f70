"""The pipeline: a model name in; a pruned, repaired, fine-tuned, measured model out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from scap_hub.channels.groups import ChannelGroups
from scap_hub.criteria.base import Criterion
from scap_hub.criteria.base import criterion as criterion_named
from scap_hub.criteria.diagnostics import Diagnosis
from scap_hub.errors import TargetError, VerificationError
from scap_hub.hub.publish import push_to_hub
from scap_hub.hub.uniform import plain_config
from scap_hub.placement import half_precisions, lower_precision, raised
from scap_hub.plan import PruningPlan
from scap_hub.progress import tell
from scap_hub.recipe import Recipe
from scap_hub.run.candidates import candidates
from scap_hub.run.deploying import deployed
from scap_hub.run.details import Choices, Details, details_of
from scap_hub.run.forecast import expected, tell_if_long
from scap_hub.run.identity import about_run, identity
from scap_hub.run.inputs import example, load_dense, recipe_of, shard_calibration
from scap_hub.run.kept import Kept, bytes_kept
from scap_hub.run.parts import LoadedPart, put_back, verified_within
from scap_hub.run.reachable import check_reachable
from scap_hub.run.repairing import repaired
from scap_hub.run.report import Measures, Report, Selection, Tuned, measure
from scap_hub.run.result import Result
from scap_hub.run.score_cache import Scoring
from scap_hub.run.selecting import keep_of_equal_scores, select_step
from scap_hub.run.stages import Stages
from scap_hub.run.step import Step, joined, report_of, still_guilty
from scap_hub.run.steps import refine
from scap_hub.run.tuning import tune_dense, warn_if_guessing
from scap_hub.run.unfinished import Unfinished, kept_beside
from scap_hub.run.verification import Verdict, Verified, beyond_repair, failing_plan_beside, verified
from scap_hub.run.wholes import dense_figures, fine_tuned, of_part
from scap_hub.scores import Scores
from scap_hub.surgery import apply_plan
from scap_hub.tasks import Task
from scap_hub.timing.clock import milliseconds
from scap_hub.training.callbacks import Callback, check_tracker
from scap_hub.training.data import Data
from scap_hub.training.distributed import accelerator, from_main
from scap_hub.training.finetune import finetune
from scap_hub.zoo import LoadedModel
from scap_hub.zoo.base import remember


def prune(
    model: str | Path | nn.Module | None = None,
    dataset: Any = None,
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    *,
    task: str | Task | None = None,
    output_dir: str | Path | None = None,
    restart: bool = False,
    callbacks: Sequence[Callback] = (),
    checkpoint: str | Path | None = None,
    **overrides: Any,
) -> Result:
    """Makes a model smaller and faster: scores its channels, removes the least important, repairs, fine-tunes.

    Args:
        model: timm name, Hub id or folder, or an nn.Module (which is left untouched); the recipe's if left out.
        dataset: "digits", Hub id, image folder, `datasets.Dataset(Dict)`, torch data set or DataLoader; the
            recipe's if left out. Without any, models trained on ImageNet use unlabelled images of timm/mini-imagenet.
        recipe: Shipped name ("half-macs"), path, dict or `Recipe`.
        task: What the model is for, such as "semantic-segmentation", or a `Task`; found from the model if left out.
        output_dir: Where to save the result, absent or empty; what each stage found is kept beside it until the end, so
            that the same call resumes. A call that differs in anything is refused.
        restart: Whether to throw away what an unfinished run kept, and begin anew.
        callbacks: Called after each epoch of the pruned model's fine-tuning, see `scap_hub.training.callbacks`.
        checkpoint: File with the model's weights, instead of those that its name stands for: .safetensors, or .pth with
            a state dict, alone or under "state_dict", "model" or "model_state_dict". No code in it runs.
        **overrides: Recipe values that win: target="macs=0.5", criterion="scap", finetune_epochs=3, seed=0, ...;
            part="backbone" prunes one part of a model whose forward pass depends on values, such as a whole detector.

    Raises:
        ScapHubError: One of its subclasses, for anything wrong with the model, the data, the recipe or the target.
        VerificationError: No plan was found that is right; `error.plan` is the smallest that is wrong.
    """
    recipe = recipe_of(model, dataset, recipe, overrides, checkpoint, task)
    # A mistake is told before any work.
    check_tracker(recipe.finetune)
    criterion = criterion_named(recipe.criterion.name, recipe.criterion.options, recipe.seed)
    stages = Stages(recipe.seed)
    with kept_beside(output_dir, restart) as work, failing_plan_beside(output_dir):
        loaded, data, tuning = load_dense(model, dataset, recipe, stages, task)
        if work is not None:
            work.begin(
                identity(loaded, data, recipe, criterion),
                restart,
                bytes_kept(loaded.module, tuning.trains(recipe.finetune)),
            )
        folder = None if work is None else work.folder
        if work is None or work.fresh:
            # Each step tells before it scores what cannot be reached, but for what has to be measured.
            if tuning.epochs or recipe.target.target.kind == "latency":
                check_reachable(loaded, [recipe], folder)
            tell_if_long(lambda timed: expected(loaded, data, recipe, tuning, timed=timed))
        tuned = tune_dense(loaded, data, recipe, tuning, stages, folder)
        figures = dense_figures(loaded, stages, folder)
        result = put_back(prune_loaded(
            *(loaded, data, of_part(loaded, recipe)), tuned=tuned, work=folder, scores=folder and folder / "scores",
            stages=stages, callbacks=callbacks,
        ))  # fmt: skip
        result = deployed(data, stages, fine_tuned(result, loaded, figures, recipe, stages, folder, callbacks))
        if work is not None:
            from_main(lambda: _save(result, work))
        from_main(lambda: _publish(result, None if work is None else work.output))
    return result


def _save(result: Result, work: Unfinished) -> None:
    """Saves a result, unless the run was killed after it had done so."""
    if not work.saved:
        work.saving(result.report_json())
        result.save_pretrained(work.output)


def _publish(result: Result, saved: Path | None) -> None:
    """Publishes a result if its recipe says so: the folder that it was saved in, where there is one."""
    settings = result.recipe.publish
    if (repo_id := settings.repo_id) is None:
        return
    if saved is None:
        url = result.push_to_hub(repo_id, settings.private)
    else:
        url = push_to_hub(saved, repo_id, settings.private)
    tell(f"published at {url}")


def prune_loaded(
    loaded: LoadedModel,
    data: Data,
    recipe: Recipe,
    before: Measures | None = None,
    *,
    tuned: Tuned | None = None,
    work: Path | None = None,
    scores: Path | None = None,
    stages: Stages | None = None,
    callbacks: Sequence[Callback] = (),
    detailed: bool = True,
    teacher: nn.Module | None = None,
    choices: Choices | None = None,
) -> Result:
    """`prune` from where model and data are there to where the result is measured; nothing is saved.

    Args:
        loaded: The dense model, trained; unchanged but for its device.
        data: Its data.
        recipe: Its blocks from `criterion` to `evaluate`.
        before: What was measured of the dense model; measured here if left out.
        tuned: How it was trained.
        work: Where what each stage finds is kept.
        scores: Where scores are kept; see `Scoring`.
        stages: Where the seconds are counted.
        callbacks: As for `prune`.
        detailed: Whether the report has what the page shows beside measurements.
        teacher: Who teaches the fine-tuning; the dense model if left out.
        choices: Shared by runs that have their scores in common.
    """
    stages, kept = stages or Stages(recipe.seed), Kept(work)
    criterion = criterion_named(recipe.criterion.name, recipe.criterion.options, recipe.seed)
    given, size = loaded.module.to(accelerator().device).eval(), loaded.preprocessing.input_size
    with stages("load images"):
        calibration = shard_calibration(data, recipe.data.batch_size)
    if before is None:
        with stages("measure dense"):
            before = kept.value("dense", Measures, lambda: measure(given, size, data, loaded.num_classes, given))
        warn_if_guessing(before, loaded, data, tuned)

    dense = raised(given)
    pipeline = _Pipeline(
        replace(loaded, module=dense), data, recipe, criterion, calibration, kept, scores, stages, callbacks, teacher
    )
    small, steps = dense, list[Step]()
    while len(steps) < recipe.schedule.steps:
        small, step = pipeline.step(small, steps)
        steps.append(step)
    lower_precision(small, half_precisions(given))
    with stages("measure pruned"):
        after = kept.value("pruned", Measures, lambda: measure(small, size, data, loaded.num_classes, given))
    if recipe.evaluate.latency:
        with stages("measure latency"):
            # In turns, so that whatever else the machine does slows both alike.
            images = example(small, loaded, recipe.evaluate.batch_size)
            times = kept.value("latency", list[float], lambda: milliseconds([(given, images), (small, images)]))
            before, after = replace(before, latency_ms=times[0]), replace(after, latency_ms=times[1])
    plan = joined(steps[0].groups, [step.plan for step in steps])
    report = report_of(before, after, plan, steps, stages, data)
    report.tuned, report.about = tuned, about_run(loaded, data, recipe)
    report.details = pipeline.details(small, steps[0], plan, choices or Choices(), report) if detailed else None
    if not isinstance(loaded, LoadedPart):
        # So that another round can follow on this one.
        remember(replace(loaded, module=small, earlier=loaded.earlier.then(plan) if loaded.earlier else plan))
    return Result(small, plan, report, recipe, loaded, data.task)


_ROUNDS = 4
"""How often a plan is made before the run gives up, if each is found to be wrong."""


@dataclass(frozen=True)
class _Chosen:
    """A plan that was verified, or that cannot be.

    Attributes:
        plan: The plan.
        selection: What it came to.
        guilty: Groups that were found guilty on the way, with the reason.
        verdicts: Of the plan, and of what all steps so far do together.
    """

    plan: PruningPlan
    selection: Selection
    guilty: dict[str, str]
    verdicts: list[Verified]


@dataclass(frozen=True)
class _Pipeline:
    """One step of the schedule, with all that the steps have in common."""

    loaded: LoadedModel
    data: Data
    recipe: Recipe
    criterion: Criterion
    calibration: list[Tensor]
    kept: Kept
    cache: Path | None
    stages: Stages
    callbacks: Sequence[Callback]
    teacher: nn.Module | None

    def step(self, model: nn.Module, earlier: Sequence[Step]) -> tuple[nn.Module, Step]:
        """Makes a model one step smaller than the earlier ones; without any it is the dense one."""
        recipe, stages, calibration = self.recipe, self.stages, self.calibration
        number = len(earlier)
        with stages("channel groups"):
            groups = candidates(model, example(model, self.loaded), recipe.protect)
            groups = groups.pinned(still_guilty(groups, earlier))
            if recipe.schedule.steps == 1:
                keep_of_equal_scores(groups, recipe.target)  # what cannot be reached is told before it is scored
        with stages("scores"):
            scoring = Scoring(self.cache, model, calibration, self.criterion, groups)
            scores = scoring.scores()
        diagnoses: dict[str, Diagnosis] = {}
        if number == 0 and recipe.criterion.diagnostics:
            with stages("diagnostics"):
                diagnoses = scoring.diagnoses(scores)
        # A plan that was let pass unverified is not taken up where verification is asked for.
        name = f"plan-{number}" if recipe.evaluate.verify else f"plan-{number}-unverified"
        chosen = self.kept.value(name, _Chosen, lambda: self._chosen(model, groups, scores, earlier))
        groups, plan = groups.pinned(chosen.guilty), chosen.plan
        small = apply_plan(model, plan)
        if recipe.publish.layout == "uniform" and number + 1 == recipe.schedule.steps:
            plain_config(self.loaded, small)  # refuses before the training what saving would refuse after it
        if self.loaded.earlier is not None and number == 0:
            self.loaded.earlier.then(plan)  # likewise
        dense = self.loaded.module
        with stages("repair"):
            self.kept.weights(
                f"repaired-{number}",
                small,
                lambda: repaired(recipe, self.data.task, dense, model, small, plan, calibration),
            )
        history = []
        if recipe.finetune.epochs:
            with stages("fine-tuning"):
                folder = self.kept.folder and self.kept.folder / f"training-{number}"
                teacher = dense if self.teacher is None else raised(self.teacher)
                history = finetune(
                    small, self.data, recipe.finetune, teacher, folder, seed=recipe.seed, callbacks=self.callbacks
                )
        return small, Step(groups, scores, diagnoses, plan, chosen.selection, chosen.verdicts, history)

    def details(
        self, small: nn.Module, first: Step, plan: PruningPlan, choices: Choices, report: Report
    ) -> Details | None:
        """What the page shows beside the measurements of the finished model."""
        classes = report.named_classes()
        made_from = (self.loaded, small, first.groups, first.scores, plan, self.calibration, self.recipe, self.data)
        with self.stages("report"):
            return self.kept.value(
                "details", Details | None, lambda: from_main(lambda: details_of(*made_from, choices, classes))
            )

    def _chosen(self, model: nn.Module, groups: ChannelGroups, scores: Scores, earlier: Sequence[Step]) -> _Chosen:
        """Selection and refinement, made anew without the groups that the verification finds guilty."""
        fault: VerificationError | None = None
        guilty: dict[str, str] = {}
        for _ in range(_ROUNDS):
            try:
                with self.stages("selection"):
                    plan, selection = self._selected(model, groups, scores, len(earlier))
            except TargetError as error:
                if fault is None:
                    raise
                raise beyond_repair(fault) from error  # too little is left to prune
            # A threshold names the channels themselves, a budget only how many.
            if self.recipe.target.threshold is None:
                with self.stages("refinement"):
                    plan = refine(model, groups, self.calibration, plan, self.criterion)
            with self.stages("surgery"):
                apply_plan(model, plan)
            verdict = self._verdict(model, groups, plan)
            if verdict.fault is None:
                verdicts = [verdict, *self._joined_verdict(earlier, plan)]
                return _Chosen(plan, selection, guilty, [verdict.known for verdict in verdicts])
            fault, guilty = verdict.fault, {**guilty, **verdict.guilty}
            groups = groups.pinned(verdict.guilty)
        assert fault is not None
        raise beyond_repair(fault)

    def _verdict(self, model: nn.Module, groups: ChannelGroups, plan: PruningPlan) -> Verdict:
        with self.stages("verification"):
            insist = self.recipe.evaluate.verify
            verdict = verified(model, groups, plan, self.calibration[0], insist)
            if isinstance(self.loaded, LoadedPart):
                verdict = verified_within(self.loaded, model, plan, verdict, insist)
            return verdict

    def _joined_verdict(self, earlier: Sequence[Step], plan: PruningPlan) -> list[Verdict]:
        """Verifies what all steps do together to the dense model, which is the plan that is saved."""
        if not earlier:
            return []
        groups = earlier[0].groups
        together = joined(groups, [*(step.plan for step in earlier), plan])
        verdict = self._verdict(self.loaded.module, groups, together)
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
        return from_main(lambda: select_step(self.loaded.module, model, groups, scores, recipe, scope, number, images))
