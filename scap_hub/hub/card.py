"""The model card (README.md) of a pruned model: what it was, what was removed, what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from string import Template

from huggingface_hub import ModelCardData

from scap_hub.adapters.base import LoadedModel
from scap_hub.plan import PruningPlan

# How a measurement is called and printed; what is not listed is printed under its own name.
_MEASUREMENTS = {
    "macs": ("MACs", lambda value: f"{value / 1e9:.3f} G"),
    "params": ("Parameters", lambda value: f"{value / 1e6:.2f} M"),
    "bytes": ("File size", lambda value: f"{value / 2**20:.1f} MiB"),
    "top1": ("Top-1 accuracy", lambda value: f"{value:.2%}"),
    "latency_ms": ("Latency", lambda value: f"{value:.2f} ms"),
}


def model_card(
    loaded: LoadedModel,
    plan: PruningPlan,
    measurements: Mapping[str, Mapping[str, float | None]],
    recipe_yaml: str | None = None,
    repo_id: str = "path/to/this/folder",
    dataset: str | None = None,
) -> str:
    """Writes the card's text.

    Args:
        loaded: The dense model.
        plan: What was removed.
        measurements: {"dense": {...}, "pruned": {...}} by name: macs, params, bytes, top1 (0..1), latency_ms; None
            where something was not measured, and then it is left out.
        recipe_yaml: The recipe of the run.
        repo_id: What the reader gives to `scap_hub.load`.
        dataset: Hub id of the data that the pruned model was trained on.
    """
    data = ModelCardData(
        license=loaded.license,
        base_model=loaded.base_model,
        library_name=None if loaded.library == "module" else loaded.library,
        pipeline_tag="image-classification",
        tags=["scap_hub", "pruning", "image-classification"],
        datasets=[dataset] if dataset else None,
    )
    origin = f", from [`{loaded.base_model}`](https://huggingface.co/{loaded.base_model})" if loaded.base_model else ""
    preprocessing = loaded.preprocessing
    text = Template(files(__package__).joinpath("card_template.md").read_text(encoding="utf-8")).substitute(
        title=f"{loaded.name}, pruned",
        origin=f"`{loaded.name}` with {loaded.num_classes} classes{origin}",
        measurements=_measurements(measurements),
        removed=_removed(plan),
        repo_id=repo_id,
        dense=", model=dense_model" if loaded.library == "module" else "",
        name=loaded.name,
        library="your own module" if loaded.library == "module" else loaded.library,
        input_size=" x ".join(map(str, preprocessing.input_size)),
        mean=_numbers(preprocessing.mean),
        std=_numbers(preprocessing.std),
        recipe=f"\n## How it was made\n\n```yaml\n{recipe_yaml.strip()}\n```" if recipe_yaml else "",
    )
    return f"---\n{data.to_yaml()}\n---\n\n{text.rstrip()}\n"


def _measurements(measurements: Mapping[str, Mapping[str, float | None]]) -> str:
    dense, pruned = measurements["dense"], measurements["pruned"]
    rows = ["| | dense | pruned | pruned / dense |", "|---|---|---|---|"]
    for key, before in dense.items():
        after = pruned.get(key)
        if before is None or after is None:
            continue
        title, show = _MEASUREMENTS.get(key, (key, lambda value: f"{value:g}"))
        share = f"{after / before:.2f}" if before else "-"
        rows.append(f"| {title} | {show(before)} | {show(after)} | {share} |")
    return "\n".join(rows)


def _removed(plan: PruningPlan) -> str:
    if not plan.groups:
        return "Nothing."
    rows = ["| channels made by | before | after |", "|---|---|---|"]
    rows += [f"| `{name}` | {cut.size} | {len(plan.kept(name))} |" for name, cut in plan.groups.items()]
    return "\n".join(rows)


def _numbers(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"
