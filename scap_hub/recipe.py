"""Recipe: one validated document that says everything a run does."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from scap_hub.errors import RecipeError
from scap_hub.scores import DEFAULT_CRITERION

Fraction = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
BUDGETS = ("threshold", "macs", "params", "latency", "ratio")


class _Block(BaseModel):
    # Docstrings under the fields become the descriptions of the JSON schema.
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def _or_text(schema: dict[str, Any]) -> None:
    """JSON schema of a block that has a shorthand."""
    schema["type"] = ["object", "string"]


class ModelSettings(_Block):
    name: str | None = None
    """timm name, "hf-hub:..." or "local-dir:...", Hugging Face repository id or folder."""
    pretrained: bool = True
    """Load trained weights."""
    num_classes: Count | None = None
    """Width of a new, untrained classifier; the model's own if left out. See also `finetune.dense_epochs`."""
    input_size: tuple[Count, Count, Count] | None = None
    """(channels, height, width) in pixels; the model's own if left out."""


class DataSettings(_Block):
    dataset: str | None = None
    """Hub id, image folder, parquet file or folder, save_to_disk folder, or "digits"."""
    train_split: str | None = None
    """Split to train on; "train", or the only one there is, if left out."""
    validation_split: str | None = None
    """Split that decides on the best weights; "validation", or a tenth of the training images, if left out."""
    test_split: str | None = None
    """Split that nothing is decided on; "test", if there is one, if left out."""
    image_column: str | None = None
    """Column of the images; found by its type if left out."""
    label_column: str | None = None
    """Column of the labels; found by its type if left out."""
    labels: bool = True
    """Use the labels; false for images whose classes are not the model's."""
    revision: str | None = None
    """Branch, tag or commit of a Hub data set."""
    streaming: bool = False
    """Read a Hub data set as it comes instead of downloading it first."""
    calibration_images: Count = 256
    """Training images used for scoring, repair and batch norm."""
    batch_size: Count = 64
    """Images a step, per process."""
    augmentation: Literal["auto", "none", "crop", "crop-flip"] = "auto"
    """Of training images: shifts by up to an eighth, mirrored or not; "auto" mirrors colour images only."""
    workers: Annotated[int, Field(ge=0)] | None = None
    """Loader processes; if left out, none for small data kept in memory, else the cores there are, up to 8."""


class CriterionSettings(_Block):
    """A criterion and its options; a name alone stands for that criterion with its defaults."""

    model_config = ConfigDict(json_schema_extra=_or_text)

    name: str = DEFAULT_CRITERION
    """Name of a registered criterion; with a threshold, "scap" is the default, whose importances it is made for."""
    options: dict[str, Any] = {}
    """Keyword options of that criterion."""
    diagnostics: bool = True
    """Report dead channels, energies and the stability of the ranking; takes about another scoring."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class TargetSettings(_Block):
    """One budget; fractions are what stays. `macs: 0.5` if none is given; "macs=0.5" is short for that."""

    model_config = ConfigDict(json_schema_extra=_or_text)

    threshold: Share | None = None
    """Keep the channels whose importance is at least this."""
    macs: Fraction | None = None
    """Multiply-accumulate operations that stay, as a fraction."""
    params: Fraction | None = None
    """Parameters that stay, as a fraction."""
    latency: Fraction | None = None
    """Time of a forward pass that stays, as a fraction, measured on the device of the run."""
    batch_size: Count = 1
    """Images at once when the budget is latency."""
    ratio: Fraction | dict[str, Fraction] | None = None
    """Channels that stay in each group, as a fraction; or {group name: fraction}."""
    scope: Literal["auto", "global", "cost-aware", "uniform"] = "auto"
    """Compare scores across groups, or scores for what a channel costs (importance per MAC, parameter or millisecond),
    or keep the same fraction in each; auto is what the criterion's scores are made for."""
    round_to: Count = 8
    """Kept channels are a multiple of this; fast kernels want 8."""
    floor: Share = 0.05
    """Channels that stay in each group whatever the scores say, as a fraction."""

    @model_validator(mode="before")
    @classmethod
    def _one_budget(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = _parse_budget(value)
        if isinstance(value, Mapping):
            given = [key for key in BUDGETS if value.get(key) is not None]
            if len(given) > 1:
                raise ValueError(f"{' and '.join(given)} contradict each other; keep one of them")
            if not given:
                return {**value, "macs": 0.5}
        return value

    @property
    def budget(self) -> tuple[str, float | dict[str, float]]:
        """The one that is given: its name and value."""
        return next((kind, getattr(self, kind)) for kind in BUDGETS if getattr(self, kind) is not None)


class RepairSettings(_Block):
    least_squares: bool = True
    """Re-solve the weights of each layer that lost inputs, so that its output matches the dense model's."""
    ridge: Annotated[float, Field(ge=0)] = 0.01
    """Ridge of that least-squares problem, relative to the mean diagonal of its Gram matrix."""
    batch_norm: bool = True
    """Recompute batch-norm statistics on the calibration images."""


class ScheduleSettings(_Block):
    steps: Count = 1
    """Rounds of prune, repair and fine-tune; 1 is one shot."""


class DistillationSettings(_Block):
    weight: Share = 0.5
    """Share of the loss that follows the dense model's logits; 0 leaves them out."""
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """Both logits are divided by this before they are compared."""
    features: Annotated[float, Field(ge=0)] = 0.0
    """Weight, beside the rest of the loss, of the distance from the dense model's attention maps; 0 leaves them out."""

    @property
    def needs_teacher(self) -> bool:
        """Whether anything of the dense model is learned."""
        return bool(self.weight or self.features)


class FinetuneSettings(_Block):
    epochs: Annotated[int, Field(ge=0)] = 5
    """Passes over the training images; 0 trains nothing."""
    dense_epochs: Annotated[int, Field(ge=0)] = 0
    """Passes that tune the dense model before it is pruned; if above 0, a classifier that does not fit the class names
    of the data is replaced by a new one."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with Nesterov momentum 0.9."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Highest learning rate of the schedule."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.02
    """Not applied to biases and norms."""
    schedule: Literal["cosine", "onecycle"] = "cosine"
    """How the learning rate goes."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the steps over which the learning rate rises."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the probability spread over all classes."""
    mixup: Annotated[float, Field(ge=0)] = 0.0
    """Alpha of the Beta distribution that mixes pairs of images; 0 turns it off."""
    distillation: DistillationSettings = DistillationSettings()
    """Learning from the dense model."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of an exponential moving average of the weights, which is then what is kept; 0 turns it off."""
    precision: Literal["no", "bf16"] = "no"
    """bf16 autocast, or none."""
    channels_last: bool = False
    """Train in the NHWC memory layout."""
    gradient_accumulation: Count = 1
    """Batches per optimiser step."""
    patience: Count | None = None
    """Stop after this many epochs without a better validation result; never, if left out."""


class EvaluateSettings(_Block):
    latency: bool = True
    """Measure the latency of the dense and the pruned model."""
    batch_size: Count = 1
    """Images at once when latency is measured."""


class PublishSettings(_Block):
    repo_id: str | None = None
    """Hub repository to push to; nothing is pushed if left out."""
    private: bool = False
    """Whether a new repository is private."""
    layout: Literal["pruned", "uniform"] = "pruned"
    """"uniform" writes a plain config, where the zoo's own constructor arguments can express the widths."""


class Recipe(_Block):
    """Everything a run does. Every block and every key may be left out; unknown keys are refused."""

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
    publish: PublishSettings = PublishSettings()
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of everything random."""

    @model_validator(mode="before")
    @classmethod
    def _thresholds_are_for_scap(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        target, criterion = value.get("target"), value.get("criterion", {})
        short = isinstance(target, str) and target.startswith("threshold")
        threshold = short or (isinstance(target, Mapping) and target.get("threshold") is not None)
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
        document, text = _read(path)
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
            path = _find(recipe)
            source = str(path)
            document, text = _read(path)
        else:
            raise RecipeError(f"a recipe is a name, a path, a dict or a Recipe, not {type(recipe).__name__}")
        base = _validate(document, text, source)
        if not overrides:
            return base
        merged = base.model_dump(exclude_unset=True)
        paths = {"_".join(path): path for path in _paths(cls)} | {"round_to": ("target", "round_to")}
        for name, value in overrides.items():
            if name not in paths:
                raise RecipeError(f"unknown option {name!r}{_hint(name, paths)}")
            merged = _merge(cls, merged, _as_change(paths[name], value))
        return _validate(merged, None, "options")


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with scap_hub, by name."""
    package = Path(__file__).parent
    # A wheel carries them inside the package; a checkout has them at the top.
    folder = package / "recipes" if (package / "recipes").is_dir() else package.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, with which editors complete and check the YAML."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def _find(recipe: str | Path) -> Path:
    shipped = shipped_recipes()
    if recipe in shipped:
        return shipped[str(recipe)]
    if not Path(recipe).is_file():
        hint = _nearest(str(recipe), shipped)
        raise RecipeError(f"no recipe {str(recipe)!r}: neither a file nor one of {', '.join(shipped)}{hint}")
    return Path(recipe)


def _read(path: str | Path) -> tuple[Any, str]:
    try:
        text = Path(path).read_text(encoding="utf-8")
        return yaml.safe_load(text) or {}, text
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {str(path)!r} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {str(path)!r} is not YAML: {' '.join(str(error).split())}") from None


def _validate(document: Any, text: str | None, source: str) -> Recipe:
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        path = tuple(str(part) for part in first["loc"])
        line = _line(text, path) if text is not None else None
        where = source if line is None else f"{source}, line {line}"
        if first["type"] == "extra_forbidden":
            keys = {".".join(path): path for path in _paths(Recipe)}
            raise RecipeError(f"{where}: unknown key {'.'.join(path)!r}{_hint('.'.join(path), keys)}") from None
        reason = first["msg"].removeprefix("Value error, ")
        if first["type"] != "value_error":
            reason += f", got {first['input']!r}"
        if first["type"] == "literal_error":
            reason += _nearest(str(first["input"]), re.findall("'([^']+)'", first["ctx"]["expected"]))
        key = ".".join(path) or ("" if first["type"] == "value_error" else "the document")
        raise RecipeError(": ".join(filter(None, (where, key, reason)))) from None


def _line(text: str, path: tuple[str, ...]) -> int | None:
    """The line of the deepest part of the path that the YAML text spells out."""
    node, line = yaml.compose(text, Loader=yaml.SafeLoader), None
    for part in path:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        found = next(((key, value) for key, value in pairs if key.value == part), None)
        if found is None:
            break
        line, node = found[0].start_mark.line + 1, found[1]
    return line


def _paths(block: type[BaseModel], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of all blocks and keys of a recipe."""
    for name in block.model_fields:
        path = (*above, name)
        yield path
        inner = _block_of(block, name)
        if inner:
            yield from _paths(inner, path)


def _hint(wrong: str, valid: Mapping[str, tuple[str, ...]]) -> str:
    # A right key in the wrong block is nearer than a similar spelling.
    last = wrong.rpartition(".")[2]
    same = [name for name, path in valid.items() if path[-1] == last]
    if same:
        return f"; did you mean {same[0]!r}?"
    blocks = ", ".join(name for name, path in valid.items() if len(path) == 1)
    return _nearest(wrong, valid) or f"; the blocks are {blocks}"


def _nearest(wrong: str, valid: Iterable[str]) -> str:
    near = difflib.get_close_matches(wrong, list(valid), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _parse_budget(text: str) -> dict[str, Any]:
    kind, _, fraction = text.partition("=")
    try:
        if kind.strip() in BUDGETS:
            return {kind.strip(): float(fraction)}
    except ValueError:
        pass
    raise ValueError(f"target {text!r} is not one of {', '.join(f'{kind}=FRACTION' for kind in BUDGETS)}")


def _as_change(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """One override as a nested dict; shorthands are written out."""
    if path == ("criterion",) and isinstance(value, str):
        value = {"name": value}
    if path == ("target",):
        try:
            value = _parse_budget(value) if isinstance(value, str) else value
        except ValueError as error:
            raise RecipeError(str(error)) from None
        if isinstance(value, Mapping) and value and not set(value) & set(TargetSettings.model_fields):
            value = {"ratio": dict(value)}
    for key in reversed(path):
        value = {key: value}
    return value


def _merge(block: type[BaseModel], old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces the keys that are given, block by block."""
    merged = dict(old)
    if block is TargetSettings and set(new) & set(BUDGETS):
        merged |= dict.fromkeys(BUDGETS)
    if block is CriterionSettings and "name" in new:
        merged["options"] = {}
    for key, value in new.items():
        inner = _block_of(block, key)
        merged[key] = _merge(inner, old.get(key) or {}, value) if inner and isinstance(value, Mapping) else value
    return merged


def _block_of(block: type[BaseModel], key: str) -> type[BaseModel] | None:
    annotation = block.model_fields[key].annotation if key in block.model_fields else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
