"""Targets that have places in the image: masks, depth maps, boxes. They are resized, cropped and mirrored with it."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from scap_hub.errors import DataError
from scap_hub.tasks.base import Task


class PlacedTask(Task):
    """A task with such targets. They are read image by image, as torchvision's tensors that know how they move.

    Attributes:
        wanted: What the target column holds, in words.
        names: What target columns are usually called.
    """

    refuses: ClassVar[tuple[str, ...]] = ("mixup", "label_smoothing")
    wanted: ClassVar[str]
    names: ClassVar[tuple[str, ...]]

    @abstractmethod
    def holds(self, kind: str) -> bool:
        """Whether a column that holds this kind of values may hold targets."""

    @abstractmethod
    def read(self, value: Any, size: tuple[int, int], num_classes: int, where: str) -> Any:
        """One image's target, checked, as it lies on the image.

        Args:
            value: In the target column; decoded where it is an image.
            size: (height, width) of the image in pixels.
            num_classes: Of the model; 0 checks nothing.
            where: The split in words, for the message of an error.

        Returns:
            Tensors of `torchvision.tv_tensors`, in any structure.

        Raises:
            DataError: It does not fit the image or the model.
        """

    def moved(self, target: Any) -> Any:
        """A target after it was moved, without what no longer lies in the image."""
        return target

    def join(self, targets: Sequence[Any]) -> Any:
        """Targets of single images of one size as those of a batch: as the loss, the meter and `given` have them.

        Maps are stacked, (N, H, W).
        """
        return torch.stack([target.as_subclass(Tensor) for target in targets])

    def target_column(self, kinds: Mapping[str, str], asked: str | None, listing: str) -> str | None:
        """The column of a usual name whose kind fits; without one, the other of two image columns."""
        if asked is not None:
            if not self.holds(kinds[asked]):
                raise DataError(f"column {asked!r} holds {kinds[asked]}; {self.name} wants {self.wanted}; {listing}")
            return asked
        named = [column for column in self.names if column in kinds and self.holds(kinds[column])]
        if named:
            return named[0]
        images = [column for column, kind in kinds.items() if kind == "Image"]
        if self.holds("Image") and len(images) == 2 and "image" in images:
            return next(column for column in images if column != "image")
        others = [
            column
            for column, kind in kinds.items()
            if kind != "Image" and (kind == "ClassLabel" or column in _USUAL or self.holds(kind))
        ]
        if others or len(images) > 1:
            raise DataError(
                f"no column fits {self.name}, which wants {self.wanted}, called {' or '.join(self.names[:3])}; "
                f"{listing}; set data.label_column, or data.labels=false to use the images alone"
            )
        return None

    def targets(self, rows: Any, column: str, num_classes: int, where: str) -> Tensor | None:
        """Never asked for: these targets are read one by one, with `read`."""
        raise NotImplementedError

    def target(self, value: Any, num_classes: int, where: str) -> Tensor:
        """Never asked for, see `targets`."""
        raise NotImplementedError

    def class_names(self, feature: Any) -> list[str] | None:
        """Unknown."""
        return None

    def partners(self, targets: Any) -> Any:
        """Never asked for: mixtures of these images have no targets."""
        raise NotImplementedError


def check_size(what: str, shape: tuple[int, ...], size: tuple[int, ...], where: str) -> None:
    """Makes sure that a map is as large as its image.

    Raises:
        DataError: It is not.
    """
    if shape != size:
        raise DataError(f"a {what} of {where} is {shape} pixels (height, width), its image {size}")


def without_channel(maps: Tensor) -> Tensor:
    """Maps (N, H, W), also from (N, 1, H, W)."""
    return maps[:, 0] if maps.ndim == 4 and maps.shape[1] == 1 else maps


TARGET_NAMES = ("annotation", "mask", "segmentation", "depth", "depth_map", "objects")
"""Columns of these names hold targets of some task."""
_USUAL = (*TARGET_NAMES, "label", "labels")
"""The same, with those of classification."""


def takes(model: nn.Module, *names: str) -> bool:
    """Whether a model's forward pass has arguments of these names, as transformers' models that compute their loss."""
    return set(names) <= set(inspect.signature(extract_model_from_parallel(model).forward).parameters)
