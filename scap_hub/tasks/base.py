"""What a task is: all that a run must know of the targets and of a model's output."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from scap_hub.errors import DataError
from scap_hub.zoo.base import LoadedModel

Batch = tuple[Any, ...]
"""Images, (N, C, H, W), and their targets where there are any."""
ONE_IMAGE = "at least one image: a data set has to give its images each time that it is read"
"""What measuring takes."""


@dataclass(frozen=True)
class Metric:
    """How a task measures a model, as a fraction of 1.

    Attributes:
        key: Its name in results and reports.
        name: Its name in a table.
        title: Its name on a model card.
        hub_type: Its name in the metadata of a model card, one of the Hub's metrics.
        lower_is_better: Whether less of it is better; else more is.
    """

    key: str
    name: str
    title: str
    hub_type: str
    lower_is_better: bool = False


class Meter(ABC):
    """Measures a model, batch by batch."""

    @abstractmethod
    def add(self, output: Any, targets: Any) -> None:
        """Counts one batch of this process: what `Task.output` gave, and what it should have been."""

    @abstractmethod
    def result(self) -> dict[str, float]:
        """What was measured over the batches of all processes; the same on each of them.

        Returns:
            The metric and the task's others under their keys; "loss", the mean over the images; "images", how many
            there were.
        """


class Task(ABC):
    """Everything that depends on what a model is for; the rest of scap_hub knows images and costs only.

    Attributes:
        name: Of the task, as recipes name it.
        metric: What is reported, and what decides which epoch's weights are the best.
        others: What is reported beside it.
        refuses: Keys of the recipe's `finetune` block that mean nothing for this task.
        from_teacher: Whether outputs are compared with those of the dense model, not with targets: then the meter gets
            the pair of these outputs and the targets, which may be None.
        uses_targets: Whether targets mean anything.
        by_distance: Whether tuning without labels brings down `distance`. Else outputs are compared place by place,
            which means little for logits, where only differences count, and nothing for a detector's queries: which of
            them finds an object may change.
        by_part: Whether what its models compute depends on values, so that parts of them alone can be pruned.
    """

    name: ClassVar[str]
    metric: ClassVar[Metric]
    others: ClassVar[tuple[Metric, ...]] = ()
    refuses: ClassVar[tuple[str, ...]] = ()
    from_teacher: ClassVar[bool] = False
    uses_targets: ClassVar[bool] = True
    by_distance: ClassVar[bool] = False
    by_part: ClassVar[bool] = False

    @property
    def pipeline_tag(self) -> str | None:
        """The task's name on the Hub; None where the Hub has none."""
        return self.name

    def fitted(self, loaded: LoadedModel) -> Task:
        """This task as one model has it: its numbers of classes, its conventions.

        Raises:
            DataError: The model cannot do this task.
        """
        return self

    # Data

    @abstractmethod
    def target_column(self, kinds: Mapping[str, str], asked: str | None, listing: str) -> str | None:
        """Chooses the column of the targets; None where a data set has none.

        Args:
            kinds: What each column of the data set holds, by its name: "Image", "ClassLabel", "int64", "string", ...
            asked: The column that the recipe names, one of `kinds`; None to find it.
            listing: The columns in words, for the message of an error.

        Raises:
            DataError: Several columns may be meant, or the one that was asked for cannot be used.
        """

    @abstractmethod
    def class_names(self, feature: Any) -> list[str] | None:
        """Names of the classes by index, from the feature (of `datasets`) of the target column; None if unknown."""

    @abstractmethod
    def targets(self, rows: Any, column: str, num_classes: int, where: str) -> Tensor | None:
        """Reads the targets of a split, checked.

        Args:
            rows: The split, a `datasets.Dataset`.
            column: Of the targets.
            num_classes: Width of the classifier; 0 checks nothing.
            where: The split in words, for the message of an error.

        Returns:
            A target for each image, (images, ...); None where a public data set hides them.

        Raises:
            DataError: A target is missing, or does not fit the model.
        """

    @abstractmethod
    def target(self, value: Any, num_classes: int, where: str) -> Tensor:
        """Reads one row's target, checked, from its value in the target column; for streams.

        Raises:
            DataError: As `targets`.
        """

    @abstractmethod
    def check(self, targets: Tensor, num_classes: int, where: str) -> None:
        """Makes sure that targets fit the model.

        Raises:
            DataError: One does not; names it.
        """

    def chance(self, num_classes: int) -> float | None:
        """The metric of a model that guesses; None where that is not known."""
        return None

    def given(self, targets: Any, images: int, num_classes: int, where: str) -> Any:
        """The targets of a batch that the caller made, checked, as `loss` and the meter read them.

        Args:
            targets: As the caller's loader yields them.
            images: How many images they are for.
            num_classes: Width of the classifier; 0 where it is unknown.
            where: The loader in words, for the message of an error.

        Raises:
            DataError: As `check`, or what they mean is unclear.
        """
        self.check(targets, num_classes, where)
        return targets

    def renumbered(self, targets: Any, numbers: Tensor) -> Any:
        """Targets of a data set that numbers its classes in another order than the model.

        Args:
            targets: Of the data set, checked.
            numbers: int64 (classes of the data set,), the model's number of each.
        """
        raise DataError(f"{self.name} cannot renumber classes: give them in the model's order")

    def collate(self, samples: Sequence[Batch]) -> Batch:
        """One batch from single images and their targets."""
        return tuple(torch.stack(column) for column in zip(*samples, strict=True))

    # Training

    def inputs(self, images: Tensor) -> Tensor:
        """What a model is called with for images, (N, ...): these, unless it is a part of a larger one."""
        return images

    @abstractmethod
    def output(self, model: nn.Module, images: Tensor) -> Any:
        """Runs a model; what it says of images, as `loss`, `distance` and the meter read it."""

    def output_for(self, model: nn.Module, images: Tensor, targets: Any) -> Any:
        """As `output`, with the targets at hand: models that compute their loss themselves want them."""
        return self.output(model, images)

    @abstractmethod
    def loss(self, output: Any, targets: Any, label_smoothing: float = 0.0) -> Tensor:
        """How far a model's output is from the targets; mean over the images of a batch."""

    @abstractmethod
    def distance(self, output: Any, guide: Any, temperature: float) -> Tensor:
        """How far a model's output is from its teacher's; mean over the images of a batch.

        Args:
            output: The student's.
            guide: The teacher's for the same images.
            temperature: Softens both; its square keeps the gradients' size independent of it.
        """

    def confidence(self, output: Any) -> Tensor | None:
        """(N, classes) how sure a model is of each answer, 0 to 1; None where an image has no single answer."""
        return None

    @abstractmethod
    def partners(self, targets: Any) -> Any:
        """The targets in reverse order: those of the images that mixup blends in, `images.flip(0)`."""

    @abstractmethod
    def meter(self, device: torch.device) -> Meter:
        """Starts a measurement on a device."""
