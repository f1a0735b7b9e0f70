"""What is done to images between a file and a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import timm.data
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from scap_hub.tasks import Batch
from scap_hub.zoo.base import Pixels, Preprocessing

Collate = Callable[[Sequence[Batch]], Batch]


def upright(image: Image.Image, channels: int) -> Image.Image:
    """An image as all zoos' pipelines start from it: turned as its EXIF entry says, 8 bits, grey or RGB.

    Args:
        image: In any mode of PIL; of an animation, its current frame.
        channels: 1 for grey, else RGB; transparency is left out, as PIL and the zoos do.

    Raises:
        ValueError: Integers or floats whose range nobody knows.
    """
    return _eight_bits(ImageOps.exif_transpose(image)).convert("L" if channels == 1 else "RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scales 16 bits to 8, where PIL would cut off everything above 255 and leave a white image."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    least, most = float(values.min()), float(values.max())
    if image.mode.startswith("I;16") or (image.mode == "I" and least >= 0 and 255 < most <= 65535):
        return Image.fromarray((values.astype(np.float64) / 257).round().astype(np.uint8))
    if not (least >= 0 and most <= 255) or (image.mode == "F" and most <= 1 and (values % 1).any()):
        raise ValueError(
            f"its pixels, of mode {image.mode!r}, run from {least:g} to {most:g}, and what is white is unknown: save "
            "it with 8 or 16 bits"
        )
    return image


def pixels_of(preprocessing: Preprocessing) -> Pixels:
    """Resizes and crops as timm does for that preprocessing: an image to (C, H, W) uint8."""
    return timm.data.create_transform(
        preprocessing.input_size,
        interpolation=preprocessing.interpolation,
        crop_pct=preprocessing.crop_pct,
        crop_mode=preprocessing.crop_mode,
        mean=preprocessing.mean,  # of the border, where the crop mode has one
        use_prefetcher=True,  # which leaves the numbers as they are
    )


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
    return (normalised(images, mean, std), *targets)


def normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images as the model takes them, float32, from uint8; mean and std are per channel, on a 0..1 scale."""
    return transforms.normalize(transforms.to_dtype(images, torch.float32, scale=True), list(mean), list(std))


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
