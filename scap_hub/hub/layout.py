"""The "cut" in config.json: the sizes that a plan leaves, which is all that a loader needs beside the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from scap_hub.adapters.base import LoadedModel
from scap_hub.hub.modeling_scap import VERSION
from scap_hub.plan import PruningPlan, TensorCut

# Where timm's models and heads keep the width that a new classifier is built with.
_CLASSIFIER_WIDTHS = ("num_features", "head_hidden_size", "in_features")


def cut_of(plan: PruningPlan, loaded: LoadedModel, small: nn.Module) -> dict[str, Any]:
    """Derives the cut from the plan; `modeling_scap.shrink` reads it.

    Args:
        plan: What stays.
        loaded: The dense model that the plan was made for.
        small: The pruned model.
    """
    dense = loaded.module
    saved = dense.state_dict().keys()
    shapes = {name: ",".join(_sizes(cut, plan)) for name, cut in plan.tensors.items()}
    attributes: dict[str, dict[str, Any]] = {path: dict(values) for path, values in plan.attributes.items()}
    if loaded.library == "timm":
        for path, widths in _classifier_widths(plan, dense).items():
            attributes.setdefault(path, {}).update(widths)
        attributes.setdefault("", {})["num_features"] = _feature_width(small, loaded.preprocessing.input_size)
    changed = {
        path: {
            name: value for name, value in values.items() if _plain(getattr(dense.get_submodule(path), name)) != value
        }
        for path, values in attributes.items()
    }
    buffers = {
        name: {str(dim): plan.keeps[entry] for dim, entry in cut.keep.items()}
        for name, cut in plan.tensors.items()
        if name not in saved
    }
    cut = {"version": VERSION, "shapes": shapes, "attributes": {path: new for path, new in changed.items() if new}}
    return {**cut, "buffers": buffers} if buffers else cut


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
    name = next((f"{path}.weight" for path, module in dense.named_modules() if module is classifier), "")
    cut = plan.tensors.get(name)
    if cut is None or 1 not in cut.keep:
        return {}
    old, new = cut.shape[1], len(plan.indices(cut.keep[1]))
    found: dict[str, dict[str, int]] = {}
    while "." in name:  # from the classifier's own module to the model
        name = name.rpartition(".")[0]
        module = dense.get_submodule(name.rpartition(".")[0])
        found[name.rpartition(".")[0]] = {key: new for key in _CLASSIFIER_WIDTHS if vars(module).get(key) == old}
    return found


def _feature_width(small: Any, input_size: tuple[int, int, int]) -> int:
    """Channels of a timm model's last features."""
    with torch.no_grad():
        features = small.eval().forward_features(next(small.parameters()).new_zeros(1, *input_size))
    last = features.ndim == 3 or getattr(small, "output_fmt", "NCHW") != "NCHW"
    return features.shape[-1 if last else 1]
