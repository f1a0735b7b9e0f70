"""Depth estimation: how far each pixel is."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import reduce
from torch import Tensor, nn
from torchvision import tv_tensors

from scap_hub.errors import DataError
from scap_hub.placement import fed
from scap_hub.tasks.base import Meter, Metric, Task
from scap_hub.tasks.placed import PlacedTask, check_size, without_channel
from scap_hub.zoo.base import LoadedModel

_INVERSE = ("dpt", "depth_anything", "prompt_depth_anything")
"""Families whose models say an inverse depth of unknown scale and shift, unless their config says "metric"."""
_SMALLEST = 1e-6
_OTHER_UNIT = 20
"""Depths that are so many times larger or smaller are in another unit."""


@dataclass(frozen=True)
class DepthEstimation(PlacedTask):
    """Targets are depths, float32 (N, H, W), 0 where unknown; a model's output is a map, float32 (N, h, w).

    Attributes:
        inverse: Whether the model says an inverse depth, right up to a scale and a shift of each image.
    """

    inverse: bool = False

    name: ClassVar[str] = "depth-estimation"
    metric: ClassVar[Metric] = Metric("delta1", "delta1", "Depths within 25 %", "delta1")
    others: ClassVar[tuple[Metric, ...]] = (
        Metric("abs_rel", "AbsRel", "Mean relative error of depths", "abs_rel", lower_is_better=True),
    )
    wanted: ClassVar[str] = "depth maps (images with one channel, or arrays of numbers)"
    names: ClassVar[tuple[str, ...]] = ("depth_map", "depth", "depths", "label", "annotation")

    def fitted(self, loaded: LoadedModel) -> Task:
        """With what the config says of the model's scale; of a module of one's own nothing is known."""
        config = getattr(loaded.module, "config", None)
        family, said = getattr(config, "model_type", None), getattr(config, "depth_estimation_type", "relative")
        return DepthEstimation(family in _INVERSE and said != "metric") if family else self

    def holds(self, kind: str) -> bool:
        """Images and arrays."""
        return kind in ("Image", "Array2D", "List")

    def read(self, value: Any, size: tuple[int, int], num_classes: int, where: str) -> tv_tensors.Mask:
        """A map, float32 (H, W)."""
        depths = np.asarray(value)
        if depths.ndim != 2 or depths.dtype.kind not in "iuf":
            raise DataError(
                f"a depth map of {where} holds {depths.dtype} of shape {depths.shape}, not one number for each pixel: "
                "give images with one channel (modes L, I or F), or arrays"
            )
        check_size("depth map", depths.shape, size, where)
        found = torch.from_numpy(depths.astype(np.float32))
        return tv_tensors.Mask(torch.where(found.isfinite(), found, 0.0).clamp(min=0))

    def check(self, targets: Any, num_classes: int, where: str) -> None:
        """Any number may be a depth."""

    def given(self, targets: Any, images: int, num_classes: int, where: str) -> Tensor:
        """Depths (N, H, W), also from (N, 1, H, W)."""
        targets = without_channel(targets) if isinstance(targets, Tensor) else targets
        if not isinstance(targets, Tensor) or targets.ndim != 3 or len(targets) != images:
            raise DataError(f"the depth maps of {where} are no tensors (images, height, width)")
        return torch.where(targets.isfinite(), targets, 0).float().clamp(min=0)

    def output(self, model: nn.Module, images: Tensor) -> Tensor:
        """A map, float32 (N, h, w)."""
        result = model(fed(model, images))
        found = getattr(result, "predicted_depth", result)
        found = without_channel(found) if isinstance(found, Tensor) else found
        if not isinstance(found, Tensor) or found.ndim != 3:
            raise DataError("the model returns no depth map, a tensor (images, height, width) or `predicted_depth`")
        return found.float()

    def loss(self, output: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Mean over the images of what is left after scale and shift, or, of metric depths, the scale-invariant error.

        The first is that of Ranftl et al. (arXiv 1907.01341, equations 5 and 6), on inverse depths; the second that of
        Eigen et al. (arXiv 1406.2283), as transformers' GLPN computes it.
        """
        maps, known = _enlarged(output, targets), targets > 0
        if not known.any():
            return 0 * output.sum()
        if self.inverse:
            parts = [_unlike(own[where], 1 / true[where]) for own, true, where in zip(maps, targets, known, strict=True)
                     if where.any()]  # fmt: skip
            return torch.stack(parts).mean()
        difference = targets[known].log() - maps[known].clamp(min=_SMALLEST).log()
        return (difference.square().mean() - 0.5 * difference.mean().square() + 1e-12).sqrt()

    def distance(self, output: Tensor, guide: Tensor, temperature: float) -> Tensor:
        """Squared distance of the maps relative to the variance of the teacher's in each image."""
        own, other = output.flatten(1), guide.flatten(1)
        return ((own - other).square().mean(1) / (other.var(1, unbiased=False) + 1e-12)).mean()

    def meter(self, device: torch.device) -> Meter:
        """See `Task.meter`."""
        return _Depths(device, self)

    def depths(self, output: Tensor, targets: Tensor) -> Tensor:
        """Depths (N, H, W) of a model's maps; inverse ones are first fitted to each image's targets."""
        maps = _enlarged(output, targets)
        if not self.inverse:
            return maps
        return torch.stack([_fitted(own, true) for own, true in zip(maps, targets, strict=True)])


def _enlarged(maps: Tensor, targets: Tensor) -> Tensor:
    if maps.shape == targets.shape:
        return maps
    return F.interpolate(maps[:, None], targets.shape[-2:], mode="bilinear", align_corners=False)[:, 0]


def _unlike(own: Tensor, other: Tensor) -> Tensor:
    """Mean distance of two sets of numbers, each shifted to a median of 0 and scaled to a mean absolute value of 1."""
    own, other = own - own.median(), other - other.median()
    return (own / own.abs().mean().clamp(min=_SMALLEST) - other / other.abs().mean().clamp(min=_SMALLEST)).abs().mean()


def _fitted(own: Tensor, true: Tensor) -> Tensor:
    """Depths of an inverse map, with the scale and the shift that fit the true ones best by least squares."""
    known = true > 0
    if not known.any():
        return own
    x, y = own[known].double(), 1 / true[known].double()
    deviation = x - x.mean()
    scale = (deviation * y).sum() / deviation.square().sum().clamp(min=1e-12)
    inverse = scale * (own.double() - x.mean()) + y.mean()
    return (1 / inverse.clamp(min=float(y.min()) / 10)).float()


class _Depths(Meter):
    """Mean over the images of what is true of their pixels, kept as sums."""

    def __init__(self, device: torch.device, task: DepthEstimation) -> None:
        self.task = task
        # delta1, abs_rel, loss, images with depths, images, logarithm of found / right
        self.sums = torch.zeros(6, device=device)

    def add(self, output: Tensor, targets: Tensor) -> None:
        """See `Meter.add`."""
        self.sums[2] += self.task.loss(output, targets) * len(targets)
        self.sums[4] += len(targets)
        for own, true in zip(self.task.depths(output, targets), targets, strict=True):
            known = true > 0
            if known.any():
                found, right = own[known].clamp(min=_SMALLEST), true[known]
                ratio = torch.maximum(found / right, right / found)
                self.sums[:2] += torch.stack([(ratio < 1.25).float().mean(), ((found - right).abs() / right).mean()])
                self.sums[3] += 1
                self.sums[5] += (found / right).log().mean()

    def result(self) -> dict[str, float]:
        """See `Meter.result`."""
        delta1, abs_rel, loss, known, images, logarithm = reduce(self.sums, reduction="sum").tolist()
        if not known:
            raise DataError("no pixel of the depth maps has a depth above 0")
        if (factor := math.exp(abs(logarithm) / known)) > _OTHER_UNIT:
            warnings.warn(
                f"the depths of the data are {factor:.0f} times {'larger' if logarithm < 0 else 'smaller'} than the "
                "model's: give both in one unit, such as metres, unless the model has yet to be trained",
                stacklevel=2,
            )
        return {"delta1": delta1 / known, "abs_rel": abs_rel / known, "loss": loss / images, "images": int(images)}
