"""What a comparison of criteria found, as a document."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import rankdata

from scap_hub.errors import RecipeError
from scap_hub.files import replacing

VERSION = 1
Cell = dict[str, Any]


@dataclass
class Comparison:
    """Every criterion at every target, with every seed.

    Attributes:
        about: What was compared: model, data, recipe, and fingerprints of weights and images; and by which metric,
            top-1 if it does not say.
        dense: The dense model's macs, params, and the metric on "validation" and "test".
        cells: One row each: target, criterion, seed, "scorer" (changes with its code, options, weights), "versions" of
            the libraries; then macs and params (shares that stay), the metric after repair ("repaired", validation), at
            the end on "validation" and "test" (None without a test split), and seconds; or "error".
    """

    about: dict[str, Any]
    dense: dict[str, Any]
    cells: list[Cell]

    def summary(self, split: str | None = None) -> list[dict[str, Any]]:
        """One row a criterion, best mean rank first.

        Args:
            split: "validation", "test" or "repaired"; by default test where there is one.

        Returns:
            criterion; targets: {target: mean and std of the metric, its number of seeds}; rank: mean over the targets
            and seeds where each criterion has a result, None where there is no such.
        """
        split = split or self._split
        done = [cell for cell in self.cells if split in cell]
        values = {(cell["target"], cell["seed"], cell["criterion"]): cell[split] for cell in done}
        targets, ranks = self._targets, self._ranks(values, self._less_is_better)
        rows = []
        for criterion in dict.fromkeys(cell["criterion"] for cell in self.cells):
            columns = {}
            for target in targets:
                seeds = [value for key, value in values.items() if (key[0], key[2]) == (target, criterion)]
                if seeds:
                    spread = statistics.stdev(seeds) if len(seeds) > 1 else 0.0
                    columns[target] = {"mean": statistics.mean(seeds), "std": spread, "seeds": len(seeds)}
            rank = statistics.mean(ranks[criterion]) if criterion in ranks else None
            rows.append({"criterion": criterion, "targets": columns, "rank": rank})
        return sorted(rows, key=lambda row: (row["rank"] is None, row["rank"]))

    @staticmethod
    def _ranks(values: Mapping[tuple[str, int, str], float], less_is_better: bool = False) -> dict[str, list[float]]:
        """Ranks of each criterion that has results, at the targets and seeds where all of these have one.

        Args:
            values: By target, seed and criterion.
            less_is_better: Whether the smallest value ranks first; else the largest.
        """
        sign = 1 if less_is_better else -1
        criteria = list(dict.fromkeys(criterion for _, _, criterion in values))
        ranks: dict[str, list[float]] = {}
        for target, seed in dict.fromkeys((target, seed) for target, seed, _ in values):
            row = [values.get((target, seed, criterion)) for criterion in criteria]
            if None not in row:
                for criterion, rank in zip(criteria, rankdata([sign * value for value in row]), strict=True):  # type: ignore[operator]
                    ranks.setdefault(criterion, []).append(float(rank))
        return ranks

    @property
    def _targets(self) -> list[str]:
        return list(dict.fromkeys(cell["target"] for cell in self.cells))

    @property
    def _less_is_better(self) -> bool:
        return bool(self.about.get("metric", {}).get("lower_is_better"))

    @property
    def _split(self) -> str:
        """Where criteria are compared unless asked otherwise."""
        return "test" if self.dense["test"] is not None else "validation"

    def rows(self, split: str | None = None) -> list[list[str]]:
        """The table a person reads; its first row is its head."""
        targets = self._targets
        split = split or self._split
        top1 = self.dense["validation" if split == "repaired" else split]
        table = [["criterion", *targets, "mean rank"], ["dense", *[f"{100 * top1:.2f} %"] * len(targets), ""]]
        tried = {(cell["criterion"], cell["target"]) for cell in self.cells}
        for row in self.summary(split):
            missing = ["failed" if (row["criterion"], target) in tried else "not measured" for target in targets]
            cells = [_percent(row["targets"].get(target), why) for target, why in zip(targets, missing, strict=True)]
            table.append([row["criterion"], *cells, "" if row["rank"] is None else f"{row['rank']:.2f}"])
        return table

    def notes(self, split: str | None = None) -> list[str]:
        """What the table does not say, in sentences."""
        split = split or self._split
        metric = (self.about.get("metric") or {}).get("name", "the metric")
        where = {"repaired": "validation images, repaired and not trained"}.get(split, f"{split} images")
        seeds = len({cell["seed"] for cell in self.cells})
        spread = f"; mean and standard deviation of {seeds} seeds" if seeds > 1 else ""
        better = "less" if self._less_is_better else "more"
        notes = [
            f"{metric} on the {where}, {better} is better{spread}. A target is what stays: macs=0.5 half of the MACs, "
            "the multiply-accumulate operations for one image.",
            "Mean rank: the place among the criteria, on average over targets and seeds; 1 is best.",
        ]
        if any(split not in cell for cell in self.cells):
            notes.append('failed: why stands under "error" in the JSON.')
        for library, versions in self._versions().items():
            if len(versions) > 1:
                notes.append(f"Cells were measured with different versions of {library}: {', '.join(versions)}.")
        return notes

    def _versions(self) -> dict[str, list[str]]:
        """Of each library, those with which cells were measured."""
        found: dict[str, list[str]] = {}
        for cell in self.cells:
            for library, version in cell.get("versions", {}).items():  # older ones did not say
                known = found.setdefault(library, [])
                known += [version] if version not in known else []
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able values: what was found, and its summaries."""
        splits = ["repaired", "validation", *(["test"] if self.dense["test"] is not None else [])]
        found = {"version": VERSION, **self.about, "dense": self.dense, "cells": self.cells}
        return {**found, "summary": {split: self.summary(split) for split in splits}}

    def save(self, path: str | Path) -> None:
        """Writes the JSON, all of it or nothing."""
        with replacing(Path(path)) as unfinished:
            unfinished.write_text(json.dumps(self.to_dict(), indent=1) + "\n")


def found_in(output: str | Path | None, about: dict[str, Any]) -> Comparison:
    """What an earlier call has finished and kept in a file; nothing where there is none.

    Args:
        output: The file, if any.
        about: What is compared now.

    Raises:
        RecipeError: The file holds something else.
    """
    if output is None or not Path(output).exists():
        return Comparison(about, {}, [])
    try:
        document = {**about, **json.loads(Path(output).read_text())}  # older ones did not say all of it
        theirs, version = json.loads(json.dumps({key: document[key] for key in about})), document["version"]
        if version == VERSION and theirs == json.loads(json.dumps(about)):
            return Comparison(about, document["dense"], document["cells"])
        differ = [key for key in about if theirs[key] != json.loads(json.dumps(about[key]))] or ["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{str(output)!r} is no comparison ({error!r}); choose another file") from None
    raise RecipeError(f"{str(output)!r} is a comparison with other {', '.join(differ)}; choose another file")


def _percent(column: Mapping[str, float] | None, missing: str) -> str:
    if column is None:
        return missing
    spread = f" ± {100 * column['std']:.2f}" if column["seeds"] > 1 else ""
    return f"{100 * column['mean']:.2f}{spread} %"
