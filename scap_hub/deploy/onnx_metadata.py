"""What an ONNX file says of itself: how images are prepared, what classes are called, which axis is the batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from scap_hub.zoo.base import remembered

BATCH = "batch"


def describe(path: Path, model: nn.Module) -> None:
    """Writes preprocessing and class names into a file's metadata, and names its batch axis.

    The metadata are JSON under "input_size" ([channels, height, width] in pixels), "mean" and "std" (by channel, on a
    0..1 scale), "interpolation", "crop_pct" and "class_names" (by index, where they are known).

    Args:
        path: An ONNX file whose first input's first axis is the batch; changed in place.
        model: What it was exported from, as `scap_hub.load` gave it.
    """
    import onnx

    file = onnx.load(path)
    _name_batch(file.graph)
    onnx.helper.set_model_props(file, {key: json.dumps(value) for key, value in _facts(model).items()})
    onnx.save(file, path)


def _facts(model: nn.Module) -> dict[str, Any]:
    origin = remembered(model)
    if origin is None:
        return {}
    shown, labels = origin["preprocessing"], origin["labels"]
    names = ("input_size", "mean", "std", "interpolation", "crop_pct")
    return {**{name: getattr(shown, name) for name in names}, **({"class_names": labels} if labels else {})}


def _name_batch(graph: Any) -> None:
    """The exporter numbers its symbols; whoever reads the file wants to know which axis may be of any size."""
    old = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if old and dim.dim_param == old:
                dim.dim_param = BATCH
