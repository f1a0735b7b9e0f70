"""Image classification: one class for each image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import reduce
from torch import Tensor, nn

from scap_hub.errors import DataError
from scap_hub.placement import fed
from scap_hub.tasks.base import ONE_IMAGE, Meter, Metric, Task
from scap_hub.zoo.base import logits

_NAMES = ("label", "labels")
"""Columns with one of these names hold classes."""
_HIDDEN = -1
"""Public test sets hide their labels so."""


class ImageClassification(Task):
    """Targets are labels, int64 (N,); a model's output is its logits, float32 (N, classes)."""

    name: ClassVar[str] = "image-classification"
    by_distance: ClassVar[bool] = True
    metric: ClassVar[Metric] = Metric("top1", "top-1", "Top-1 accuracy", "accuracy")

    def target_column(self, kinds: Mapping[str, str], asked: str | None, listing: str) -> str | None:
        """The only column of class labels, or a column called "label" or "labels", which must hold integers."""
        labels = [column for column, kind in kinds.items() if kind == "ClassLabel"]
        if not labels:
            labels = [column for column in _NAMES if column in kinds]
        if asked is None and len(labels) > 1:
            raise DataError(f"{len(labels)} label columns; {listing}; set data.label_column")
        label = asked or (labels[0] if labels else None)
        if label is not None and not kinds[label].startswith(("ClassLabel", "int", "uint")):
            raise DataError(
                f"column {label!r} holds {kinds[label]}, not class labels; {listing}; see Dataset.class_encode_column, "
                "or set data.labels=false to use the images alone"
            )
        return label

    def class_names(self, feature: Any) -> list[str] | None:
        """See `Task.class_names`."""
        return getattr(feature, "names", None)

    def targets(self, rows: Any, column: str, num_classes: int, where: str) -> Tensor | None:
        """The labels of a split, int64 (images,); see `Task.targets`."""
        values = rows.select_columns(column).with_format("numpy")[:][column]
        if values.dtype.kind not in "iu":
            raise DataError(f"column {column!r} of {where} has rows without a label")
        if (values == _HIDDEN).all():
            return None
        labels = torch.from_numpy(values.astype(np.int64))
        self.check(labels, num_classes, where)
        return labels

    def target(self, value: Any, num_classes: int, where: str) -> Tensor:
        """One label, int64 ()."""
        label = torch.tensor(value)
        self.check(label, num_classes, where)
        return label

    def check(self, targets: Tensor, num_classes: int, where: str) -> None:
        """Makes sure that labels are within 0..num_classes - 1."""
        if not num_classes or not targets.numel():
            return
        smallest, largest = int(targets.min()), int(targets.max())
        if not 0 <= smallest <= largest < num_classes:
            value = smallest if smallest < 0 else largest
            raise DataError(
                f"label {value} in {where} is outside the classifier's range 0..{num_classes - 1}; for a new "
                "classifier set model.num_classes and finetune.dense_epochs"
            )

    def chance(self, num_classes: int) -> float | None:
        """One class is right."""
        return 1 / num_classes if num_classes > 1 else None

    def given(self, targets: Tensor, images: int, num_classes: int, where: str) -> Tensor:
        """Labels, int64 (N,), from those of shape (N,) or (N, 1), or one-hot (N, classes), of any type."""
        numbers = targets.long()
        if targets.is_floating_point() and not torch.equal(numbers.to(targets.dtype), targets):
            wrong = targets[numbers != targets][0].item()
            raise DataError(
                f"label {wrong:g} in {where} is no class number: give whole numbers (smoothed and mixed labels are "
                "made by finetune.label_smoothing and finetune.mixup)"
            )
        if numbers.ndim == 2 and numbers.shape[1] == 1:
            numbers = numbers[:, 0]
        elif numbers.ndim == 2 and num_classes in (0, numbers.shape[1]) and _one_hot(numbers):
            numbers = numbers.argmax(1)
        if numbers.shape != (images,):
            raise DataError(
                f"labels of shape {tuple(targets.shape)} in {where} for {images} images are neither class numbers, "
                f"({images},), nor one-hot, ({images}, {num_classes or 'classes'}) with a single 1 in each row: give "
                "one class number for each image"
            )
        self.check(numbers, num_classes, where)
        return numbers

    def renumbered(self, targets: Tensor, numbers: Tensor) -> Tensor:
        """See `Task.renumbered`."""
        return numbers[targets]

    def output(self, model: nn.Module, images: Tensor) -> Tensor:
        """The logits, (N, classes), float32."""
        return logits(model(fed(model, images))).float()

    def loss(self, output: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Cross-entropy in nats, mean over the images.

        Args:
            output: Logits, (N, classes).
            targets: Labels, (N,).
            label_smoothing: Share of the probability spread over all classes.
        """
        return F.cross_entropy(output, targets, label_smoothing=label_smoothing)

    def distance(self, output: Tensor, guide: Tensor, temperature: float) -> Tensor:
        """Divergence of the logits from the teacher's, both softened (Hinton et al., arXiv 1503.02531).

        Args:
            output: The student's logits, (N, classes).
            guide: The teacher's, (N, classes).
            temperature: Both are divided by it; its square keeps the gradients' size independent of it.
        """
        soft, target = (F.log_softmax(scores / temperature, 1) for scores in (output, guide))
        return F.kl_div(soft, target, reduction="batchmean", log_target=True) * temperature**2

    def confidence(self, output: Tensor) -> Tensor:
        """The probability of each class, (N, classes)."""
        return output.softmax(1)

    def partners(self, targets: Tensor) -> Tensor:
        """Labels in reverse order, (N,)."""
        return targets.flip(0)

    def meter(self, device: torch.device) -> Meter:
        """See `Task.meter`."""
        return _Accuracy(device)


def _one_hot(rows: Tensor) -> bool:
    """Whether each row holds zeros and a single one."""
    return bool(((rows == 0) | (rows == 1)).all()) and bool((rows.sum(1) == 1).all())


class _Accuracy(Meter):
    """Counts right answers. It keeps sums, so that processes may have unequal numbers of batches."""

    def __init__(self, device: torch.device) -> None:
        # Apple's GPUs have no float64.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.correct, self.loss, self.images = torch.zeros(3, dtype=dtype, device=device)

    def add(self, output: Tensor, targets: Tensor) -> None:
        """See `Meter.add`."""
        self.correct += (output.argmax(1) == targets).sum()
        self.loss += F.cross_entropy(output, targets, reduction="sum")
        self.images += len(targets)

    def result(self) -> dict[str, float]:
        """See `Meter.result`."""
        sums = torch.stack([self.correct, self.loss, self.images])
        correct, loss, images = reduce(sums, reduction="sum").tolist()
        if not images:
            raise DataError(f"accuracy needs {ONE_IMAGE}")
        return {"top1": correct / images, "loss": loss / images, "images": int(images)}


IMAGE_CLASSIFICATION = ImageClassification()
