"""What is done to images between a file and a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from scap_hub.tasks import Batch
from scap_hub.zoo.base import Preprocessing

Collate = Callable[[Sequence[Batch]], Batch]


def pixels(image: Image.Image, preprocessing: Preprocessing) -> Tensor:
    """Resizes and crops an image to what a model takes: (C, H, W) uint8."""
    channels, height, width = preprocessing.input_size
    image = image.convert("L" if channels == 1 else "RGB")
    resampling = Image.Resampling[preprocessing.interpolation.upper()]
    # Resizing so that the crop is `crop_pct` of it, then cropping, is cropping that share and resizing it.
    border = (1 - preprocessing.crop_pct) / 2
    if preprocessing.crop_mode == "squash":
        left, top = border * image.width, border * image.height
        image = image.resize((width, height), resampling, (left, top, image.width - left, image.height - top))
    else:
        image = ImageOps.fit(image, (width, height), method=resampling, bleed=border)
    return torch.from_numpy(np.array(image)).reshape(height, width, channels).permute(2, 0, 1)


def finish(
    samples: Sequence[Batch] | Batch,
    collate: Collate,
    mean: Sequence[float],
    std: Sequence[float],
    shift: bool = False,
    mirror: bool = False,
) -> Batch:
    """Makes a batch ready for the model: augments it if asked, and normalises it.

    Args:
        samples: uint8 images and their targets, one by one or as a batch already.
        collate: Joins single ones.
        mean: Per-channel mean, on a 0..1 scale.
        std: Per-channel standard deviation, on a 0..1 scale.
        shift: Whether to augment, see `augment`.
        mirror: Whether this mirrors images too.
    """
    images, *targets = as_batch(samples, collate)
    if shift:
        images = augment(images, mirror)
    images = transforms.to_dtype(images, torch.float32, scale=True)
    return (transforms.normalize(images, list(mean), list(std)), *targets)


def as_batch(samples: Sequence[Batch] | Batch, collate: Collate) -> Batch:
    """A batch from what a data set gives: a ready batch, which is a tuple, or a list of samples."""
    return samples if isinstance(samples, tuple) else collate(samples)


def augment(images: Tensor, mirror: bool) -> Tensor:
    """Shifts each image by up to an eighth of its size, repeating the border, and mirrors every other one."""
    count, channels, height, width = images.shape
    rows, columns = _shifted(count, height), _shifted(count, width)
    if mirror:
        columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
    which, channel = torch.arange(count)[:, None, None, None], torch.arange(channels)[None, :, None, None]
    return images[which, channel, rows[:, None, :, None], columns[:, None, None, :]]


def _shifted(count: int, size: int) -> Tensor:
    """For each of `count` images, where along an axis of `size` pixels each pixel is taken from, (count, size)."""
    reach = size // 8
    return (torch.arange(size) + torch.randint(-reach, reach + 1, (count, 1))).clamp(0, size - 1)
