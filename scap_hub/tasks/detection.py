"""Object detection by sets of boxes: the DETR family, RT-DETR, D-FINE, YOLOS."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.ops import box_convert, generalized_box_iou
from torchvision.transforms.v2 import functional as transforms

from scap_hub.errors import DataError, ModelError
from scap_hub.placement import fed
from scap_hub.tasks.base import Meter, Metric, Task
from scap_hub.tasks.placed import PlacedTask, takes
from scap_hub.zoo.base import LoadedModel

_CATEGORIES = ("category", "categories", "category_id", "label", "labels", "class")
_SLACK = 1.0
"""Pixels that a box may reach out of its image: annotations are rounded."""
_BOX, _OVERLAP = 5.0, 2.0
"""Weights of box distances beside those of classes, as in DETR (arXiv 2005.12872)."""


class Detected(NamedTuple):
    """What a model says of a batch.

    Attributes:
        logits: float32 (N, queries, classes), or one class more, "nothing", at the end.
        boxes: float32 (N, queries, 4): centre, width and height, as shares of the image.
        own_loss: What the model computed from the targets itself; None where it was not told them.
    """

    logits: Tensor
    boxes: Tensor
    own_loss: Tensor | None = None


@dataclass(frozen=True)
class ObjectDetection(PlacedTask):
    """Targets are, for each image, "class_labels", int64 (n,), and "boxes", (n, 4), as `Detected` has them.

    Attributes:
        classes: How many the model has; 0 where it is unknown.
    """

    classes: int = 0

    name: ClassVar[str] = "object-detection"
    by_distance: ClassVar[bool] = True
    metric: ClassVar[Metric] = Metric("map", "mAP", "Mean average precision", "mean_average_precision")
    others: ClassVar[tuple[Metric, ...]] = (Metric("map_50", "mAP50", "mAP at IoU 0.5", "mean_average_precision"),)
    wanted: ClassVar[str] = "objects: for each image lists `bbox` (COCO's x, y, width, height in pixels) and `category`"
    names: ClassVar[tuple[str, ...]] = ("objects", "annotations", "annotation")

    def fitted(self, loaded: LoadedModel) -> Task:
        """With the model's number of classes."""
        return ObjectDetection(loaded.num_classes)

    def holds(self, kind: str) -> bool:
        """A dictionary of lists, or a list of dictionaries."""
        return kind in ("dict", "List", "Sequence", "LargeList")

    def class_names(self, feature: Any) -> list[str] | None:
        """Those of the categories."""
        inside = feature if isinstance(feature, Mapping) else getattr(feature, "feature", None)
        if not isinstance(inside, Mapping):
            return None
        category = inside.get(next((name for name in _CATEGORIES if name in inside), ""))
        return getattr(getattr(category, "feature", category), "names", None)

    def read(self, value: Any, size: tuple[int, int], num_classes: int, where: str) -> dict[str, Tensor]:
        """Boxes, `tv_tensors.BoundingBoxes` from corner to corner, and classes, int64."""
        boxes, classes = _lists(value, where)
        self.check(classes, num_classes, where)
        height, width = size
        left, top, wide, high = boxes.unbind(1)
        wrong = (wide < 0) | (high < 0) | (left < -_SLACK) | (top < -_SLACK)
        wrong |= (left + wide > width + _SLACK) | (top + high > height + _SLACK)
        if wrong.any():
            raise DataError(_misplaced(boxes, int(wrong.nonzero()[0]), size, where))
        if len(boxes) and boxes.max() <= 1 and min(size) > 1:
            raise DataError(
                f"the boxes of an image of {where} are all within 0 and 1, and the image is {width} x {height} pixels: "
                "give x, y, width and height in pixels, not shares of the image"
            )
        corners = box_convert(boxes, "xywh", "xyxy")
        return self.moved({"boxes": tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=size),
                           "labels": classes})  # fmt: skip

    def check(self, targets: Any, num_classes: int, where: str) -> None:
        """Makes sure that classes are within 0..num_classes - 1."""
        if len(targets) and num_classes and not 0 <= int(targets.min()) <= int(targets.max()) < num_classes:
            wrong = int(targets.min()) if int(targets.min()) < 0 else int(targets.max())
            raise DataError(
                f"category {wrong} of an object in {where} is outside the model's range 0..{num_classes - 1}; for a "
                "new head set model.num_classes and finetune.dense_epochs"
            )

    def renumbered(self, targets: Any, numbers: Tensor) -> Any:
        """See `Task.renumbered`; of one image, or of a batch."""
        if isinstance(targets, Mapping):
            key = "labels" if "labels" in targets else "class_labels"
            return {**targets, key: numbers.to(targets[key].device)[targets[key]]}
        return [self.renumbered(target, numbers) for target in targets]

    def moved(self, target: Any) -> Any:
        """Boxes cut off at the border, without those that nothing is left of."""
        boxes = transforms.clamp_bounding_boxes(target["boxes"])
        there = (boxes[:, 2:] > boxes[:, :2]).all(1)
        return {"boxes": tv_tensors.wrap(boxes[there], like=boxes), "labels": target["labels"][there]}

    def join(self, targets: Sequence[Any]) -> list[dict[str, Tensor]]:
        """A dictionary for each image."""
        joined = []
        for target in targets:
            height, width = target["boxes"].canvas_size
            corners = target["boxes"].as_subclass(Tensor).float() / torch.tensor([width, height, width, height])
            joined.append({"class_labels": target["labels"], "boxes": box_convert(corners, "xyxy", "cxcywh")})
        return joined

    def given(self, targets: Any, images: int, num_classes: int, where: str) -> list[dict[str, Tensor]]:
        """As transformers' image processors make them."""
        if not isinstance(targets, Sequence) or len(targets) != images or not all(
            isinstance(target, Mapping) and {"class_labels", "boxes"} <= target.keys() for target in targets
        ):  # fmt: skip
            raise DataError(
                f"the targets of {where} are not, for each of {images} images, a dictionary of class_labels (n,) and "
                "boxes (n, 4): centre, width and height as shares of the image"
            )
        found = [_as_tensors(target, where) for target in targets]
        for target in found:
            if target["boxes"].shape != (len(target["class_labels"]), 4):
                raise DataError(
                    f"an image of {where} has {len(target['class_labels'])} class_labels and boxes of shape "
                    f"{tuple(target['boxes'].shape)}: give four numbers for each"
                )
            self.check(target["class_labels"], num_classes, where)
            if len(target["boxes"]) and not 0 <= target["boxes"].min() <= target["boxes"].max() <= 1:
                raise DataError(f"boxes of {where} are not within 0 and 1: give centre, width and height as shares")
        return found

    def output(self, model: nn.Module, images: Tensor) -> Detected:
        """See `Detected`."""
        return _detected(model(fed(model, images)))

    def output_for(self, model: nn.Module, images: Tensor, targets: Any) -> Detected:
        """With the model's own loss."""
        if targets is None:
            return self.output(model, images)
        if not takes(model, "labels"):
            raise ModelError(
                f"{type(model).__name__} computes no loss from labels=: give a Task of your own that does, or set "
                "data.labels=false"
            )
        result = model(fed(model, images), labels=targets)
        return _detected(result, result.loss.float())

    def loss(self, output: Detected, targets: Any, label_smoothing: float = 0.0) -> Tensor:
        """The model's own."""
        assert output.own_loss is not None, "output_for has it"
        return output.own_loss

    def distance(self, output: Detected, guide: Detected, temperature: float) -> Tensor:
        """Distance of classes and boxes of queries that say most nearly the same, weighted by what the teacher sees."""
        parts = [self._image_distance(*image) for image in zip(*output[:2], *guide[:2], strict=True)]
        return torch.stack(parts).mean()

    def _image_distance(self, logits: Tensor, boxes: Tensor, their_logits: Tensor, their_boxes: Tensor) -> Tensor:
        own, other = self._probabilities(logits), self._probabilities(their_logits)
        with torch.no_grad():
            cost = torch.cdist(own, other, p=1) + _BOX * torch.cdist(boxes, their_boxes, p=1)
            mine, theirs = (torch.as_tensor(index) for index in linear_sum_assignment(cost.cpu().nan_to_num(1e3)))
        if self.has_nothing(logits):
            soft, target = logits[mine].log_softmax(1), their_logits[theirs].log_softmax(1)
            classes = F.kl_div(soft, target, reduction="batchmean", log_target=True)
        else:
            wanted = other[theirs]
            entropy = F.binary_cross_entropy(wanted, wanted, reduction="none")
            said = F.binary_cross_entropy_with_logits(logits[mine], wanted, reduction="none")
            classes = (said - entropy).sum(1).mean()
        seen = other[theirs][:, : self.classes or None].amax(1)
        corners, their_corners = (box_convert(x, "cxcywh", "xyxy") for x in (boxes[mine], their_boxes[theirs]))
        apart = _BOX * (boxes[mine] - their_boxes[theirs]).abs().sum(1)
        apart = apart + _OVERLAP * (1 - generalized_box_iou(corners, their_corners).diagonal())
        return classes + (seen * apart).sum() / seen.sum().clamp(min=1e-6)

    def has_nothing(self, logits: Tensor) -> bool:
        """Whether the last class is "nothing", so that classes exclude each other."""
        return bool(self.classes) and logits.shape[-1] == self.classes + 1

    def _probabilities(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1) if self.has_nothing(logits) else logits.sigmoid()

    def found(self, output: Detected) -> list[dict[str, Tensor]]:
        """Scores, labels and boxes (corners, shares of the image) of each image, as transformers' processors do it."""
        probabilities, count = self._probabilities(output.logits), output.logits.shape[1]
        boxes = box_convert(output.boxes, "cxcywh", "xyxy")
        if self.has_nothing(output.logits):
            scores, labels = probabilities[..., :-1].max(-1)
        else:
            scores, index = probabilities.flatten(1).topk(min(count, probabilities[0].numel()))
            labels, query = index % probabilities.shape[2], index // probabilities.shape[2]
            boxes = boxes.gather(1, query[..., None].expand(-1, -1, 4))
        return [
            {"scores": own[0], "labels": own[1], "boxes": own[2]} for own in zip(scores, labels, boxes, strict=True)
        ]

    def true(self, targets: Any) -> list[dict[str, Tensor]]:
        """Labels and boxes of the targets, as `found` has them."""
        return [
            {"labels": own["class_labels"], "boxes": box_convert(own["boxes"], "cxcywh", "xyxy")} for own in targets
        ]

    def meter(self, device: torch.device) -> Meter:
        """See `Task.meter`."""
        return _Precision(self)


def _as_tensors(target: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """Classes, int64, and boxes, float32. `torch.tensor([])`, of an image without objects, is neither."""
    classes, boxes = (torch.as_tensor(target[key]) for key in ("class_labels", "boxes"))
    if classes.is_floating_point() and (uneven := classes % 1 != 0).any():
        raise DataError(f"class_labels of {where} are fractions, such as {classes[uneven][0]:g}: give integers")
    return {"class_labels": classes.long(), "boxes": boxes.float() if boxes.numel() else boxes.new_zeros(0, 4).float()}


def _lists(value: Any, where: str) -> tuple[Tensor, Tensor]:
    """Boxes, float32 (n, 4), and classes, int64 (n,), of one image."""
    keys = () if isinstance(value, Mapping) or not value else value[0]
    rows = value if isinstance(value, Mapping) else {key: [row[key] for row in value] for key in keys}
    key = next((name for name in _CATEGORIES if name in rows), None)
    if not len(rows):
        return torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
    if "bbox" not in rows or key is None:
        raise DataError(f"the objects of {where} have {', '.join(map(str, rows))}, and not bbox and category")
    wrong = next((box for box in rows["bbox"] if not _is_box(box)), None)
    if wrong is not None:
        raise DataError(f"box {wrong} of an image of {where} is not four finite numbers: x, y, width, height")
    boxes, classes = np.asarray(rows["bbox"], dtype=np.float32).reshape(-1, 4), np.asarray(rows[key])
    crowds = rows.get("iscrowd") or [False] * len(boxes)
    for name, values in (("categories", classes), ("values of iscrowd", crowds)):
        if len(values) != len(boxes):
            raise DataError(f"an image of {where} has {len(boxes)} boxes and {len(values)} {name}")
    if len(classes) and classes.dtype.kind not in "iu":
        raise DataError(f"the categories of {where} are {classes.dtype}, not class numbers")
    single = ~np.asarray(crowds, dtype=bool)  # the others are left out, as by transformers' image processors
    return torch.from_numpy(boxes[single]), torch.from_numpy(classes[single].astype(np.int64))


def _is_box(box: Any) -> bool:
    whole = isinstance(box, Sequence | np.ndarray) and len(box) == 4
    return whole and all(isinstance(value, int | float | np.number) and math.isfinite(value) for value in box)


def _misplaced(boxes: Tensor, which: int, size: tuple[int, int], where: str) -> str:
    """What to say of a box that is no box of an image of this size."""
    box = [round(value, 2) for value in boxes[which].tolist()]
    height, width = size
    limits = torch.tensor([width, height, width, height]) + _SLACK
    as_corners = bool((boxes[:, 2:] >= boxes[:, :2]).all() and (boxes >= -_SLACK).all() and (boxes <= limits).all())
    hint = "; it would fit as two corners, and COCO's form is x, y, width, height" if as_corners else ""
    return (
        f"box {box} of an image of {where}, read as x, y, width, height, is not within its {width} x {height} pixels"
        f"{hint}: give boxes in COCO's form"
    )


def _detected(result: Any, own_loss: Tensor | None = None) -> Detected:
    logits, boxes = getattr(result, "logits", None), getattr(result, "pred_boxes", None)
    if not isinstance(logits, Tensor) or not isinstance(boxes, Tensor):
        raise ModelError(
            f"the model returns a {type(result).__name__} without `logits` and `pred_boxes`: give a Task of your own, "
            "or task='outputs'"
        )
    return Detected(logits.float(), boxes.float(), own_loss)


def _on_cpu(image: Mapping[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: image[name].cpu() for name in names}


class _Precision(Meter):
    """Mean average precision, by torchmetrics, over the detections of all processes."""

    def __init__(self, task: ObjectDetection) -> None:
        try:
            from torchmetrics.detection import MeanAveragePrecision

            self.metric = MeanAveragePrecision(sync_on_compute=False)
            self.metric.warn_on_many_detections = False  # more than 100 queries are usual, and COCO counts the best 100
        except ImportError:
            raise ModelError(
                "mean average precision needs torchmetrics and pycocotools: pip install 'scap-hub[detection]', or set "
                "data.labels=false to compare the outputs instead"
            ) from None
        self.task, self.loss = task, 0.0
        self.found: list[dict[str, Tensor]] = []
        self.true: list[dict[str, Tensor]] = []

    def add(self, output: Any, targets: Any) -> None:
        """See `Meter.add`."""
        self.loss += float(self.task.loss(output, targets)) * len(targets)
        self.found += [_on_cpu(own, "scores", "labels", "boxes") for own in self.task.found(output)]
        self.true += [_on_cpu(own, "labels", "boxes") for own in self.task.true(targets)]

    def result(self) -> dict[str, float]:
        """See `Meter.result`."""
        parts = gather_object([(self.loss, self.found, self.true)])
        found, true = ([image for part in parts for image in part[column]] for column in (1, 2))
        if not any(len(image["labels"]) for image in true):
            raise DataError("mean average precision needs at least one object in the images that are measured")
        self.metric.update(found, true)
        measured = self.metric.compute()
        loss = sum(part[0] for part in parts) / len(true)
        return {"map": float(measured["map"]), "map_50": float(measured["map_50"]), "loss": loss, "images": len(true)}
