"""The recipe as a whole: its blocks together, read, checked, and written."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError, model_validator

from scap_hub.errors import RecipeError
from scap_hub.recipe.files import find_recipe, line_of, read_yaml
from scap_hub.recipe.keys import NEAR, key_hint, key_paths
from scap_hub.recipe.overrides import overridden
from scap_hub.recipe.settings import (
    Block,
    CountOrZero,
    CriterionSettings,
    DataSettings,
    DeploySettings,
    EvaluateSettings,
    FinetuneSettings,
    ModelSettings,
    PublishSettings,
    RepairSettings,
    ScheduleSettings,
    TargetSettings,
    written_out,
)
from scap_hub.text import did_you_mean, shown


class Recipe(Block):
    """Everything a run does. Every block and every key may be left out; unknown keys are refused."""

    task: str | None = None
    """What the model is for, such as "semantic-segmentation"; found from the model if left out."""
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    criterion: CriterionSettings = CriterionSettings()
    target: TargetSettings = TargetSettings(macs=0.5)
    protect: tuple[str, ...] = ()
    """Glob patterns of module names that are not pruned."""
    repair: RepairSettings = RepairSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    finetune: FinetuneSettings = FinetuneSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    deploy: DeploySettings = DeploySettings()
    publish: PublishSettings = PublishSettings()
    seed: CountOrZero = 0
    """Seed of everything random."""

    @model_validator(mode="before")
    @classmethod
    def _thresholds_are_for_scap(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or "target" not in value:
            return value
        try:
            target, criterion = written_out(TargetSettings, value["target"]), value.get("criterion", {})
        except ValueError:
            return value  # the block says it, with its place in the file
        threshold = isinstance(target, Mapping) and target.get("threshold") is not None
        if threshold and isinstance(criterion, Mapping) and "name" not in criterion:
            return {**value, "criterion": {**criterion, "name": "scap"}}
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.target.threshold is not None and self.schedule.steps > 1:
            raise ValueError(
                f"target.threshold={self.target.threshold:g} and schedule.steps={self.schedule.steps} contradict each "
                "other: a threshold does not split into steps; give a budget"
            )
        return self

    @classmethod
    def from_yaml(cls, path: str | Path) -> Recipe:
        """Reads a recipe file.

        Raises:
            RecipeError: The file cannot be read, is not YAML, or has an unknown key or a wrong value.
        """
        document, text = read_yaml(path)
        return _validate(document, text, str(path))

    def to_yaml(self) -> str:
        """The whole recipe, defaults included, as YAML that `from_yaml` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False)

    @classmethod
    def resolve(cls, recipe: str | Path | Mapping[str, Any] | Recipe | None = None, **overrides: Any) -> Recipe:
        """Merges, later wins: the defaults, the recipe, the overrides in the order given.

        Args:
            recipe: None, the name of a shipped recipe such as "half-macs", a path, a dict or a Recipe.
            **overrides: A block (a dict, of which the keys left out stay as they are), or one key as
                `<block>_<key>`, such as `finetune_epochs=3`. Also `seed`, `protect`, `round_to`, `criterion="l1"`,
                and `target="macs=0.5"` or `target={group name: fraction}`. A new budget replaces the old one;
                a new criterion replaces the old one's options.

        Raises:
            RecipeError: Unknown recipe, key or value.
        """
        text, source = None, "recipe"
        if recipe is None:
            document: dict[str, Any] = {}
        elif isinstance(recipe, Recipe):
            document = recipe.model_dump()
        elif isinstance(recipe, Mapping):
            document = dict(recipe)
        elif isinstance(recipe, (str, Path)):
            path = find_recipe(recipe)
            source = str(path)
            document, text = read_yaml(path)
        else:
            raise RecipeError(f"a recipe is a name, a path, a dict or a Recipe, not {type(recipe).__name__}")
        base = _validate(document, text, source)
        if not overrides:
            return base
        return _validate(overridden(cls, base.model_dump(exclude_unset=True), overrides), None, "options")


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, with which editors complete and check the YAML."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def _validate(document: Any, text: str | None, source: str) -> Recipe:
    _check_numbers(document, source)
    try:
        recipe = Recipe.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        # Among the names are kinds that pydantic tried, such as "dict[str, float]".
        path = tuple(str(part) for part in first["loc"] if "[" not in str(part))
        line = line_of(text, path) if text is not None else None
        where = source if line is None else f"{source}, line {line}"
        if first["type"] == "extra_forbidden":
            keys = {".".join(path): path for path in key_paths(Recipe)}
            raise RecipeError(f"{where}: unknown key {'.'.join(path)!r}{key_hint('.'.join(path), keys)}") from None
        reason = first["msg"].removeprefix("Value error, ")
        if first["type"] == "model_type" and path:
            inner = next(key for key in key_paths(Recipe) if key[:-1] == path)
            reason = f"Input should be a block of keys, such as {'.'.join(inner)}"
        if first["type"] != "value_error":
            reason += f", got {shown(first['input'])}"
        if first["type"] in ("tuple_type", "list_type") and isinstance(first["input"], str):
            reason += f"; write [{first['input'][:40]}]"
        if first["type"] == "literal_error":
            reason += did_you_mean(first["input"], re.findall("'([^']+)'", first["ctx"]["expected"]), cutoff=NEAR)
        key = ".".join(path) or ("" if first["type"] == "value_error" else "the document")
        raise RecipeError(": ".join(filter(None, (where, key, reason)))) from None
    _check_numbers(recipe.model_dump(), source)  # text such as "1e999" has become a number
    return recipe


def _check_numbers(document: Any, source: str) -> None:
    if (found := _unusable(document)) is not None:
        place, number = found
        raise RecipeError(f"{source}: {place or 'the document'}: a number of ordinary size is wanted, not {number}")


def _unusable(value: Any, path: str = "") -> tuple[str, str] | None:
    """Place and text of the first number that is infinite, NaN, or too large for a machine's integers."""
    if isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        found = (_unusable(item, f"{path}.{key}" if path else str(key)) for key, item in items)
        return next((place for place in found if place), None)
    if isinstance(value, float) and not math.isfinite(value):
        return path, str(value)
    if isinstance(value, int) and abs(value) >= 2**63:
        return path, f"one of {value.bit_length()} bits"
    return None
