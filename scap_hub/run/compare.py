"""Criteria beside each other: the same dense model, data, budgets, repair and training for each of them."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from torch import nn

from scap_hub.channels import channel_groups
from scap_hub.compensation import recalibrate
from scap_hub.criteria.base import criterion as criterion_named
from scap_hub.criteria.base import known_criteria
from scap_hub.errors import DataError, RecipeError, ScapHubError
from scap_hub.progress import track
from scap_hub.recipe import Recipe
from scap_hub.run import baselines, fingerprints, peers
from scap_hub.run.comparison import Cell, Comparison, found_in
from scap_hub.run.identity import versions
from scap_hub.run.inputs import data_for, example, load_dense, recipe_of, shard_calibration
from scap_hub.run.parts import LoadedPart
from scap_hub.run.pruning import prune_loaded
from scap_hub.run.report import Measures, measure
from scap_hub.run.stages import Stages
from scap_hub.run.tuning import Tuning, tune_dense
from scap_hub.selection.target import Target
from scap_hub.training.data import Data
from scap_hub.training.distributed import accelerator, from_main
from scap_hub.training.evaluate import evaluate
from scap_hub.training.finetune import finetune
from scap_hub.training.history import last_training
from scap_hub.zoo import LoadedModel

Key = tuple[int, str, str]
"""Seed, target and criterion of a cell."""


def compare(
    model: str | Path | nn.Module | None = None,
    dataset: Any = None,
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    *,
    targets: Sequence[str] = ("macs=0.5",),
    criteria: str | Sequence[str] = "all",
    seeds: int | Sequence[int] = 3,
    output: str | Path | None = None,
    **overrides: Any,
) -> Comparison:
    """Prunes one model with every criterion, at every target, with every seed, and measures what is left.

    The seed chooses the calibration images and the order of the training; the dense model is the same throughout.

    Args:
        model: As for `prune`.
        dataset: As for `prune`; with labels, or, for a task that is measured by the dense model's outputs, with images
            to validate on.
        recipe: As for `prune`; its repair and training are the same for every criterion.
        targets: What stays: "macs=0.5", ...
        criteria: Names, or "all" registered ones; these, and with "all", Torch-Pruning's own pipeline if it is
            installed ("torch-pruning" and its variants, for targets in MACs or parameters: pruned its way, without our
            repair, fine-tuned like the others). Baselines are named too: "scratch" and "scratch-2x", the network that
            the recipe's criterion leaves, trained from random weights for the fine-tuning's epochs or twice as many;
            "zoo:NAME", a smaller model, trained like the dense and then like the pruned one, at the target nearest to
            what it costs.
        seeds: How many, or which.
        output: A JSON file that grows with every finished cell; the same call takes up there.
        **overrides: Recipe values that win, as for `prune`.

    Raises:
        ScapHubError: As for `prune`; a mistake in a target or a criterion's name is told before any work. A criterion
            that cannot score this model is an "error" of its cells instead.
    """
    base = recipe_of(model, dataset, recipe, overrides)
    wanted = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    names = _criteria(criteria)
    for name in names:
        baselines.check_trains(name, base)
    recipes = _recipes(base, wanted, targets, names)
    set_seed(base.seed)
    stages = Stages(base.seed)
    loaded, data, tuning = load_dense(model, dataset, base, stages)
    _check_comparable(data, names)
    smaller = baselines.smaller_models(names, loaded, base)
    places = {name: baselines.fitting_target(small, loaded, targets) for name, small in smaller.items()}
    compared = _about(loaded, data, base)
    tune_dense(loaded, data, base, tuning, stages)
    found = from_main(lambda: found_in(output, compared))
    if not found.dense:
        found.dense = _dense(loaded, data)
    scorers = {key: _scorer(recipe, smaller.get(key[2])) for key, recipe in recipes.items()}
    done = {_key(cell) for cell in found.cells if _is_done(cell, scorers)}
    fitting = (key for key in recipes if _fits(key[2], recipes[key].target.target))
    left = [key for key in fitting if key not in done and places.get(key[2], key[1]) == key[1]]
    seeded = {base.seed: data}
    with tempfile.TemporaryDirectory() as scores:
        for key in track(left, "comparison"):
            seed, target, name = key
            if seed not in seeded:
                seeded = {seed: data_for(loaded, dataset, recipes[key], data.task)}
            job = _Job(
                loaded, smaller.get(name), tuning, seeded[seed], recipes[key], found.dense, name, Path(scores)
            )  # fmt: skip
            about = {"target": target, "criterion": name, "seed": seed, "scorer": scorers[key], "versions": versions()}
            cell = about | _measured(job)
            found.cells = [old for old in found.cells if _key(old) != key] + [cell]
            if output is not None and accelerator().is_main_process:
                found.save(output)
    order = {key: number for number, key in enumerate(recipes)}
    found.cells.sort(key=lambda cell: order.get(_key(cell), len(order)))
    return found


def _check_comparable(data: Data, names: Sequence[str]) -> None:
    if data.validation is None:
        kind = "" if data.task.from_teacher else "labelled "
        raise DataError(f"a comparison needs {kind}validation images")
    smaller = [name for name in names if name.startswith(baselines.ZOO)]
    if smaller and data.task.from_teacher:
        raise RecipeError(
            f"{', '.join(smaller)}: {data.task.metric.name} compares outputs with the dense model's, and another model "
            "has others; leave it out"
        )


def _recipes(base: Recipe, seeds: Sequence[int], targets: Sequence[str], names: Sequence[str]) -> dict[Key, Recipe]:
    """The recipe of each cell; the cells in the order they run in."""
    same = {"evaluate_latency": False, "criterion_diagnostics": False}
    recipes = {}
    for seed in seeds:
        for target in targets:
            for name in names:
                foreign = name in peers.PEERS or baselines.is_baseline(name)
                ours = {} if foreign or name == base.criterion.name else {"criterion": name}
                recipes[seed, target, name] = Recipe.resolve(base, target=target, seed=seed, **same, **ours)
    return recipes


def _key(cell: Cell) -> Key:
    return cell["seed"], cell["target"], cell["criterion"]


def _is_done(cell: Cell, scorers: Mapping[Key, str]) -> bool:
    return "error" not in cell and cell.get("scorer") in (None, scorers.get(_key(cell)))  # older ones did not say


def _criteria(criteria: str | Sequence[str]) -> list[str]:
    if criteria == "all":
        return [*known_criteria(), *(peers.PEERS if peers.available() else ())]
    names = [criteria] if isinstance(criteria, str) else list(criteria)
    for name in names:
        if name in peers.PEERS:
            peers.check_available(name)
        elif not baselines.is_baseline(name):
            criterion_named(name)
    return names


def _fits(name: str, target: Target) -> bool:
    """Torch-Pruning knows ratios, which are matched to these budgets."""
    return name not in peers.PEERS or target.kind in peers.MATCHED


def _about(loaded: LoadedModel, data: Data, recipe: Recipe) -> dict[str, Any]:
    """What all cells follow from: the dense model as it was loaded, its data, and what the recipes have in common."""
    whole = loaded.whole if isinstance(loaded, LoadedPart) else loaded
    return {
        "model": loaded.name,
        "data": data.name,
        "recipe": _shared(recipe),
        "metric": asdict(data.task.metric),
        "seed": recipe.seed,
        "weights": fingerprints.of_weights(whole.module),
        "images": fingerprints.of_images({name: getattr(data, name) for name in ("train", "validation", "test")}),
    }


def _scorer(recipe: Recipe, smaller: LoadedModel | None) -> str:
    """Changes when the code or an option of a recipe's criterion does, or the weights of the smaller model instead."""
    if smaller is not None:
        return fingerprints.of_weights(smaller.module)
    name, options = recipe.criterion.name, recipe.criterion.options
    code = fingerprints.source_of(type(criterion_named(name, options)))
    return fingerprints.of_tensors([], [name, dict(options), code])


def _shared(recipe: Recipe) -> dict[str, Any]:
    """What every cell has in common."""
    document = recipe.model_dump(mode="json")
    document["target"] = {
        key: document["target"][key] for key in ("scope", "round_to", "floor", "batch_size", "runtime")
    }
    return {key: value for key, value in document.items() if key not in ("criterion", "seed", "evaluate", "publish")}


def _dense(loaded: LoadedModel, data: Data) -> dict[str, Any]:
    dense = loaded.module.to(accelerator().device).eval()
    measures = measure(dense, loaded.preprocessing.input_size, data, teacher=dense)
    return {
        "macs": measures.macs,
        "params": measures.params,
        "validation": _validated(dense, data, dense),
        "test": measures.top1 if data.test is not None else None,
    }


def _validated(model: nn.Module, data: Data, dense: nn.Module) -> float:
    """The metric on the validation images."""
    assert data.validation is not None  # `compare` refuses such data
    return evaluate(model, data.validation, task=data.task, teacher=dense)[data.task.metric.key]


@dataclass(frozen=True)
class _Job:
    """What one cell is measured from.

    Attributes:
        loaded: The dense model.
        smaller: The zoo's smaller model, where the cell is one's.
        tuning: How the dense model was trained.
        data: Its data, with the calibration images of the cell's seed.
        recipe: The cell's.
        dense: What was measured of the dense model, see `Comparison.dense`.
        name: Of the criterion.
        scores: Folder of the scores that cells share.
    """

    loaded: LoadedModel
    smaller: LoadedModel | None
    tuning: Tuning
    data: Data
    recipe: Recipe
    dense: dict[str, Any]
    name: str
    scores: Path


def _measured(job: _Job) -> Cell:
    """What one cell holds; that a criterion cannot score this model is a result too."""
    start = time.perf_counter()
    set_seed(job.recipe.seed)
    try:
        cell = (
            _peer(job) if job.name in peers.PEERS else _baseline(job) if baselines.is_baseline(job.name) else _ours(job)
        )
    except ScapHubError as error:
        cell = {"error": str(error)}
    return {**cell, "seconds": time.perf_counter() - start}


def _before(job: _Job) -> Measures:
    return Measures(job.dense["macs"], job.dense["params"], 0, job.dense["test"])


def _baseline(job: _Job) -> Cell:
    loaded, data, recipe = job.loaded, job.data, job.recipe
    if job.smaller is not None:
        small, history = baselines.tuned_the_same(copy.deepcopy(job.smaller), loaded, data, recipe, job.tuning)
    else:
        small, history = baselines.from_scratch(job.name, loaded, data, recipe, _before(job), job.scores)
    return _cell(job, small, history, measure(small, loaded.preprocessing.input_size, data, teacher=loaded.module))


def _ours(job: _Job) -> Cell:
    result = prune_loaded(job.loaded, job.data, job.recipe, _before(job), scores=job.scores, detailed=False)
    return _cell(job, result.model, result.report.history, result.report.after)


def _peer(job: _Job) -> Cell:
    """Torch-Pruning's choice, then the same training; repaired only where its name says so."""
    loaded, recipe = job.loaded, job.recipe
    small, history = loaded.module, []
    target = recipe.target.target.share(1 / recipe.schedule.steps)
    for _ in range(recipe.schedule.steps):
        images = example(small, loaded)
        groups = channel_groups(small, images)
        try:
            small = peers.prune_with_peer(small, groups, images, job.name, target, recipe.target.multiple)
        except Exception as error:
            # Whatever another library raises is a result here: it does not prune this model.
            return {"error": f"{type(error).__name__}: {error}"}
        if job.name.endswith("-bn"):
            recalibrate(small, shard_calibration(job.data, recipe.data.batch_size))
        if recipe.finetune.epochs:
            history += finetune(small, job.data, recipe.finetune, loaded.module, seed=recipe.seed)
    return _cell(job, small, history, measure(small, loaded.preprocessing.input_size, job.data, teacher=loaded.module))


def _cell(job: _Job, model: nn.Module, history: list[dict[str, float]], after: Measures) -> Cell:
    metric = job.data.task.metric.key
    # The best epoch's weights are kept.
    tuning = [row[metric] for row in last_training(history)] or [_validated(model, job.data, job.loaded.module)]
    return {
        "macs": after.macs / job.dense["macs"],
        "params": after.params / job.dense["params"],
        "repaired": tuning[0],
        "validation": (min if job.data.task.metric.lower_is_better else max)(tuning),
        "test": after.top1 if job.data.test is not None else None,
    }
