"""What an ONNX file says of itself: how images are prepared, what classes are called, which axis is the batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from scap_hub.zoo.base import remembered

_AXES = {0: "batch", 2: "height", 3: "width"}
MULTIPLE = "size_multiple"


def describe(path: Path, model: nn.Module, multiple: int | None = None) -> None:
    """Writes preprocessing and class names into a file's metadata, and names the axes that may be of any size.

    The metadata are JSON under "input_size" ([channels, height, width] in pixels), "mean" and "std" (by channel, on a
    0..1 scale), "interpolation", "crop_pct", "class_names" (by index, where they are known) and "size_multiple" (what
    height and width must be multiples of; only in a file that takes other sizes than "input_size").

    Args:
        path: An ONNX file whose first input's first axis is the batch; changed in place.
        model: What it was exported from, as `scap_hub.load` gave it.
        multiple: See "size_multiple".
    """
    import onnx

    file = onnx.load(path)
    _name_axes(file.graph)
    facts = {**_facts(model), **({} if multiple is None else {MULTIPLE: multiple})}
    onnx.helper.set_model_props(file, {key: json.dumps(value) for key, value in facts.items()})
    onnx.save(file, path)


def size_multiple(path: Path) -> int | None:
    """What heights and widths of images for an ONNX file of ours must be multiples of; None where it takes one size."""
    import onnx

    found = {entry.key: entry.value for entry in onnx.load(path, load_external_data=False).metadata_props}
    return int(found[MULTIPLE]) if MULTIPLE in found else None


def _facts(model: nn.Module) -> dict[str, Any]:
    origin = remembered(model)
    if origin is None:
        return {}
    shown, labels = origin["preprocessing"], origin["labels"]
    names = ("input_size", "mean", "std", "interpolation", "crop_pct")
    return {**{name: getattr(shown, name) for name in names}, **({"class_names": labels} if labels else {})}


def _name_axes(graph: Any) -> None:
    """The exporter numbers its symbols; whoever reads the file wants to know which axes may be of any size."""
    own = graph.input[0].type.tensor_type.shape.dim
    names = {own[axis].dim_param: name for axis, name in _AXES.items() if axis < len(own) and own[axis].dim_param}
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]
