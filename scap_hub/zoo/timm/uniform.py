"""The arguments of timm's constructors that set widths, as far as they are known here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from scap_hub.zoo.described import Shape

Shapes = Mapping[str, Shape]


def width_arguments(family: str, shapes: Shapes) -> dict[str, Any] | None:
    """The arguments that the shapes of a model's tensors hint at; None where none are known.

    Args:
        family: Name of the model's class.
        shapes: By name.
    """
    guess = _FAMILIES.get(family)
    try:
        return guess and guess(shapes)
    except (KeyError, ZeroDivisionError):  # another member of the family than the guess was written for
        return None


def _resnet(shapes: Shapes) -> dict[str, Any]:
    """Widths of the stages; of a bottleneck also how wide its middle is in proportion."""
    stages = range(1, 5)
    last = "conv3" if "layer1.0.conv3.weight" in shapes else "conv2"
    outer = [shapes[f"layer{stage}.0.{last}.weight"][0] for stage in stages]
    if last == "conv2":
        return {"channels": outer}
    planes = [width // 4 for width in outer]
    inner = shapes["layer1.0.conv1.weight"][0]
    return {"channels": planes, "base_width": round(64 * inner / planes[0])}


def _convnext(shapes: Shapes) -> dict[str, Any]:
    return {"dims": [shapes[f"stages.{stage}.blocks.0.conv_dw.weight"][0] for stage in range(4)]}


def _vit(shapes: Shapes) -> dict[str, Any]:
    hidden, width = shapes["blocks.0.mlp.fc1.weight"]
    return {"embed_dim": width, "mlp_ratio": hidden / width}


_FAMILIES: dict[str, Callable[[Shapes], dict[str, Any]]] = {
    "ResNet": _resnet,
    "ConvNeXt": _convnext,
    "VisionTransformer": _vit,
}
