"""Criteria beside each other: the same dense model, data, budgets, repair and training for each of them."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from scipy.stats import rankdata
from torch import nn

from scap_hub.channels.groups import channel_groups
from scap_hub.compensation import recalibrate
from scap_hub.criteria.base import criterion as criterion_named
from scap_hub.criteria.base import known_criteria
from scap_hub.errors import DataError, RecipeError, ScapHubError
from scap_hub.progress import track
from scap_hub.recipe import Recipe
from scap_hub.run import peers
from scap_hub.run.pruning import data_for, example, load_dense, prune_loaded, shard_calibration
from scap_hub.run.report import Measures, measure
from scap_hub.training.data import Data
from scap_hub.training.distributed import accelerator, from_main
from scap_hub.training.evaluate import evaluate
from scap_hub.training.finetune import finetune
from scap_hub.zoo import LoadedModel

VERSION = 1
Cell = dict[str, Any]


@dataclass
class Comparison:
    """Every criterion at every target, with every seed.

    Attributes:
        about: What was compared: model, data, recipe.
        dense: The dense model's macs, params, and top1 on "validation" and "test".
        cells: One row each: target, criterion, seed; then macs and params (shares that stay), top1 after repair
            ("repaired", validation), at the end on "validation" and "test" (None without a test split), and seconds;
            or "error".
    """

    about: dict[str, Any]
    dense: dict[str, Any]
    cells: list[Cell]

    def summary(self, split: str | None = None) -> list[dict[str, Any]]:
        """One row a criterion, best mean rank first.

        Args:
            split: "validation", "test" or "repaired"; by default test where there is one.

        Returns:
            criterion; targets: {target: mean and std of top1, its number of seeds}; rank: mean over the targets and
            seeds where each criterion has a result, None where there is no such.
        """
        split = split or ("test" if self.dense["test"] is not None else "validation")
        done = {(cell["target"], cell["seed"], cell["criterion"]): cell[split] for cell in self.cells if split in cell}
        criteria = list(dict.fromkeys(cell["criterion"] for cell in self.cells))
        targets = list(dict.fromkeys(cell["target"] for cell in self.cells))
        ranks: dict[str, list[float]] = {criterion: [] for criterion in criteria}
        entered = [criterion for criterion in criteria if any(key[2] == criterion for key in done)]
        for target, seed in dict.fromkeys(key[:2] for key in done):
            row = [done.get((target, seed, criterion)) for criterion in entered]
            if None not in row:
                for criterion, rank in zip(entered, rankdata([-value for value in row]), strict=True):  # type: ignore[operator]
                    ranks[criterion].append(float(rank))
        rows = []
        for criterion in criteria:
            columns = {}
            for target in targets:
                values = [value for key, value in done.items() if (key[0], key[2]) == (target, criterion)]
                if values:
                    spread = statistics.stdev(values) if len(values) > 1 else 0.0
                    columns[target] = {"mean": statistics.mean(values), "std": spread, "seeds": len(values)}
            rank = statistics.mean(ranks[criterion]) if ranks[criterion] else None
            rows.append({"criterion": criterion, "targets": columns, "rank": rank})
        return sorted(rows, key=lambda row: (row["rank"] is None, row["rank"]))

    def rows(self, split: str | None = None) -> list[list[str]]:
        """The table a person reads; its first row is its head."""
        targets = list(dict.fromkeys(cell["target"] for cell in self.cells))
        split = split or ("test" if self.dense["test"] is not None else "validation")
        top1 = self.dense["validation" if split == "repaired" else split]
        table = [["criterion", *targets, "mean rank"], ["dense", *[f"{100 * top1:.2f}"] * len(targets), ""]]
        for row in self.summary(split):
            cells = [_percent(row["targets"].get(target)) for target in targets]
            table.append([row["criterion"], *cells, "" if row["rank"] is None else f"{row['rank']:.2f}"])
        return table

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able values: what was found, and its summaries."""
        splits = ["repaired", "validation", *(["test"] if self.dense["test"] is not None else [])]
        return {**self._found(), "summary": {split: self.summary(split) for split in splits}}

    def _found(self) -> dict[str, Any]:
        return {"version": VERSION, **self.about, "dense": self.dense, "cells": self.cells}

    def save(self, path: str | Path) -> None:
        """Writes the JSON, all of it or nothing."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.unfinished")
        unfinished.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
        unfinished.replace(path)


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
        dataset: As for `prune`; with labels.
        recipe: As for `prune`; its repair and training are the same for every criterion.
        targets: What stays: "macs=0.5", ...
        criteria: Names, or "all" registered ones; these, and with "all", Torch-Pruning's own pipeline if it is
            installed ("torch-pruning" and its variants, for targets in MACs or parameters: pruned its way, without our
            repair, fine-tuned like the others).
        seeds: How many, or which.
        output: A JSON file that grows with every finished cell; the same call takes up there.
        **overrides: Recipe values that win, as for `prune`.

    Raises:
        ScapHubError: As for `prune`; a mistake in a target or a criterion's name is told before any work. A criterion
            that cannot score this model is an "error" of its cells instead.
    """
    if isinstance(model, str | Path):
        overrides["model_name"] = str(model)
    if isinstance(dataset, str | Path):
        overrides["data_dataset"] = str(dataset)
    base = Recipe.resolve(recipe, **overrides)
    names = _criteria(criteria)
    wanted = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    recipes = {
        (seed, target, name): Recipe.resolve(
            base, target=target, seed=seed, evaluate_latency=False, criterion_diagnostics=False,
            **({} if name in peers.PEERS or name == base.criterion.name else {"criterion": name}),
        )
        for seed in wanted for target in targets for name in names
    }  # fmt: skip
    set_seed(base.seed)
    loaded, data = load_dense(model, dataset, base)
    if data.validation is None:
        raise DataError("a comparison needs labelled validation images")
    about = {"model": loaded.name, "data": data.name, "recipe": _shared(base)}
    found = from_main(lambda: _resume(output, about))
    if not found.dense:
        found.dense = _dense(loaded, data)
    before = Measures(found.dense["macs"], found.dense["params"], 0, found.dense["test"])
    done = {(cell["seed"], cell["target"], cell["criterion"]) for cell in found.cells if "error" not in cell}
    left = [key for key in recipes if key not in done and _fits(key[2], key[1])]
    seeded = {base.seed: data}
    with tempfile.TemporaryDirectory() as scores:
        for key in track(left, "comparison"):
            seed, target, name = key
            if seed not in seeded:
                seeded = {seed: data_for(loaded, dataset, recipes[key])}
            cell = {"target": target, "criterion": name, "seed": seed}
            cell |= _measured(loaded, seeded[seed], recipes[key], before, name, Path(scores))
            found.cells = [old for old in found.cells if (old["seed"], old["target"], old["criterion"]) != key] + [cell]
            if output is not None and accelerator().is_main_process:
                found.save(output)
    order = {key: number for number, key in enumerate(recipes)}
    found.cells.sort(key=lambda cell: order.get((cell["seed"], cell["target"], cell["criterion"]), len(order)))
    return found


def _criteria(criteria: str | Sequence[str]) -> list[str]:
    if criteria == "all":
        return [*known_criteria(), *(peers.PEERS if peers.available() else ())]
    names = [criteria] if isinstance(criteria, str) else list(criteria)
    for name in names:
        if name in peers.PEERS:
            peers.check_available(name)
        else:
            criterion_named(name)
    return names


def _fits(name: str, target: str) -> bool:
    """Torch-Pruning knows ratios, which are matched to these budgets."""
    return name not in peers.PEERS or target.partition("=")[0] in ("macs", "params")


def _shared(recipe: Recipe) -> dict[str, Any]:
    """What every cell has in common."""
    document = recipe.model_dump(mode="json")
    document["target"] = {key: document["target"][key] for key in ("scope", "round_to", "floor", "batch_size")}
    return {key: value for key, value in document.items() if key not in ("criterion", "seed", "evaluate", "publish")}


def _resume(output: str | Path | None, about: dict[str, Any]) -> Comparison:
    """What an earlier call has finished."""
    if output is None or not Path(output).exists():
        return Comparison(about, {}, [])
    try:
        document = json.loads(Path(output).read_text())
        theirs, version = {key: document[key] for key in about}, document["version"]
        if version == VERSION and theirs == json.loads(json.dumps(about)):
            return Comparison(about, document["dense"], document["cells"])
        differ = [key for key in about if theirs[key] != json.loads(json.dumps(about[key]))] or ["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{str(output)!r} is no comparison ({error!r}); choose another file") from None
    raise RecipeError(f"{str(output)!r} is a comparison with another {', '.join(differ)}; choose another file")


def _dense(loaded: LoadedModel, data: Data) -> dict[str, Any]:
    assert data.validation is not None
    measures = measure(loaded.module.to(accelerator().device).eval(), loaded.preprocessing.input_size, data)
    return {
        "macs": measures.macs,
        "params": measures.params,
        "validation": evaluate(loaded.module, data.validation)["top1"],
        "test": measures.top1 if data.test is not None else None,
    }


def _measured(loaded: LoadedModel, data: Data, recipe: Recipe, before: Measures, name: str, scores: Path) -> Cell:
    """What one cell holds; that a criterion cannot score this model is a result too."""
    start = time.perf_counter()
    set_seed(recipe.seed)
    try:
        if name in peers.PEERS:
            cell = _peer(loaded, data, recipe, before, name)
        else:
            cell = _ours(loaded, data, recipe, before, scores)
    except ScapHubError as error:
        cell = {"error": str(error)}
    return {**cell, "seconds": time.perf_counter() - start}


def _ours(loaded: LoadedModel, data: Data, recipe: Recipe, before: Measures, scores: Path) -> Cell:
    result = prune_loaded(loaded, data, recipe, before, scores=scores)
    return _cell(result.model, result.report.history, data, before, result.report.after)


def _peer(loaded: LoadedModel, data: Data, recipe: Recipe, before: Measures, name: str) -> Cell:
    """Torch-Pruning's choice, then the same training; repaired only where its name says so."""
    small, history = loaded.module, []
    kind, fraction = recipe.target.budget
    assert isinstance(fraction, float)
    for _ in range(recipe.schedule.steps):
        images = example(small, loaded)
        groups = channel_groups(small, images)
        step = (kind, fraction ** (1 / recipe.schedule.steps))
        try:
            small = peers.prune_with_peer(small, groups, images, name, step, recipe.target.round_to)
        except Exception as error:
            # Whatever another library raises is a result here: it does not prune this model.
            return {"error": f"{type(error).__name__}: {error}"}
        if name.endswith("-bn"):
            recalibrate(small, shard_calibration(data, recipe.data.batch_size))
        if recipe.finetune.epochs:
            history += finetune(small, data, recipe.finetune, loaded.module, seed=recipe.seed)
    return _cell(small, history, data, before, measure(small, loaded.preprocessing.input_size, data))


def _cell(model: nn.Module, history: list[dict[str, float]], data: Data, before: Measures, after: Measures) -> Cell:
    assert data.validation is not None
    # The last step's training: epoch 0 is the model as it came, and the best epoch's weights are kept.
    start = max((number for number, row in enumerate(history) if row["epoch"] == 0), default=0)
    tuning = [row["top1"] for row in history[start:]] or [evaluate(model, data.validation)["top1"]]
    return {
        "macs": after.macs / before.macs,
        "params": after.params / before.params,
        "repaired": tuning[0],
        "validation": max(tuning),
        "test": after.top1 if data.test is not None else None,
    }


def _percent(column: Mapping[str, float] | None) -> str:
    if column is None:
        return "failed"
    spread = f" ± {100 * column['std']:.2f}" if column["seeds"] > 1 else ""
    return f"{100 * column['mean']:.2f}{spread}"
