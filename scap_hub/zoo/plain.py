"""Any other nn.Module: it can be pruned and saved, but only its owner can build it again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from scap_hub.errors import ModelError
from scap_hub.placement import placement
from scap_hub.text import one_line
from scap_hub.zoo.base import LoadedModel, Pixels, Preprocessing, Zoo, default_preprocessing
from scap_hub.zoo.described import Widths
from scap_hub.zoo.timm.widths import TimmFeatures, timm_features, timm_widths
from scap_hub.zoo.transformers.zoo import TransformersZoo

TORCHVISION = "torchvision.models.detection."
"""Where torchvision's detectors are."""


def torchvision_detector(module: nn.Module) -> str | None:
    """Which of torchvision's kinds of detectors a module is; None if it is none."""
    kinds = (kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith(TORCHVISION))
    return next((kind for kind in kinds if kind in ("GeneralizedRCNN", "RetinaNet", "SSD", "FCOS")), None)


class PlainZoo(Zoo):
    """Modules that no other zoo knows."""

    name = "module"
    rebuilds = False

    def knows_module(self, module: nn.Module) -> bool:
        """Always."""
        return True

    def from_module(self, module: nn.Module, source: str, input_size: tuple[int, int, int] | None) -> LoadedModel:
        """Describes a module by running it once on an image of zeros.

        Args:
            module: Takes images (N, C, H, W). Where it returns a tensor (N, classes), alone or as `logits`, it is a
                classifier.
            source: What the user asked for.
            input_size: (C, H, W) in pixels; by default as many channels as its first convolution takes, 224 x 224.

        Raises:
            ModelError: The module does not run on such an image.
        """
        if input_size is None:
            convolutions = (m.in_channels for m in module.modules() if isinstance(m, nn.Conv2d))
            input_size = (next(convolutions, 3), 224, 224)
        name = type(module).__name__
        device, dtype = placement(module)
        try:
            with torch.no_grad():
                returned = module.eval()(torch.zeros(1, *input_size, device=device, dtype=dtype))
        except Exception as error:
            raise ModelError(
                f"{name} does not run on one image {input_size}: {one_line(error)}; set input_size"
            ) from error
        output = getattr(returned, "logits", returned)
        is_logits = isinstance(output, Tensor) and output.ndim == 2
        return LoadedModel(
            module=module,
            zoo=self,
            name=name,
            source=source,
            preprocessing=_preprocessing(module, input_size),
            num_classes=output.shape[1] if is_logits else 0,
        )

    def task(self, module: nn.Module) -> str | None:
        """Known of torchvision's detectors."""
        return "object-detection" if torchvision_detector(module) else None

    def pixels(self, loaded: LoadedModel) -> Pixels | None:
        """Those of the image processor of a transformers model that its owner has changed."""
        return TransformersZoo().pixels(loaded)

    def describe(
        self,
        module: nn.Module,
        config: dict[str, Any],
        processor: dict[str, Any] | None,
        source: str,
        input_size: tuple[int, int, int] | None,
    ) -> LoadedModel:
        """What our entry says of the module; its owner alone can build it."""
        entry = config["scap"]
        return LoadedModel(
            module=module,
            zoo=self,
            name=type(module).__name__,
            source=source,
            preprocessing=_preprocessing(module, input_size or (3, 224, 224)),
            num_classes=entry.get("num_classes", 0),
            labels=entry.get("labels"),
            config={"reason": entry["reason"]} if "reason" in entry else {},
            image_processor=processor,
        )

    def rebuild(self, config: dict[str, Any]) -> nn.Module:
        """Never: only its owner can.

        Raises:
            ModelError: Always, with what is known of why.
        """
        reason = config.get("reason", "it comes from no zoo")
        raise ModelError(f"the model cannot be built by name ({reason}): pass the dense one, load(folder, model=dense)")

    def write_config(
        self,
        config: dict[str, Any],
        entry: dict[str, Any],
        cut: dict[str, Any] | None,
        loaded: LoadedModel,
        model: nn.Module,
    ) -> dict[str, Any]:
        """Our entry holds all that is known."""
        return {"scap": {**entry, "num_classes": loaded.num_classes, "labels": loaded.labels, "cut": cut, **config}}

    def dense_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """Our entry, which may say why the model cannot be rebuilt."""
        return config["scap"]

    def features(self, model: nn.Module, inputs: tuple[Any, ...]) -> TimmFeatures:
        """The shapes that timm's conventions describe, which many follow in models of their own."""
        return timm_features(model, inputs)

    def widths(self, model: nn.Module, dense: Any, small: Any) -> Widths:
        """By timm's conventions."""
        return timm_widths(model, dense, small)


def _preprocessing(module: nn.Module, input_size: tuple[int, int, int]) -> Preprocessing:
    """The usual one; torchvision's detectors normalise images themselves."""
    if torchvision_detector(module) is None:
        return default_preprocessing(input_size)
    return Preprocessing(input_size, (0.0,) * input_size[0], (1.0,) * input_size[0])
