"""Feature extraction: models without a head, whose features are to stay what they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import Tensor, nn

from scap_hub.criteria.variance import floating_outputs
from scap_hub.errors import DataError
from scap_hub.placement import fed
from scap_hub.tasks.base import ONE_IMAGE, Meter, Metric
from scap_hub.tasks.classification import IMAGE_CLASSIFICATION
from scap_hub.tasks.outputs import Outputs
from scap_hub.tasks.placed import TARGET_NAMES

NEIGHBOURS = 10
_TEMPERATURE = 0.07
"""The nearer a neighbour, the more its vote counts, as in DINO (arXiv 2104.14294)."""
_AT_ONCE = 1024
"""Images whose neighbours are looked for together."""


class Features(NamedTuple):
    """What a model says of a batch.

    Attributes:
        all: float32 tensors with a row for each image: vectors (N, C), tokens (N, T, C), maps (N, C, H, W).
        vector: One vector for each image, (N, C): the pooled one, or the mean of the last tokens or map.
    """

    all: list[Tensor]
    vector: Tensor


class ImageFeatureExtraction(Outputs):
    """Outputs are features, and labels, where there are any, only tell whether neighbours are of one class."""

    name: ClassVar[str] = "image-feature-extraction"
    metric: ClassVar[Metric] = Metric("cosine", "feature cosine", "Cosine to the dense model's features", "cosine")
    others: ClassVar[tuple[Metric, ...]] = (Metric("knn_top1", "kNN top-1", "kNN top-1 accuracy", "accuracy"),)
    refuses: ClassVar[tuple[str, ...]] = ("label_smoothing",)
    uses_targets: ClassVar[bool] = True

    @property
    def pipeline_tag(self) -> str:
        """As the task's name."""
        return self.name

    def target_column(self, kinds: Mapping[str, str], asked: str | None, listing: str) -> str | None:
        """As in classification; targets of other tasks are a sign of a model that lacks its head."""
        column = IMAGE_CLASSIFICATION.target_column(kinds, asked, listing)
        others = [name for name in TARGET_NAMES if name in kinds]
        if column is None and others:
            raise DataError(
                f"{others[0]!r} looks like the targets of another task, and the model has no head, only features: give "
                f"the whole model, or set data.labels=false to prune the backbone alone; {listing}"
            )
        return column

    def targets(self, rows: Any, column: str, num_classes: int, where: str) -> Tensor | None:
        """Class numbers, int64 (images,)."""
        return IMAGE_CLASSIFICATION.targets(rows, column, 0, where)

    def target(self, value: Any, num_classes: int, where: str) -> Tensor:
        """A class number, int64 ()."""
        return IMAGE_CLASSIFICATION.target(value, 0, where)

    def given(self, targets: Any, images: int, num_classes: int, where: str) -> Any:
        """Class numbers, int64 (N,)."""
        return IMAGE_CLASSIFICATION.given(targets, images, 0, where)

    def output(self, model: nn.Module, images: Tensor) -> Features:
        """See `Features`."""
        result = model(fed(model, images))
        found = [leaf.float() for leaf in floating_outputs(result, len(images))]
        if not found:
            raise DataError("the model returns no floating-point tensor with a row for each image")
        pooled = getattr(result, "pooler_output", None)
        last = getattr(result, "last_hidden_state", None)
        vector = _pooled((pooled if pooled is not None else last if last is not None else found[-1]).float())
        return Features(found, vector)

    def meter(self, device: torch.device) -> Meter:
        """See `Task.meter`."""
        return _Alike()

    def distance(self, output: Features, guide: Features, temperature: float) -> Tensor:
        """As of any outputs."""
        return super().distance(output.all, guide.all, temperature)


def _pooled(features: Tensor) -> Tensor:
    """One vector for each image."""
    if features.ndim == 3:
        return features.mean(1)
    return features.flatten(2).mean(2) if features.ndim > 3 else features


def _cosines(own: Tensor, other: Tensor) -> Tensor:
    """Of each image, (N,): the mean over tokens or places."""
    dim = 1 if own.ndim != 3 else 2
    return F.cosine_similarity(own, other, dim=dim).flatten(1).mean(1) if own.ndim > 2 else F.cosine_similarity(
        own.flatten(1), other.flatten(1)
    )  # fmt: skip


class _Alike(Meter):
    """Cosines to the dense features, and with labels the share of images whose neighbours are of their class."""

    def __init__(self) -> None:
        self.cosine = self.distance = 0.0
        self.images = 0
        self.vectors: list[Tensor] = []
        self.labels: list[Tensor] = []

    def add(self, output: Features, targets: Any) -> None:
        """See `Meter.add`; the targets are the dense features, and the labels, if there are any."""
        guide, labels = targets
        parts = [_cosines(own, other) for own, other in zip(output.all, guide.all, strict=True)]
        self.cosine += float(torch.stack(parts).double().mean(0).sum())
        self.images += len(output.vector)
        if labels is not None:
            self.vectors.append(F.normalize(output.vector).cpu())
            self.labels.append(labels.cpu())

    def result(self) -> dict[str, float]:
        """The loss is one minus the cosine."""
        parts = gather_object([(self.cosine, self.images, self.vectors, self.labels)])
        images = sum(part[1] for part in parts)
        if not images:
            raise DataError(f"features need {ONE_IMAGE}")
        cosine = sum(part[0] for part in parts) / images
        found = {"cosine": cosine, "loss": 1 - cosine, "images": images}
        vectors, labels = ([row for part in parts for row in part[column]] for column in (2, 3))
        if vectors and images > 1:
            found["knn_top1"] = nearest_accuracy(torch.cat(vectors), torch.cat(labels))
        return found


def nearest_accuracy(vectors: Tensor, labels: Tensor) -> float:
    """Share of images whose nearest neighbours among the others vote for their class.

    Args:
        vectors: Of unit length, (N, C).
        labels: int64 (N,), any numbers.
    """
    known, labels = labels.unique(return_inverse=True)
    count, classes = min(NEIGHBOURS, len(vectors) - 1), len(known)
    right = 0
    for begin in range(0, len(vectors), _AT_ONCE):
        part = vectors[begin : begin + _AT_ONCE]
        alike = part @ vectors.T
        alike[torch.arange(len(part)), torch.arange(begin, begin + len(part))] = -2.0  # not the image itself
        nearness, which = alike.topk(count)
        votes = torch.zeros(len(part), classes).scatter_add_(1, labels[which], (nearness / _TEMPERATURE).exp())
        right += int((votes.argmax(1) == labels[begin : begin + len(part)]).sum())
    return right / len(vectors)
