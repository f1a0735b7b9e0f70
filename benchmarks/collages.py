"""Scenes made of real pictures: Fashion-MNIST's items, tinted, on clutter, with their masks and boxes.

One module makes the data of both kinds of benchmark, so that a segmenter and a detector see the same images.
"""

from __future__ import annotations

import sys
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from fashion_mnist import FOLDER, LABELS, arrays

SIDE = 64
"""Of a scene, in pixels; items are 28 or 42 wide."""
_THRESHOLD = 24
"""A pixel darker than this is no part of an item."""


def collages(train: int, test: int, folder: Path = FOLDER) -> datasets.DatasetDict:
    """Scenes with the columns image, annotation (0 background, then the item's class plus 1) and objects.

    Args:
        train: Images made of Fashion-MNIST's training items; a sixth as many more are for validation.
        test: Images made of its test items.
        folder: Of the idx files.
    """
    counts = {"train": ("train", train), "validation": ("train", max(1, train // 6)), "test": ("t10k", test)}
    return datasets.DatasetDict(
        {
            name: _split(*arrays(folder, prefix), count, seed)
            for seed, (name, (prefix, count)) in enumerate(counts.items())
        }
    )


def _split(items: np.ndarray, labels: np.ndarray, count: int, seed: int) -> datasets.Dataset:
    rng = np.random.default_rng(seed)
    scenes = [_scene(items, labels, rng) for _ in range(count)]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "annotation": datasets.Image(),
            "objects": {
                "bbox": datasets.List(datasets.List(datasets.Value("float32"), length=4)),
                "category": datasets.List(datasets.ClassLabel(names=LABELS)),
            },
        }
    )
    return datasets.Dataset.from_list(scenes, features=features)


def _scene(items: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> dict[str, object]:
    """One to three items that hide no more than a third of each other, on scraps of other items."""
    image = np.zeros((SIDE, SIDE, 3), np.float32)
    for _ in range(12):
        _paste(image, items[rng.integers(len(items))][8:20, 8:20], rng.integers(SIDE - 12, size=2), rng, 0.5)
    image += rng.normal(0, 12, image.shape)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    boxes, categories = [], []
    for _ in range(rng.integers(1, 4)):
        number = rng.integers(len(items))
        item = np.kron(items[number], np.ones((3, 3), np.uint8))[::2, ::2] if rng.integers(2) else items[number]
        top, left = rng.integers(SIDE - len(item) + 1, size=2)
        inside = item > _THRESHOLD
        window = (slice(top, top + len(item)), slice(left, left + len(item)))
        if not inside.any() or (mask[window][inside] > 0).mean() > 1 / 3:
            continue
        _paste(image, item, (top, left), rng, 1.0)
        mask[window][inside] = labels[number] + 1
        rows, columns = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
        boxes.append([left + columns[0], top + rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1])
        categories.append(int(labels[number]))
    picture = Image.fromarray(image.clip(0, 255).astype(np.uint8))
    objects = {"bbox": [[float(side) for side in box] for box in boxes], "category": categories}
    return {"image": picture, "annotation": Image.fromarray(mask), "objects": objects}


def _paste(
    image: np.ndarray, item: np.ndarray, place: tuple[int, int], rng: np.random.Generator, bright: float
) -> None:
    top, left = place
    window = image[top : top + len(item), left : left + len(item)]
    inside = item > _THRESHOLD
    window[inside] = item[inside, None] * bright * rng.uniform(0.4, 1.0, 3)
