"""Models of which nothing is known but that they have outputs: these are compared with the dense model's."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from scap_hub.channels.part import offered
from scap_hub.criteria.variance import Spread, outputs_of
from scap_hub.errors import DataError, ModelError
from scap_hub.graph.modes import evaluating
from scap_hub.placement import placement
from scap_hub.private import tree_leaves
from scap_hub.tasks.base import Meter, Metric, Task
from scap_hub.tasks.placed import PlacedTask
from scap_hub.zoo.base import LoadedModel

OUTPUT_ERROR = Metric(
    "output_error", "relative output error", "Relative output error", "relative_squared_error", lower_is_better=True
)


_IMAGES = 3
"""As many rows must an output have for so many images; detections for one of them may be two, by chance."""


class Outputs(Task):
    """No targets; a model's output is whatever floating-point tensors it returns that have a row for each image."""

    name: ClassVar[str] = "outputs"
    metric: ClassVar[Metric] = OUTPUT_ERROR
    refuses: ClassVar[tuple[str, ...]] = ("label_smoothing",)
    from_teacher: ClassVar[bool] = True
    uses_targets: ClassVar[bool] = False

    @property
    def pipeline_tag(self) -> str | None:
        """The Hub has none."""
        return None

    def fitted(self, loaded: LoadedModel) -> Task:
        """This task, for a model that returns something for each image.

        Raises:
            ModelError: It does not; names parts of it that do. Or it takes more than images.
        """
        _check_takes_images(loaded)
        device, dtype = placement(loaded.module)
        images = torch.zeros(_IMAGES, *loaded.preprocessing.input_size, device=device, dtype=dtype)
        with torch.no_grad(), evaluating(loaded.module):
            try:
                found = outputs_of(loaded.module, images)
            except Exception:
                return self  # it may take images of the data alone, which are tried next
        if not found:
            raise ModelError(
                f"{loaded.name} returns no floating-point tensor with a row for each image, so there is nothing to "
                f"compare{offered(loaded.module, (images,))}"
            )
        return self

    def target_column(self, kinds: Mapping[str, str], asked: str | None, listing: str) -> str | None:
        """None: targets mean nothing here."""
        return None

    def class_names(self, feature: Any) -> list[str] | None:
        """None."""
        return None

    def targets(self, rows: Any, column: str, num_classes: int, where: str) -> Tensor | None:
        """None."""
        return None

    def target(self, value: Any, num_classes: int, where: str) -> Tensor:
        """Never asked for."""
        raise NotImplementedError

    def check(self, targets: Any, num_classes: int, where: str) -> None:
        """Anything goes: it is not used."""

    def output(self, model: nn.Module, images: Tensor) -> Any:
        """float32 tensors (N, ...)."""
        return [output.float() for output in outputs_of(model, self.inputs(images))]

    def loss(self, output: Any, targets: Any, label_smoothing: float = 0.0) -> Tensor:
        """There is none without a teacher."""
        raise DataError("this task has no targets, only a dense model to follow")

    def distance(self, output: Any, guide: Any, temperature: float) -> Tensor:
        """Squared distance from the teacher's outputs relative to their variance, mean over the outputs.

        The variance is that over the images of the batch, of a single image that over its elements.
        """
        parts = []
        for own, other in zip(_tensors(output), _tensors(guide), strict=True):
            mean = other.mean(0, keepdim=True) if len(other) > 1 else other.mean()
            energy = (other - mean).square().mean().clamp(min=1e-9 * other.square().mean() + 1e-30)
            parts.append((own - other).square().mean() / energy)
        if not parts:
            raise DataError("the model returns no floating-point tensor with a row for each image")
        return torch.stack(parts).mean()

    def partners(self, targets: Any) -> Any:
        """Never asked for."""
        raise NotImplementedError

    def meter(self, device: torch.device) -> Meter:
        """See `Task.meter`."""
        return OutputError()


class Unlabelled(Outputs):
    """A task whose data has no targets: only its names are left of it."""

    def __init__(self, inner: Task) -> None:
        """Args: inner: The task that the model is for."""
        self.inner = inner
        self.name = inner.name  # type: ignore[misc]

    @property
    def pipeline_tag(self) -> str | None:
        """The inner task's."""
        return self.inner.pipeline_tag


def unlabelled(task: Task) -> Task:
    """The task for images without targets: classification stays as it is, and is not measured then."""
    return Unlabelled(task) if isinstance(task, PlacedTask) else task


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


class OutputError(Meter):
    """Squared distances from the dense model's outputs, relative to their variance over the images."""

    def __init__(self) -> None:
        self._spread, self._squares, self._images = Spread(), [0.0], 0

    def add(self, output: Any, targets: Any) -> None:
        """See `Meter.add`; the targets are the dense model's outputs, and what the data has beside."""
        mine, theirs = _tensors(output), _tensors(targets[0])
        if not mine:
            raise DataError("the model returns no floating-point tensor with a row for each image to compare")
        distances = [float((a - b).double().square().sum()) for a, b in zip(mine, theirs, strict=True)]
        self._squares = [a + b for a, b in zip(self._squares, distances, strict=True)] if self._images else distances
        self._images += len(mine[0])
        self._spread.add(theirs)

    def result(self) -> dict[str, float]:
        """The mean over the outputs that change from image to image; the loss is the same."""
        factors = self._spread.inverse_variances()
        parts = [part for part in gather_object([(self._images, self._squares)]) if part[0]]
        if not any(factors):
            raise DataError("the dense model's outputs do not change from image to image: give other images, or more")
        squares = [sum(own) for own in zip(*(part[1] for part in parts), strict=True)]
        error = sum(factor * square for factor, square in zip(factors, squares, strict=True))
        return {OUTPUT_ERROR.key: error, "loss": error, "images": sum(part[0] for part in parts)}


def _check_takes_images(loaded: LoadedModel) -> None:
    """Refuses a model that wants an argument beside the images, such as a question about them."""
    wanted = inspect.signature(loaded.module.forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    missing = [own.name for own in [*wanted][1:] if own.kind in kinds and own.default is own.empty]
    if missing:
        raise ModelError(
            f"{loaded.name} takes {', '.join(map(repr, missing))} beside the images: give a module of your own around "
            "it whose forward(images) adds what it needs, the same for all images"
        )
