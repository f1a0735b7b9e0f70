"""Semantic segmentation: one class for each pixel."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import Tensor, nn
from torchvision import tv_tensors

from scap_hub.errors import DataError
from scap_hub.placement import fed
from scap_hub.tasks.base import ONE_IMAGE, Meter, Metric, Task
from scap_hub.tasks.placed import PlacedTask, check_size, takes, without_channel
from scap_hub.zoo.base import LoadedModel, logits

IGNORED = 255
"""The number of pixels without a class, as data sets and image processors write it."""
_SEGMENTS = ("mask_labels", "class_labels")
"""What models that predict sets of masks are told."""


class Segmented(NamedTuple):
    """What a model says of a batch.

    Attributes:
        logits: float32 (N, classes, h, w), as coarse as the model makes them.
        own_loss: What the model computed from the targets itself; None where it was not told them, or does not.
    """

    logits: Tensor
    own_loss: Tensor | None = None


@dataclass(frozen=True)
class SemanticSegmentation(PlacedTask):
    """Targets are class numbers, int64 (N, H, W), 255 where a pixel has none.

    Attributes:
        reduce_labels: Whether 0 in the data means "no class", and all others count from 1.
        ignored: The number that the model itself leaves out of its loss.
        binary: Whether the model has a single logit: 1 is its class, 0 all else.
    """

    reduce_labels: bool = False
    ignored: int = IGNORED
    binary: bool = False

    name: ClassVar[str] = "semantic-segmentation"
    metric: ClassVar[Metric] = Metric("mean_iou", "mIoU", "Mean IoU", "mean_iou")
    others: ClassVar[tuple[Metric, ...]] = (
        Metric("pixel_accuracy", "pixel accuracy", "Pixel accuracy", "pixel_accuracy"),
    )
    wanted: ClassVar[str] = "images of class numbers"
    names: ClassVar[tuple[str, ...]] = ("annotation", "label", "mask", "segmentation", "annotations", "labels", "masks")

    @property
    def pipeline_tag(self) -> str:
        """The Hub has one for all kinds of segmentation."""
        return "image-segmentation"

    def fitted(self, loaded: LoadedModel) -> Task:
        """With what the image processor and the config say of the numbers in masks."""
        processor, config = loaded.image_processor or {}, getattr(loaded.module, "config", None)
        ignored = getattr(config, "semantic_loss_ignore_index", getattr(config, "loss_ignore_index", IGNORED))
        reduced = processor.get("do_reduce_labels", processor.get("reduce_labels"))
        binary = loaded.num_classes == 1 and not takes(loaded.module, *_SEGMENTS)
        return SemanticSegmentation(bool(reduced), IGNORED if ignored is None else int(ignored), binary)

    def holds(self, kind: str) -> bool:
        """Images."""
        return kind == "Image"

    def read(self, value: Any, size: tuple[int, int], num_classes: int, where: str) -> tv_tensors.Mask:
        """A mask, int64 (H, W), from an image with one channel: grey, or of a palette."""
        numbers = np.asarray(value)
        if numbers.ndim != 2 or numbers.dtype.kind not in "iub":
            raise DataError(
                f"a mask of {where} is an image of mode {getattr(value, 'mode', numbers.shape)!r}: give class numbers "
                "in a single channel (modes L, P or I)"
            )
        check_size("mask", numbers.shape, size, where)
        classes = torch.from_numpy(numbers.astype(np.int64))
        if self.reduce_labels:
            classes = torch.where(classes.eq(0) | classes.eq(IGNORED), IGNORED, classes - 1)
        self.check(classes, num_classes, where)
        return tv_tensors.Mask(classes)

    def check(self, targets: Tensor, num_classes: int, where: str) -> None:
        """Makes sure that class numbers are within 0..num_classes - 1, or 255."""
        num_classes = 2 if self.binary else num_classes
        wrong = targets.lt(0) | (targets.ge(num_classes) if num_classes else targets.lt(0))
        wrong &= targets.ne(IGNORED) & targets.ne(self.ignored)
        if wrong.any():
            reduced = ", from which do_reduce_labels of the image processor took 1," if self.reduce_labels else ""
            raise DataError(
                f"class {int(targets[wrong][0])} in a mask of {where}{reduced} is outside the "
                f"model's range 0..{num_classes - 1}, and pixels without a class are {IGNORED}: for a new head set "
                "model.num_classes and finetune.dense_epochs"
            )

    def given(self, targets: Any, images: int, num_classes: int, where: str) -> Tensor:
        """Class numbers (N, H, W), also from (N, 1, H, W); never reduced."""
        if not isinstance(targets, Tensor) or targets.is_floating_point() or not len(targets) == images:
            raise DataError(f"the masks of {where} are no tensors (images, height, width) of class numbers")
        numbers = without_channel(targets)
        if numbers.ndim != 3:
            raise DataError(f"the masks of {where} are {tuple(targets.shape)}, not (images, height, width)")
        self.check(numbers, num_classes, where)
        return numbers.long()

    def output(self, model: nn.Module, images: Tensor) -> Segmented:
        """See `Segmented`."""
        return Segmented(_class_maps(model(fed(model, images))).float())

    def output_for(self, model: nn.Module, images: Tensor, targets: Any) -> Segmented:
        """With the model's own loss, where it computes one."""
        if targets is None:
            return self.output(model, images)
        if takes(model, *_SEGMENTS):
            options: dict[str, Any] = dict(zip(_SEGMENTS, self._segments(targets), strict=True))
        elif takes(model, "pixel_values", "labels") and not self.binary:  # for which many have no loss
            options = {"labels": self._out_of_range_ignored(targets)}
        else:
            return self.output(model, images)
        result = model(fed(model, images), **options)
        return Segmented(_class_maps(result).float(), result.loss.float().reshape(()))

    def _out_of_range_ignored(self, targets: Tensor) -> Tensor:
        return targets if self.ignored == IGNORED else torch.where(targets.eq(IGNORED), self.ignored, targets)

    def _segments(self, targets: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Masks (segments, H, W) and their classes (segments,) of each image, as models that predict sets want them."""
        classes = [own.unique() for own in targets]
        classes = [own[own.ne(IGNORED) & own.ne(self.ignored)] for own in classes]
        masks = [own.eq(which[:, None, None]).float() for own, which in zip(targets, classes, strict=True)]
        return masks, classes

    def loss(self, output: Segmented, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """The model's own; of a model without one, cross-entropy in nats, mean over the pixels with a class."""
        if output.own_loss is not None:
            return output.own_loss
        counted = torch.where(targets.eq(self.ignored), IGNORED, targets)
        return F.cross_entropy(
            enlarged(output.logits, targets), counted, ignore_index=IGNORED, label_smoothing=label_smoothing
        )

    def distance(self, output: Segmented, guide: Segmented, temperature: float) -> Tensor:
        """Divergence of the logits from the teacher's, as in classification, mean over the places."""
        soft, target = (F.log_softmax(found.logits / temperature, 1) for found in (output, guide))
        places = soft.numel() / soft.shape[1]
        return F.kl_div(soft, target, reduction="sum", log_target=True) / places * temperature**2

    def meter(self, device: torch.device) -> Meter:
        """See `Task.meter`."""
        return _Overlap(device, self)


def enlarged(maps: Tensor, targets: Tensor) -> Tensor:
    """Maps (N, C, h, w) at the size of targets (N, H, W), as transformers' models do for their loss."""
    if maps.shape[-2:] == targets.shape[-2:]:
        return maps
    return F.interpolate(maps, size=targets.shape[-2:], mode="bilinear", align_corners=False)


def _class_maps(output: Any) -> Tensor:
    """Logits of the classes (N, classes, h, w); of models that predict a set of masks, the masks' votes."""
    queries = getattr(output, "class_queries_logits", None)
    if queries is None:
        found = logits(output)
        # The sigmoid of a single logit is the softmax of it and 0.
        return torch.cat([torch.zeros_like(found), found], 1) if found.shape[1] == 1 else found
    # As their image processors' post_process_semantic_segmentation; the last class is "nothing".
    votes = torch.einsum("bqc,bqhw->bchw", queries.softmax(-1)[..., :-1], output.masks_queries_logits.sigmoid())
    return votes.clamp(min=1e-6).log()


class _Overlap(Meter):
    """A confusion matrix, kept as sums, so that processes may have unequal numbers of images."""

    def __init__(self, device: torch.device, task: SemanticSegmentation) -> None:
        self.task, self.device = task, device
        self.confusion: Tensor | None = None
        self.loss, self.images = torch.zeros(2, device=device)

    def add(self, output: Segmented, targets: Tensor) -> None:
        """See `Meter.add`."""
        classes = output.logits.shape[1]
        self.task.check(targets, classes, "the images that are measured")
        if self.confusion is None:
            self.confusion = torch.zeros(classes * classes, dtype=torch.long, device=self.device)
        found = enlarged(output.logits, targets).argmax(1)
        counted = targets.ne(IGNORED) & targets.ne(self.task.ignored)
        pairs = targets[counted] * classes + found[counted]
        self.confusion += torch.bincount(pairs, minlength=classes * classes)
        self.loss += self.task.loss(output, targets) * len(targets)
        self.images += len(targets)

    def result(self) -> dict[str, float]:
        """The mean is over the classes that occur, in the masks or in what the model says of them."""
        own = None if self.confusion is None else self.confusion.cpu()
        parts = [part for part in gather_object([(own, float(self.loss), int(self.images))]) if part[0] is not None]
        if not parts:
            raise DataError(f"the mean IoU needs {ONE_IMAGE}")
        confusion, loss, images = (sum(values) for values in zip(*parts, strict=True))
        square = confusion.unflatten(0, (-1, round(len(confusion) ** 0.5))).double()
        right = square.diagonal()
        union = square.sum(0) + square.sum(1) - right
        if not union.any():
            raise DataError(f"no pixel of the masks has a class: all of them are {IGNORED}")
        if not square[1:].any():
            warnings.warn(
                f"every pixel of the masks that has a class is of class 0, and {IGNORED} stands for none: in masks of "
                f"0 and {IGNORED}, make {IGNORED} class 1",
                stacklevel=2,
            )
        return {
            "mean_iou": float((right / union)[union > 0].mean()),
            "pixel_accuracy": float(right.sum() / square.sum()),
            "loss": loss / images,
            "images": images,
        }
