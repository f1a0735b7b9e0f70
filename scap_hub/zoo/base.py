"""What the rest of scap_hub needs to know about a loaded model, whatever zoo it came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Library = Literal["timm", "transformers", "module"]


@dataclass(frozen=True)
class Preprocessing:
    """How the model wants its images.

    Attributes:
        input_size: (channels, height, width) in pixels.
        mean: Per-channel mean, on a 0..1 scale.
        std: Per-channel standard deviation, on a 0..1 scale.
        interpolation: PIL resampling by name: "nearest", "bilinear" or "bicubic".
        crop_pct: Share of the resized image that the centre crop keeps.
        crop_mode: "center" keeps the aspect ratio and crops, "squash" resizes straight to the input size.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"


@dataclass
class LoadedModel:
    """A model with everything that is needed to feed, rebuild and publish it.

    Attributes:
        module: The model, in eval mode.
        library: The zoo that can rebuild it; "module" where only its owner can.
        name: timm architecture name, transformers class name, or the module's class name.
        source: What the user asked for: a name, a Hub id, a folder.
        preprocessing: How to feed it.
        num_classes: Width of the classifier, 0 where there is none.
        labels: Class names by index, None where unknown.
        config: JSON-able document to rebuild an untrained copy, in the zoo's own config.json layout.
        image_processor: The transformers image processor's JSON-able document, None where there is none.
        base_model: Hub id of the pretrained weights, None where there are none.
        license: Licence of those weights, None where unknown.
    """

    module: nn.Module
    library: Library
    name: str
    source: str
    preprocessing: Preprocessing
    num_classes: int
    labels: list[str] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    image_processor: dict[str, Any] | None = None
    base_model: str | None = None
    license: str | None = None


def logits(output: Any) -> Tensor:
    """The logits in a model's output: the tensor itself, or a transformers output's `.logits`."""
    return output if isinstance(output, Tensor) else output.logits


def default_preprocessing(input_size: tuple[int, int, int]) -> Preprocessing:
    """ImageNet statistics for colour images; 0.5 for any other number of channels."""
    channels = input_size[0]
    if channels == 3:
        return Preprocessing(input_size, IMAGENET_MEAN, IMAGENET_STD)
    return Preprocessing(input_size, (0.5,) * channels, (0.5,) * channels)


def first_difference(one: nn.Module, other: nn.Module) -> str | None:
    """Names the first layer, in eval mode, that differs in type, settings or tensor shapes; None if none does."""
    ours, theirs = _structure(one), _structure(other)
    for path in {**ours, **theirs}:
        if ours.get(path) != theirs.get(path):
            return path or type(one).__name__
    return None


def _structure(module: nn.Module) -> dict[str, object]:
    tensors = lambda m: [*m.named_parameters(recurse=False), *m.named_buffers(recurse=False)]  # noqa: E731
    return {
        path: (type(m), m.extra_repr(), [(name, tuple(tensor.shape)) for name, tensor in tensors(m)])
        for path, m in module.named_modules()
        # They do nothing in eval mode, and their rates are no part of the architecture.
        if not isinstance(m, (nn.Identity, nn.Dropout, nn.Dropout2d)) and type(m).__name__ != "DropPath"
    }


def one_line(error: Exception) -> str:
    """The first line of an error that somebody else raised."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
