"""Several sizes of one model, from one scoring."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from scap_hub.criteria.base import criterion as criterion_named
from scap_hub.page import family_json
from scap_hub.progress import tell
from scap_hub.recipe import Recipe
from scap_hub.run import fingerprints
from scap_hub.run.details import Choices
from scap_hub.run.family_forecast import expected_family
from scap_hub.run.forecast import tell_if_long
from scap_hub.run.identity import identity, weights_of
from scap_hub.run.inputs import example, load_dense, recipe_of
from scap_hub.run.kept import Kept, bytes_kept
from scap_hub.run.members import kept_names, making_order, member_recipes
from scap_hub.run.parts import put_back
from scap_hub.run.pruning import prune_loaded
from scap_hub.run.reachable import check_reachable
from scap_hub.run.report import Measures, Tuned, measure
from scap_hub.run.result import Result
from scap_hub.run.siblings import load_siblings, trained
from scap_hub.run.sizes import Family
from scap_hub.run.stages import Stages
from scap_hub.run.tuning import Tuning, tune_dense, warn_if_guessing
from scap_hub.run.unfinished import Unfinished, kept_beside
from scap_hub.run.verification import failing_plan_beside
from scap_hub.run.wholes import check_taught, dense_figures, fine_tuned, of_part
from scap_hub.timing.clock import milliseconds
from scap_hub.training.callbacks import Callback, check_tracker
from scap_hub.training.data import Data
from scap_hub.training.distributed import accelerator, from_main
from scap_hub.zoo import LoadedModel


def prune_family(
    model: str | Path | nn.Module | None = None,
    dataset: Any = None,
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    *,
    targets: Sequence[str],
    siblings: Sequence[str] = (),
    teacher: str = "dense",
    output_dir: str | Path | None = None,
    restart: bool = False,
    callbacks: Sequence[Callback] = (),
    checkpoint: str | Path | None = None,
    **overrides: Any,
) -> Family:
    """Prunes one model to several sizes; its channels are scored once, and each size is repaired and trained.

    Each member is what `prune` gives for its target.

    Args:
        model: As for `prune`.
        dataset: As for `prune`.
        recipe: As for `prune`; its target does not count.
        targets: What stays of each: ["macs=0.75", "macs=0.5", "macs=0.25"].
        siblings: Smaller models of the zoo to stand beside them, such as ["resnet34"]: trained like the dense model and
            then like the pruned ones, with the dense model as teacher. They are measured, and not saved.
        teacher: Who teaches each size: "dense", the dense model, or "next-larger", the finished size before it, if any.
        output_dir: Folder with a folder for each size, absent or empty; an interrupted call goes on, as for `prune`,
            also with other targets or another teacher: then what they leave the same is taken up, such as the scores.
        restart: As for `prune`.
        callbacks: As for `prune`.
        checkpoint: As for `prune`.
        **overrides: As for `prune`.

    Raises:
        ScapHubError: As for `prune`; a mistake in any of the targets is told before any work.
        TargetError: Likewise; with "next-larger" also if the targets do not say which size is larger.
    """
    base = recipe_of(model, dataset, recipe, overrides, checkpoint)
    recipes = member_recipes(base, targets)
    places = kept_names(recipes, making_order(recipes, teacher), teacher)
    check_tracker(base.finetune)
    stages = Stages(base.seed)
    with (
        kept_beside(output_dir, restart) as work,
        failing_plan_beside(output_dir),
        tempfile.TemporaryDirectory(prefix="scap-hub-") as scratch,
    ):
        loaded, data, tuning = load_dense(model, dataset, base, stages)
        check_taught(loaded, base, teacher)
        with stages("load"):
            smaller = load_siblings(siblings, loaded, base, tuning)
        _begin(work, restart, loaded, data, base, tuning, smaller, {"targets": list(targets), "teacher": teacher})
        _foretell(work, loaded, data, recipes, tuning, smaller)
        folder = None if work is None else work.folder
        tuned = tune_dense(loaded, data, base, tuning, stages, folder)
        before = _measured(loaded, data, stages, folder)
        warn_if_guessing(before, loaded, data, tuned)
        run = _Run(
            *(loaded, data, tuned, before, dense_figures(loaded, stages, folder), recipes), callbacks=callbacks,
            folders={name: folder and folder / place for name, place in places.items()},
            scores=(folder or Path(scratch)) / "scores", clocks={name: Stages(base.seed) for name in recipes},
        )  # fmt: skip
        members = _members(run, making_order(recipes, teacher), teacher)
        measured = trained(smaller, loaded, data, base, tuning, folder)
        family = _told(_timed(Family(members, measured), smaller, folder, places))
        if work is not None:
            from_main(lambda: _save(family, work))
        if (repo_id := base.publish.repo_id) is not None:
            from_main(lambda: tell(f"published at {family.push_to_hub(repo_id, base.publish.private)}"))
    return family


def _foretell(
    work: Unfinished | None,
    loaded: LoadedModel,
    data: Data,
    recipes: Mapping[str, Recipe],
    tuning: Tuning,
    smaller: Mapping[str, LoadedModel],
) -> None:
    """Says what cannot be reached, and of a new family what it takes, if that is long."""
    reach = check_reachable(loaded, list(recipes.values()), None if work is None else work.folder)
    if work is None or work.fresh:
        tell_if_long(lambda timed: expected_family(loaded, data, recipes, tuning, reach, smaller, timed))


@dataclass(frozen=True)
class _Run:
    """How one size is made, and what all of them have in common.

    Attributes:
        loaded: The dense model.
        data: Its data.
        tuned: How it was trained.
        before: What was measured of it.
        whole: The same of the whole, where it is a part of one.
        recipes: Of the sizes, by name, in the order in which they are given back.
        callbacks: As for `prune`.
        folders: Where what each size finds is kept.
        scores: Where the scores of all are kept.
        clocks: Where the seconds of each are counted.
        choices: What the pages of all show of other targets.
    """

    loaded: LoadedModel
    data: Data
    tuned: Tuned | None
    before: Measures
    whole: dict[str, float]
    recipes: Mapping[str, Recipe]
    callbacks: Sequence[Callback]
    folders: Mapping[str, Path | None]
    scores: Path
    clocks: Mapping[str, Stages]
    choices: Choices = field(default_factory=Choices)

    def pruned(self, name: str, teacher: nn.Module | None) -> Result:
        """One size, taught by a model, by the dense one without; a part is not in its whole yet."""
        loaded, data, tuned, before = self.loaded, self.data, self.tuned, self.before
        return prune_loaded(
            *(loaded, data, of_part(loaded, self.recipes[name]), before), tuned=tuned, work=self.folders[name],
            scores=self.scores, stages=self.clocks[name], callbacks=self.callbacks, teacher=teacher,
            choices=self.choices,
        )  # fmt: skip

    def completed(self, name: str, result: Result) -> Result:
        """The same, of a part with its whole around it."""
        made = put_back(result), self.loaded, self.whole, self.recipes[name]
        return fine_tuned(*made, self.clocks[name], self.folders[name], self.callbacks)


def _members(run: _Run, order: Iterable[str], teacher: str) -> dict[str, Result]:
    """Prunes to each size, one taught by the other if so wished.

    Args:
        run: Makes them.
        order: Of their names, in which they are made.
        teacher: As for `prune_family`.
    """
    members: dict[str, Result] = {}
    larger: tuple[str, nn.Module] | None = None
    for name in order:
        own = run.pruned(name, larger and larger[1])
        if larger is not None:
            own.report.about["teacher"] = f"{larger[0]}, the next larger size"
        if teacher == "next-larger":
            larger = name, own.model
        members[name] = run.completed(name, own)
    return {name: members[name] for name in run.recipes}


def _save(family: Family, work: Unfinished) -> None:
    """Saves a family, unless the run was killed after it had done so."""
    if not work.saved:
        work.saving(family_json(family.to_dict()))
        family.save_pretrained(work.output)


def _begin(
    work: Unfinished | None,
    restart: bool,
    loaded: LoadedModel,
    data: Data,
    recipe: Recipe,
    tuning: Tuning,
    smaller: Mapping[str, LoadedModel],
    about: Mapping[str, Any],
) -> None:
    """Takes up what the same call has kept, or begins; nothing where nothing is saved."""
    if work is None:
        return
    criterion = criterion_named(recipe.criterion.name, recipe.criterion.options, recipe.seed)
    siblings = {name: small.module for name, small in smaller.items()}
    kept = [*[loaded.module] * len(about["targets"]), *siblings.values()]
    need = sum(bytes_kept(module, tuning.trains(recipe.finetune)) for module in kept)
    # The target of the family's own recipe does not count.
    run = identity(loaded, data, Recipe.resolve(recipe, target="macs=0.5"), criterion) | weights_of(siblings)
    work.begin({**run, **about, "siblings": list(siblings)}, restart, need, changeable=about)


def _measured(loaded: LoadedModel, data: Data, stages: Stages, work: Path | None) -> Measures:
    """What is measured of the dense model, once for all sizes."""
    with stages("measure dense"):
        dense, size = loaded.module.to(accelerator().device).eval(), loaded.preprocessing.input_size
        return Kept(work).value("dense", Measures, lambda: measure(dense, size, data, loaded.num_classes, dense))


def _timed(family: Family, smaller: Mapping[str, LoadedModel], work: Path | None, places: Mapping[str, str]) -> Family:
    """The same with the latency of all models measured in turns, if asked for, so that any two compare."""
    first = next(iter(family.members.values()))
    if not first.recipe.evaluate.latency:
        return family
    models = [
        first.loaded.module,
        *(member.model for member in family.members.values()),
        *(own.module for own in smaller.values()),
    ]
    images = [example(model, first.loaded, first.recipe.evaluate.batch_size) for model in models]
    with Stages(first.recipe.seed)("measure latency"):
        calls = list(zip(models, images, strict=True))
        own_names = fingerprints.of_tensors([], repr([places[name] for name in family.members]))
        times = Kept(work).value(f"latency-{own_names[:16]}", list[float], lambda: milliseconds(calls))
    own = dict(zip([*family.members, *smaller], times[1:], strict=True))
    return Family(
        {name: _with_times(member, times[0], own[name]) for name, member in family.members.items()},
        {name: replace(found, latency_ms=own[name]) for name, found in family.siblings.items()},
    )


def _with_times(member: Result, dense: float, own: float) -> Result:
    before, after = member.report.before, member.report.after
    report = replace(member.report, before=replace(before, latency_ms=dense), after=replace(after, latency_ms=own))
    return replace(member, report=report)


def _told(family: Family) -> Family:
    """The same, whose members know of each other."""
    document = family.to_dict()
    members = {name: replace(member, family=document) for name, member in family.members.items()}
    return Family(members, family.siblings)
