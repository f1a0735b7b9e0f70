"""Object detection by torchvision's detectors, which choose boxes themselves: Faster R-CNN, RetinaNet, SSD, FCOS."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from scap_hub.errors import DataError
from scap_hub.placement import fed
from scap_hub.tasks.base import Task
from scap_hub.tasks.detection import ObjectDetection
from scap_hub.zoo.base import LoadedModel
from scap_hub.zoo.plain import TORCHVISION, torchvision_detector


class Chosen(NamedTuple):
    """What a detector says of a batch.

    Attributes:
        images: For each image "boxes" (n, 4), corners in pixels, "labels" int64 (n,) and "scores" (n,); none in
            training mode.
        own_loss: The sum of the losses that the model computed from the targets; None where it was not told them.
    """

    images: list[dict[str, Tensor]]
    own_loss: Tensor | None = None


@dataclass(frozen=True)
class WholeDetection(ObjectDetection):
    """Targets are what torchvision's own training takes: for each image "boxes", corners in pixels, and "labels".

    Attributes:
        background: Whether number 0 is no class, but the background.
    """

    background: bool = False

    by_distance: ClassVar[bool] = False
    by_part: ClassVar[bool] = True

    def fitted(self, loaded: LoadedModel) -> Task:
        """With the model's number of classes, as far as it tells."""
        kind = torchvision_detector(loaded.module)
        return WholeDetection(_classes(loaded.module), kind in ("GeneralizedRCNN", "SSD"))

    def class_names(self, feature: Any) -> list[str] | None:
        """None: nothing says which number a name has in the model."""
        return None

    def check(self, targets: Any, num_classes: int, where: str) -> None:
        """Makes sure that classes are those of the model."""
        super().check(targets, self.classes or num_classes, where)
        if len(targets) and int(targets.min()) < self.background:
            raise DataError(
                f"category {int(targets.min())} of an object in {where} is the background for this model: count "
                "classes from 1"
            )

    def join(self, targets: Sequence[Any]) -> list[dict[str, Tensor]]:
        """A dictionary for each image."""
        return [{"boxes": own["boxes"].as_subclass(Tensor).float(), "labels": own["labels"]} for own in targets]

    def given(self, targets: Any, images: int, num_classes: int, where: str) -> list[dict[str, Tensor]]:
        """As torchvision's references make them; what they hold beside, such as masks, is handed on."""
        if not isinstance(targets, Sequence) or len(targets) != images or not all(map(_is_target, targets)):
            raise DataError(
                f"the targets of {where} are not, for each of {images} images, a dictionary of boxes (n, 4), corners "
                "in pixels, and labels (n,), integers; without such, set data.labels=false"
            )
        for target in targets:
            self.check(target["labels"], num_classes, where)
            _check_boxes(target["boxes"], where)
        return [dict(target) for target in targets]

    def output(self, model: nn.Module, images: Tensor) -> Chosen:  # type: ignore[override]
        """See `Chosen`; in eval mode."""
        return Chosen(model(list(fed(model, images))))

    def output_for(self, model: nn.Module, images: Tensor, targets: Any) -> Chosen:  # type: ignore[override]
        """With the model's own losses, which it computes in training mode."""
        if targets is None:
            return self.output(model, images)
        if model.training:
            return Chosen([], sum(model(list(fed(model, images)), targets).values()))
        with _computing_losses(model, images.device):
            losses = model(list(fed(model, images)), targets)
        return Chosen(self.output(model, images).images, sum(losses.values()))

    def distance(self, output: Any, guide: Any, temperature: float) -> Tensor:
        """There is none: boxes that were chosen say nothing of those that were not."""
        raise DataError("a whole detector learns from targets alone: fine-tune it without a teacher")

    def found(self, output: Any) -> list[dict[str, Tensor]]:
        """The boxes that were chosen."""
        return output.images

    def true(self, targets: Any) -> list[dict[str, Tensor]]:
        """The same of the targets."""
        return [{"labels": own["labels"], "boxes": own["boxes"]} for own in targets]


def _classes(model: nn.Module) -> int:
    """How many numbers of classes a detector knows, the background's included; 0 if it does not tell."""
    places = (
        ("roi_heads.box_predictor.cls_score", "out_features"),
        ("head.classification_head", "num_classes"),
        ("head.classification_head", "num_columns"),
    )
    modules = dict(model.named_modules())
    return next((getattr(modules[path], name) for path, name in places if hasattr(modules.get(path), name)), 0)


def _is_target(target: Any) -> bool:
    if not isinstance(target, Mapping) or not {"boxes", "labels"} <= target.keys():
        return False
    boxes, labels = target["boxes"], target["labels"]
    if not isinstance(boxes, Tensor) or not isinstance(labels, Tensor) or labels.is_floating_point():
        return False
    return boxes.is_floating_point() and boxes.shape == (*labels.shape, 4) and labels.ndim == 1


def _check_boxes(boxes: Tensor, where: str) -> None:
    wrong = (boxes[:, 2:] <= boxes[:, :2]).any(1) | ~boxes.isfinite().all(1)
    if wrong.any():
        box = [round(value, 2) for value in boxes[wrong][0].tolist()]
        raise DataError(
            f"box {box} of an image of {where}, read as left, top, right, bottom, is empty: give corners, not widths "
            "and heights (torchvision.ops.box_convert), and leave out boxes without area"
        )
    if len(boxes) and boxes.max() <= 1:
        raise DataError(
            f"the boxes of an image of {where} are all within 0 and 1: give pixels, not shares of the image"
        )


@contextlib.contextmanager
def _computing_losses(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Training mode for what computes losses alone; norms and dropout stay as they are, and so do random numbers."""
    parts = [module for module in model.modules() if module.training is False and _computes_losses(module)]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)  # it draws the boxes that it compares
        for module in parts:
            module.training = True
        try:
            yield
        finally:
            for module in parts:
                module.training = False


def _computes_losses(module: nn.Module) -> bool:
    kinds = [kind for kind in type(module).__mro__ if kind.__module__.startswith(TORCHVISION)]
    return any(kind.__name__ != "GeneralizedRCNNTransform" for kind in kinds)
