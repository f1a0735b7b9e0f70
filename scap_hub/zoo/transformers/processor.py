"""What an image processor of transformers does to images, seen by using it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor

from scap_hub.zoo.base import Pixels, Preprocessing

_SIZES = ((320, 250), (250, 320))
"""(width, height) of two images; a processor that makes both the same size has one input size."""
_Seen = tuple[tuple[int, int, int] | None, tuple[float, ...], tuple[float, ...]]
"""Input size, None for several; mean and standard deviation, on a 0..1 scale."""


def observed_preprocessing(document: dict[str, Any], written: Preprocessing) -> Preprocessing:
    """The input size, mean and standard deviation that a processor applies, whatever its entries are called.

    Args:
        document: The image processor's.
        written: What its usual entries say; stays where the processor does something else than resize and normalise. So
            does its input size, where the processor makes images of several sizes.
    """
    seen = _observed(document, written.input_size[0])
    if seen is None:
        return written
    size, mean, std = seen
    known = (
        np.allclose([mean, std], [written.mean, written.std], atol=1e-4) if len(mean) == len(written.mean) else False
    )
    sized = replace(written, input_size=size or written.input_size)
    return sized if known else replace(sized, mean=mean, std=std)


def processor_pixels(document: dict[str, Any], preprocessing: Preprocessing) -> Pixels | None:
    """Images as a processor makes them, of one size also where it makes several; None where it makes another."""
    wanted = preprocessing.input_size
    found = _making(wanted, document, *_of_one_size(document, wanted))
    return found and _ProcessorPixels(_processor(found[0]), *map(torch.tensor, found[1][1:]))


def resized(document: dict[str, Any], own: Preprocessing, wanted: tuple[int, int, int]) -> dict[str, Any] | None:
    """The document of a processor that makes images of another size: of all its sizes in proportion, or of this one.

    Args:
        document: The image processor's.
        own: What it does now.
        wanted: (channels, height, width) in pixels.

    Returns:
        In proportion too where the processor makes several sizes, whatever is asked; None where it makes another one,
        so that nobody takes that for the model's.
    """
    factors = [new / old for new, old in zip(wanted[1:], own.input_size[1:], strict=True)]
    sizes: dict[str, Any] = {
        name: {key: round(value * factors["width" in key]) for key, value in document[name].items() if value}
        for name in ("size", "crop_size", "pad_size")
        if isinstance(document.get(name), dict)
    }
    if document.get("crop_pct") and not document.get("do_center_crop"):
        sizes["crop_pct"] = own.crop_pct  # ConvNext's processor would squash large images and crop small ones
    scaled = document | sizes
    if found := _making(wanted, scaled, *_of_one_size(document, wanted)):
        return found[0]
    seen = _observed(scaled, wanted[0])
    return scaled if seen is None or seen[0] is None else None


def makes_other_sizes(document: dict[str, Any], wanted: tuple[int, int, int]) -> bool:
    """Whether a processor makes images of other sizes than the wanted one; not where it does more than resize."""
    seen = _observed(document, wanted[0])
    return seen is not None and seen[0] != wanted


def _making(wanted: tuple[int, int, int], *documents: dict[str, Any]) -> tuple[dict[str, Any], _Seen] | None:
    """The first document whose processor makes images of one size, the wanted one; with what it makes."""
    for document in documents:
        seen = _observed(document, wanted[0])
        if seen is not None and seen[0] == wanted:
            return document, seen
    return None


def _of_one_size(document: dict[str, Any], wanted: tuple[int, int, int]) -> list[dict[str, Any]]:
    """The document with a plain resize to one size; with a crop, for processors that always keep proportions."""
    kind = getattr(transformers, document["image_processor_type"], None)
    size = {"height": wanted[1], "width": wanted[2]}
    others = {name: False for name in ("do_center_crop", "do_pad", "keep_aspect_ratio") if hasattr(kind, name)}
    squashed = document | others | {"size": size, "do_resize": True}
    exactly = squashed | ({"size_divisor": 1} if hasattr(kind, "size_divisor") else {})
    covering = {"size": {"shortest_edge": max(wanted[1:])}, "do_resize": True}
    return [squashed, exactly, document | covering | {"do_center_crop": True, "crop_size": size}]


@dataclass(frozen=True)
class _ProcessorPixels:
    """A processor without its normalisation: undone, because not all of them can leave it out."""

    processor: Any
    mean: Tensor
    std: Tensor

    def __call__(self, image: Image.Image) -> Tensor:
        values = _run(self.processor, image) * self.std[:, None, None] + self.mean[:, None, None]
        return (values * 255).round().clamp(0, 255).to(torch.uint8)


def _observed(document: dict[str, Any], channels: int) -> _Seen | None:
    """What a processor makes of images; None where that is not all it does."""
    mode, white = ("L", 255) if channels == 1 else ("RGB", (255,) * 3)
    try:
        processor = _processor(document)
        sizes = {tuple(_run(processor, Image.new(mode, size)).shape) for size in _SIZES}
        black, bright = (_middle(_run(processor, Image.new(mode, (256, 256), colour))) for colour in (0, white))
    except Exception:
        return None  # it wants more than an image, or makes no tensor of it
    if len(black) != channels or not (bright > black).all():
        return None
    std = 1 / (bright - black)
    mean = (0 - black) * std  # 0, not -0, where nothing is subtracted
    size = sizes.pop() if len(sizes) == 1 else None
    return size, tuple(mean.tolist()), tuple(std.tolist())  # type: ignore[return-value]


def _middle(pixels: Tensor) -> Tensor:
    """The pixel in the middle, because some processors pad."""
    return pixels.double()[:, pixels.shape[1] // 2, pixels.shape[2] // 2]


def _processor(document: dict[str, Any]) -> Any:
    return getattr(transformers, document["image_processor_type"]).from_dict(document)


def _run(processor: Any, image: Image.Image) -> Tensor:
    return processor(image, return_tensors="pt")["pixel_values"][0].float()
