"""The "cut" in config.json: the sizes that a plan leaves, which is all that a loader needs beside the weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from scap_hub.adapters.base import Library
from scap_hub.hub.modeling_scap import VERSION
from scap_hub.plan import PruningPlan, TensorCut

# Where timm keeps the width that a new classifier is built with.
_TIMM_WIDTHS = ("num_features", "head_hidden_size", "in_features")


def cut_of(plan: PruningPlan, dense: nn.Module, library: Library) -> dict[str, Any]:
    """Derives the cut from the plan; `modeling_scap.shrink` reads it.

    Args:
        plan: What stays.
        dense: The model that the plan was made for.
        library: Where it comes from.
    """
    saved = dense.state_dict().keys()
    shapes = {name: ",".join(_sizes(cut, plan)) for name, cut in plan.tensors.items()}
    attributes = {}
    for path, values in plan.attributes.items():
        old = vars(dense.get_submodule(path))
        if changed := {name: value for name, value in values.items() if _plain(old[name]) != value}:
            attributes[path] = changed
    if library == "timm":
        attributes.update(_classifier_widths(plan, dense))
    buffers = {
        name: {str(dim): plan.keeps[entry] for dim, entry in cut.keep.items()}
        for name, cut in plan.tensors.items()
        if name not in saved
    }
    return {"version": VERSION, "shapes": shapes, "attributes": attributes, **({"buffers": buffers} if buffers else {})}


def _sizes(cut: TensorCut, plan: PruningPlan) -> list[str]:
    sizes = {dim: len(plan.indices(entry)) for dim, entry in cut.keep.items()}
    if cut.blocks is not None:
        sizes[1] = len(plan.indices(cut.blocks[0]))
    return [str(sizes[dim]) if sizes.get(dim, size) != size else "*" for dim, size in enumerate(cut.shape)]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _classifier_widths(plan: PruningPlan, dense: Any) -> dict[str, dict[str, int]]:
    """What timm's `reset_classifier` has to know, where the width of the features shrank."""
    classifier = dense.get_classifier() if hasattr(dense, "get_classifier") else None
    name = next((f"{path}.weight" for path, module in dense.named_modules() if module is classifier), None)
    cut = plan.tensors.get(name or "")
    if cut is None or 1 not in cut.keep:
        return {}
    old, new = cut.shape[1], len(plan.indices(cut.keep[1]))
    found = {}
    for path, module in dense.named_modules():
        inside = name.startswith(f"{path}." if path else "") and module is not classifier
        widths = {key: new for key in _TIMM_WIDTHS if inside and vars(module).get(key) == old}
        if widths:
            found[path] = widths
    return found
