"""The model card (README.md) of a pruned model: what it was, what was removed, what was measured, how to load it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from string import Template
from typing import Any
from urllib.parse import quote

import yaml
from huggingface_hub import EvalResult, ModelCardData

from scap_hub.markdown import code, escaped, fenced, metadata
from scap_hub.page import FAMILY_PICTURE
from scap_hub.plan import PruningPlan
from scap_hub.tasks import IMAGE_CLASSIFICATION, Task
from scap_hub.text import count
from scap_hub.zoo.base import CODE, LoadedModel

HERE = "path/to/this/folder"
"""Stands for the repository until the card is published."""
PICTURE = "channels.png"
_CHANNELS = f"![channels before and after]({PICTURE})"
_FAMILY = f"\n\n![the sizes of this model: quality against multiply-accumulates and latency]({FAMILY_PICTURE})"
_OTHER_SIZES = (
    " The numbers above were measured on images of exactly this size; the image processor beside the\nweights makes "
    "other sizes of some images, and there they may be different."
)
BEGIN = "<!-- scap_hub: begin; the next push rewrites this block, write before or after it -->"
END = "<!-- scap_hub: end -->"

_MEASUREMENTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "macs": ("MACs", lambda value: f"{value / 1e9:.3f} G" if value >= 1e8 else f"{value / 1e6:.2f} M"),
    "params": ("Parameters", count),
    "bytes": ("File size", lambda value: f"{value / 1e6:.1f} MB"),
    "latency_ms": ("Latency", lambda value: f"{value:.2f} ms"),
}
# Of the metadata these follow the model; everything else belongs to whoever wrote it first.
_OURS = ("base_model", "datasets", "library_name", "pipeline_tag", "model-index")


@dataclass(frozen=True)
class Measured:
    """What a card says was measured.

    Attributes:
        dense: Measurements of the dense model by name: macs, params, bytes, top1 (0..1), latency_ms; None where
            something was not measured, and then it is left out.
        pruned: The same of the pruned model.
        dataset: Name of the data set that top1 was measured on.
        dataset_id: Its Hub id, if it has one.
        device: What latency was measured on.
        task: What the model is for, and how top1 is called.
        verified: Largest relative difference between the pruned model, before repair, and the masked dense one.
        unverified: Why they could not be compared.
        missed: How a latency budget is missed; None where it is met.
        tuned: How the dense model was trained before it was pruned, "for 5 epochs"; None where it was not.
        part: The part that was pruned and measured; None for all of the model.
        whole: Of the model that the part is of, rows of a table: what was measured, dense, pruned, change.
        teacher: Who taught the fine-tuning, where it was not the dense model.
    """

    dense: Mapping[str, float | None] = field(default_factory=dict)
    pruned: Mapping[str, float | None] = field(default_factory=dict)
    dataset: str | None = None
    dataset_id: str | None = None
    device: str | None = None
    task: Task = IMAGE_CLASSIFICATION
    verified: float | None = None
    unverified: str | None = None
    missed: str | None = None
    tuned: str | None = None
    part: str | None = None
    whole: Sequence[tuple[str, str, str, str]] = ()
    teacher: str | None = None


def model_card(
    loaded: LoadedModel,
    plan: PruningPlan,
    measured: Measured,
    recipe_yaml: str | None = None,
    picture: bool = False,
    plain: bool = False,
    family: bool = False,
) -> str:
    """Writes the card's text.

    Args:
        loaded: The dense model.
        plan: What was removed.
        measured: What was measured.
        recipe_yaml: The recipe of the run.
        picture: Whether the folder holds a picture of the cut, `PICTURE`.
        plain: Whether the folder loads without any code of ours.
        family: Whether it holds a picture of the sizes that the model is one of, `FAMILY_PICTURE`.
    """
    title = f"{loaded.name}, pruned"
    data = ModelCardData(
        license=loaded.license,
        base_model=loaded.base_model,
        library_name=loaded.zoo.name if loaded.zoo.rebuilds else None,
        pipeline_tag=measured.task.pipeline_tag,
        tags=["scap_hub", "pruning", measured.task.name],
        datasets=[measured.dataset_id] if measured.dataset_id else None,
        model_name=title,
        eval_results=_eval_results(measured),
    )
    base = loaded.base_model
    origin = f", from [{escaped(base)}](https://huggingface.co/{quote(base)})" if base else ""
    before = " (called dense here, but pruned before; the plan beside the weights is of all rounds)"
    before = before if loaded.earlier else ""
    preprocessing = loaded.preprocessing
    text = Template(files(__package__).joinpath("card_template.md").read_text(encoding="utf-8")).substitute(
        begin=BEGIN,
        end=END,
        title=escaped(title),
        origin=f"{code(loaded.name)} with {loaded.num_classes} classes{origin}{before}",
        measurements=_measurements(measured) + (_FAMILY if family else ""),
        removed="\n\n".join(filter(None, [_CHANNELS if picture else "", _removed(plan), _verified(measured)])),
        doors=_doors(loaded, plain),
        input_size=" x ".join(map(str, preprocessing.input_size)),
        mean=_numbers(preprocessing.mean),
        std=_numbers(preprocessing.std),
        sizes=_OTHER_SIZES if loaded.zoo.makes_other_sizes(loaded) else "",
        recipe=f"\n## How it was made\n\n{fenced(recipe_yaml.strip(), 'yaml')}\n" if recipe_yaml else "",
    )
    return f"---\n{data.to_yaml()}\n---\n\n{text.rstrip()}\n"


def merged_card(theirs: str, ours: str) -> str:
    """The card in the repository with our block and the facts of our metadata replaced, and all else kept.

    Args:
        theirs: The card in the repository, whoever wrote it.
        ours: The card of the model to be published.
    """
    their_data, their_text = metadata(theirs)
    our_data, our_text = metadata(ours)
    kept = {key: value for key, value in their_data.items() if key not in _OURS}
    data = {**our_data, **kept}
    tags = _list(kept.get("tags"))
    if tags := [*tags, *(tag for tag in _list(our_data.get("tags")) if tag not in tags)]:
        data["tags"] = tags
    block = _block(our_text) or f"{BEGIN}\n{our_text.strip()}\n{END}"
    if theirs_before := _block(their_text):
        text = their_text.replace(theirs_before, block, 1)
    else:
        text = f"{their_text.rstrip()}\n\n{block}\n".lstrip()
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---\n\n{text.strip()}\n"


def _block(text: str) -> str | None:
    """Our part of a card: between two markers that are lines of their own, so no name in a line is one.

    A beginning that has lost its end is no block: what follows it is somebody's text.
    """
    begin, end = re.escape(BEGIN), re.escape(END)
    found = re.search(rf"^{begin}$(?:(?!^{begin}$).)*?^{end}$", text, re.DOTALL | re.MULTILINE)
    return found[0] if found else None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] if value else []


def _eval_results(measured: Measured) -> list[EvalResult] | None:
    """The pruned model's measurements; a `model-index` needs a data set."""
    if measured.dataset is None or measured.pruned.get("top1") is None:
        return None
    return [
        EvalResult(
            task_type=measured.task.name,
            dataset_type=measured.dataset_id or measured.dataset,
            dataset_name=measured.dataset,
            metric_type=measured.task.metric.hub_type if key == "top1" else key,
            metric_name=_measurement(key, measured.task)[0],
            metric_value=value,
        )
        for key, value in measured.pruned.items()
        if value is not None
    ]


def _measurement(key: str, task: Task) -> tuple[str, Callable[[float], str]]:
    """How a measurement is called and printed; what has no name of its own is printed under its key."""
    titles = {"top1": task.metric.title, **{metric.name: metric.title for metric in task.others}}
    if key in titles:
        return titles[key], lambda value: f"{value:.2%}"
    return _MEASUREMENTS.get(key, (key, lambda value: f"{value:g}"))


def _measurements(measured: Measured) -> str:
    rows = ["| | dense | pruned | pruned / dense |", "|---|---|---|---|"]
    for key, before in measured.dense.items():
        after = measured.pruned.get(key)
        if before is None or after is None:
            continue
        title, show = _measurement(key, measured.task)
        where = {"top1": measured.dataset, "latency_ms": measured.device}.get(key)
        share = f"{after / before:.2f}" if before else "-"
        rows.append(
            f"| {escaped(title)}{f' ({escaped(where)})' if where else ''} | {show(before)} | {show(after)} | {share} |"
        )
    missed = f"\n\n**The latency budget is missed**: {escaped(measured.missed)}." if measured.missed else ""
    tuned = f"\n\nBefore it was pruned, the dense model was tuned {escaped(measured.tuned)}." if measured.tuned else ""
    part = f"\n\n{code(measured.part)} alone was pruned, and these figures are its own." if measured.part else ""
    if measured.whole:
        lines = ("| " + " | ".join(map(escaped, row)) + " |" for row in measured.whole)
        part += "\n\n" + "\n".join(("| | dense | pruned | change |", "|---|---|---|---|", *lines))
    taught = f"\n\nIt learned from {escaped(measured.teacher)}." if measured.teacher else ""
    return "\n".join(rows) + part + missed + tuned + taught


def _removed(plan: PruningPlan) -> str:
    if not plan.groups:
        return "Nothing."
    rows = ["| channels made by | before | after |", "|---|---|---|"]
    rows += [f"| {code(name)} | {cut.size} | {len(plan.kept(name))} |" for name, cut in plan.groups.items()]
    return "\n".join(rows)


def _verified(measured: Measured) -> str:
    """Whether it is proven that only these channels are gone."""
    if measured.unverified is not None:
        return f"**Not verified**, that nothing but these channels is gone: {escaped(measured.unverified)}."
    if measured.verified is None:
        return ""
    return (
        "Verified: before repair and training it computed what the dense model computes with these channels masked "
        f"(largest relative difference {measured.verified:.1e})."
    )


def _doors(loaded: LoadedModel, plain: bool) -> str:
    """Each way to load the model, with its code."""
    ours = "import scap_hub"
    if not loaded.zoo.rebuilds:
        code = f'{ours}\n\nmodel = scap_hub.load("{HERE}", model=dense_model)'
        return f"`dense_model` is an instance of your own dense module; its weights do not matter.\n\n{_code(code)}"
    doors = loaded.zoo.doors(HERE, loaded)
    if plain:
        title = "The widths are arguments of the model's own constructor, so nothing of scap_hub is needed:"
        return "\n\n".join([title, *(_code(f"{door.imports}\n\n{door.call}") for door in doors)])
    parts = [
        "With scap_hub; no code from this repository runs:",
        _code(f'{ours}\n\nmodel = scap_hub.load("{HERE}")'),
    ]
    if doors:
        parts.append("With scap_hub, through the calls you know:")
        parts += [_code(f"{door.imports}\n{ours}\n\n{door.call}") for door in doors]
    if running := [door for door in doors if door.code_call]:
        parts.append(f"Without scap_hub; this runs `{CODE}` from this repository:")
        parts += [_code(f"{door.imports}\n\n{door.code_call}") for door in running]
    return "\n\n".join(parts)


def _code(text: str) -> str:
    return fenced(text, "python")


def _numbers(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"
