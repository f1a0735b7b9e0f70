"""The entries of transformers' configs that set widths, as far as they are known here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from scap_hub.zoo.described import Shape

Shapes = Mapping[str, Shape]


def width_arguments(model_class: str, shapes: Shapes) -> dict[str, Any] | None:
    """The entries that the shapes of a model's tensors hint at; None where none are known.

    Args:
        model_class: Name of the model's class.
        shapes: By name.
    """
    guess = _FAMILIES.get(model_class)
    try:
        return guess and guess(shapes)
    except (KeyError, ValueError):  # another member of the family than the guess was written for
        return None


def _resnet(shapes: Shapes) -> dict[str, Any]:
    stem = shapes["resnet.embedder.embedder.convolution.weight"][0]
    stages = [name for name in shapes if name.startswith("resnet.encoder.stages.")]
    count = 1 + max(int(name.split(".")[3]) for name in stages)
    last = max(int(name.split(".")[7]) for name in stages if ".layers.0.layer." in name)
    path = "resnet.encoder.stages.{}.layers.0.layer.{}.convolution.weight"
    return {"embedding_size": stem, "hidden_sizes": [shapes[path.format(stage, last)][0] for stage in range(count)]}


def _convnext(shapes: Shapes) -> dict[str, Any]:
    names = [name for name in shapes if name.endswith(".layers.0.dwconv.weight")]
    return {"hidden_sizes": [shapes[name][0] for name in names]}


def _vit(shapes: Shapes) -> dict[str, Any]:
    names = (name for name in shapes if name.endswith(("mlp.fc1.weight", "intermediate.dense.weight")))
    return {"intermediate_size": shapes[next(names, "")][0]}


_FAMILIES: dict[str, Callable[[Shapes], dict[str, Any]]] = {
    "ResNetForImageClassification": _resnet,
    "ConvNextForImageClassification": _convnext,
    "ViTForImageClassification": _vit,
    "DeiTForImageClassification": _vit,
    "DeiTForImageClassificationWithTeacher": _vit,
}
