"""The "cut" in config.json: the sizes that a plan leaves, which is all that a loader needs beside the weights."""

from __future__ import annotations

from typing import Any

from scap_hub.plan import PruningPlan
from scap_hub.zoo.base import LoadedModel
from scap_hub.zoo.modeling_scap import VERSION


def cut_of(plan: PruningPlan, loaded: LoadedModel) -> dict[str, Any]:
    """Derives the cut from the plan; `modeling_scap.shrink` reads it.

    Args:
        plan: What stays of the dense model, in all rounds.
        loaded: The model that the last round was made for.
    """
    dense = loaded.module
    saved = dense.state_dict().keys()
    shapes = {name: ",".join(_sizes(name, plan)) for name in plan.tensors}
    earlier = loaded.earlier.attributes if loaded.earlier else {}
    # config.json keeps the dense sizes: the zoo builds the dense model from them.
    changed = {
        path: {
            name: value
            for name, value in values.items()
            if not name.startswith("config.")
            and (name in earlier.get(path, {}) or _plain(getattr(dense.get_submodule(path), name)) != value)
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


def _sizes(name: str, plan: PruningPlan) -> list[str]:
    sizes = zip(plan.left(name), plan.tensors[name].shape, strict=True)
    return [str(left) if left != size else "*" for left, size in sizes]


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [item["num_chs"] if isinstance(item, dict) else item for item in value]
    return value
