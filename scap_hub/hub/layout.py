"""The "cut" in config.json: the sizes that a plan leaves, which is all that a loader needs beside the weights."""

from __future__ import annotations

from typing import Any

from scap_hub.plan import PruningPlan, TensorCut
from scap_hub.zoo.base import LoadedModel
from scap_hub.zoo.modeling_scap import VERSION


def cut_of(plan: PruningPlan, loaded: LoadedModel) -> dict[str, Any]:
    """Derives the cut from the plan; `modeling_scap.shrink` reads it.

    Args:
        plan: What stays.
        loaded: The dense model that the plan was made for.
    """
    dense = loaded.module
    saved = dense.state_dict().keys()
    shapes = {name: ",".join(_sizes(cut, plan)) for name, cut in plan.tensors.items()}
    # config.json keeps the dense sizes: the zoo builds the dense model from them.
    changed = {
        path: {
            name: value
            for name, value in values.items()
            if not name.startswith("config.") and _plain(getattr(dense.get_submodule(path), name)) != value
        }
        for path, values in plan.attributes.items()
    }
    buffers = {
        name: {str(dim): plan.keeps[entry] for dim, entry in cut.keep.items()}
        for name, cut in plan.tensors.items()
        if name not in saved
    }
    cut = {"version": VERSION, "shapes": shapes, "attributes": {path: new for path, new in changed.items() if new}}
    calls = {path: [list(dict(change).values()) for change in changes] for path, changes in plan.calls.items()}
    return {**cut, **({"buffers": buffers} if buffers else {}), **({"calls": calls} if calls else {})}


def _sizes(cut: TensorCut, plan: PruningPlan) -> list[str]:
    sizes = {dim: len(plan.indices(entry)) for dim, entry in cut.keep.items()}
    if cut.blocks is not None:
        sizes[1] = len(plan.indices(cut.blocks[0]))
    return [str(sizes[dim]) if sizes.get(dim, size) != size else "*" for dim, size in enumerate(cut.shape)]


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [item["num_chs"] if isinstance(item, dict) else item for item in value]
    return value
