"""Targets that have places in the image, moved as the image is: resized and cropped, shifted and mirrored."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from scap_hub.errors import DataError
from scap_hub.private import tree_map
from scap_hub.tasks import Batch, PlacedTask
from scap_hub.tasks.segmentation import IGNORED
from scap_hub.training.data.transforms import normalised
from scap_hub.zoo.base import Pixels, Preprocessing

_PICTURES = ((256, 200), (200, 256))
"""(width, height) of the images on which a geometry is tried."""
_NEAR = 1.5
"""Source pixels that a geometry may be off by, in the mean."""


@dataclass(frozen=True)
class Geometry:
    """A resize and a crop in the middle.

    Attributes:
        resize: (height, width), or the length of the shorter side, in pixels.
        size: (height, width) of what is left.
    """

    resize: tuple[int, int] | int
    size: tuple[int, int]

    def __call__(self, target: Any) -> Any:
        """Moves each tensor of `torchvision.tv_tensors` in a structure; masks take the nearest pixel."""
        return moved(target, self._move)

    def _move(self, tensor: Any) -> Any:
        resize = [self.resize] if isinstance(self.resize, int) else list(self.resize)
        if isinstance(tensor, tv_tensors.Mask):
            # As a plain tensor: masks of torchvision 0.24 take the pixel that is half of one off, whatever is asked.
            plain = tensor.as_subclass(Tensor)[None]
            plain = transforms.resize(plain, resize, interpolation=InterpolationMode.NEAREST_EXACT)[0]
            tensor = tv_tensors.wrap(plain, like=tensor)
        else:
            tensor = transforms.resize(tensor, resize, interpolation=InterpolationMode.BILINEAR)
        size = list(transforms.get_size(tensor))
        return tensor if size == list(self.size) else transforms.center_crop(tensor, list(self.size))


def moved(target: Any, move: Callable[[Any], Any]) -> Any:
    """A structure with each of its tensors that have places moved."""
    return tree_map(lambda leaf: move(leaf) if isinstance(leaf, tv_tensors.TVTensor) else leaf, target)


def geometry_of(pixels: Pixels, preprocessing: Preprocessing, where: str) -> Geometry:
    """What a function does to places in an image, found by using it on pictures of their own coordinates.

    Args:
        pixels: Makes of an image what the model takes.
        preprocessing: What is written of it.
        where: The data set in words, for the message of an error.

    Raises:
        DataError: It neither squashes nor crops in the middle.
    """
    channels, height, width = preprocessing.input_size
    shorter = {rounded(min(height, width) / preprocessing.crop_pct) for rounded in (math.floor, round)}
    candidates = [Geometry((height, width), (height, width)), *(Geometry(side, (height, width)) for side in shorter)]
    errors = [max(_distance(pixels, geometry, channels, size) for size in _PICTURES) for geometry in candidates]
    best = int(np.argmin(errors))
    if errors[best] > _NEAR:
        raise DataError(
            f"masks and boxes of {where} cannot follow the model's images, which are neither squashed to {height} x "
            f"{width} pixels nor cropped in the middle: give a DataLoader of images and targets that fit each other"
        )
    return candidates[best]


def _distance(pixels: Pixels, geometry: Geometry, channels: int, size: tuple[int, int]) -> float:
    """How far, in source pixels, a geometry is from what the function does to an image of this size, in the mean."""
    width, height = size
    distances = []
    for across in (True, False):
        line = np.arange(width if across else height, dtype=np.uint8)
        picture = np.broadcast_to(line if across else line[:, None], (height, width))
        found = pixels(Image.fromarray(np.ascontiguousarray(picture)).convert("L" if channels == 1 else "RGB"))
        wanted = geometry(tv_tensors.Image(torch.from_numpy(picture.copy())[None]))
        distances.append(float((torch.as_tensor(found)[:1].float() - wanted.float()).abs().mean()))
    return max(distances)


def finish_placed(
    samples: Sequence[Batch] | Batch,
    task: PlacedTask,
    mean: Sequence[float],
    std: Sequence[float],
    shift: bool = False,
    mirror: bool = False,
) -> Batch:
    """Makes a batch ready for the model, with targets that move with the images.

    Args:
        samples: uint8 images and their targets, one by one, or as a batch already: a tuple of images and targets.
        task: Knows the targets.
        mean: Per-channel mean, on a 0..1 scale.
        std: Per-channel standard deviation, on a 0..1 scale.
        shift: Whether to shift images by up to an eighth of their size.
        mirror: Whether this mirrors every other one too.
    """
    images: Any
    images, targets = samples if isinstance(samples, tuple) else zip(*samples, strict=True)
    pairs = list(zip(images, targets, strict=True))
    if shift:
        pairs = [_jittered(image, target, [255 * value for value in mean], mirror) for image, target in pairs]
    images = torch.stack([image for image, _ in pairs]) if pairs else images
    there = [task.moved(target) for _, target in pairs]
    return normalised(images, mean, std), task.join(there) if there else there  # of images that none could be read of


def _jittered(image: Tensor, target: Any, fill: list[float], mirror: bool) -> tuple[Tensor, Any]:
    """One image and its target, shifted and perhaps mirrored; what comes in from outside is grey, and has no class."""
    height, width = image.shape[-2:]
    down, right = ((2 * torch.rand(2) - 1) * torch.tensor([height // 8, width // 8])).round().tolist()
    flipped = mirror and bool(torch.rand(()) < 0.5)

    def move(tensor: Any) -> Any:
        filling = fill if isinstance(tensor, tv_tensors.Image) else _outside(tensor)
        tensor = transforms.horizontal_flip(tensor) if flipped else tensor
        return transforms.affine(tensor, 0, [int(right), int(down)], 1.0, [0.0, 0.0], fill=filling)

    return move(tv_tensors.Image(image)).as_subclass(Tensor), moved(target, move)


def _outside(tensor: Tensor) -> list[float] | None:
    """What a mask has beyond its border: no class, or, of floats, no depth."""
    if not isinstance(tensor, tv_tensors.Mask):
        return None
    return [0.0] if tensor.is_floating_point() else [float(IGNORED)]
