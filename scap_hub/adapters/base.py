"""What the rest of scap_hub needs to know about a loaded model, whatever zoo it came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn


@dataclass(frozen=True)
class Preprocessing:
    """How the model wants its images.

    Attributes:
        input_size: (channels, height, width) in pixels.
        mean: Per-channel mean, on a 0..1 scale.
        std: Per-channel standard deviation, on a 0..1 scale.
        interpolation: PIL resampling by name: "nearest", "bilinear" or "bicubic".
        crop_pct: Share of the resized image that the centre crop keeps.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0


@dataclass
class LoadedModel:
    """A model with everything that is needed to feed, rebuild and publish it.

    Attributes:
        module: The model, in eval mode.
        library: The zoo it came from.
        name: timm architecture name, transformers class name, or the module's class name.
        source: What the user asked for: a name, a Hub id, a folder.
        preprocessing: How to feed it.
        num_classes: Width of the classifier, 0 where there is none.
        labels: Class names by index, None where unknown.
        config: JSON-able document to rebuild an untrained copy; layout is the adapter's own.
    """

    module: nn.Module
    library: Literal["timm", "transformers", "module"]
    name: str
    source: str
    preprocessing: Preprocessing
    num_classes: int
    labels: list[str] | None = None
    config: dict[str, Any] = field(default_factory=dict)


def logits(output: Any) -> Tensor:
    """The logits in a model's output: the tensor itself, or a transformers output's `.logits`."""
    return output if isinstance(output, Tensor) else output.logits
