"""Images in folders: which split and which class each one belongs to follows from its place, and from nothing else.

`datasets` looks for words such as "test" and "dev" anywhere in a path. A class "test tube" or a file "a-train-ride.jpg"
makes a split of it then, beside the training images or instead of them.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

from PIL import Image

from scap_hub.errors import DataError
from scap_hub.progress import tell

VALIDATION_SPLITS = ("validation", "valid", "val", "dev")
_WORDS = {
    "train": "train", "training": "train", **dict.fromkeys(VALIDATION_SPLITS, "validation"),
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
_BESIDE = {"", "data", "image", "images", "set", "split"}
"""Words that stand beside these, and name nothing that could be a class."""
_METADATA = {"metadata.csv", "metadata.jsonl", "metadata.parquet"}
"""Files that say more of the images than their places do; `datasets` reads them."""
_SHOWN = 3

_Placed = tuple[PurePath, tuple[str, ...]]
"""An image, relative to the folder that was given, and to its split: rose/1.jpg."""


def image_folder(path: Path) -> dict[str, Any] | None:
    """The splits of a folder of images, by name: `datasets.Dataset` of paths, and of labels where there are classes.

    Args:
        path: An existing folder.

    Returns:
        None where most files are something else, or where other files say what the images are.

    Raises:
        DataError: Which folder is the class of an image is unclear.
    """
    files, readable = _files(path), _extensions()
    kinds = Counter(file.suffix.lower() for file in files)
    if not kinds or kinds.most_common(1)[0][0] not in readable or _described(path, files):
        return None
    images = [file for file in files if file.suffix.lower() in readable]
    _tell_of(path, "no images by their names", [file for file in files if file.suffix.lower() not in readable])
    splits = _splits(images)
    _tell_of(path, "neither train nor validation nor test", [name for name in splits if name not in _WORDS.values()])
    classes = {split: [_class_of(image, below, path) for image, below in rows] for split, rows in splits.items()}
    names = sorted({name for found in classes.values() for name in found if name})
    # As for `datasets`, a single class is none.
    return {
        split: _rows([path / image for image, _ in rows], classes[split], names if len(names) > 1 else [])
        for split, rows in splits.items()
    }


def _files(path: Path) -> list[PurePath]:
    """All files below a folder, relative to it, but for hidden ones and what a Mac leaves in archives."""
    found = []
    for folder, below, files in os.walk(path, followlinks=True):
        below[:] = [name for name in below if _is_shown(name)]
        here = PurePath(folder).relative_to(path)
        found += [here / name for name in files if _is_shown(name)]
    return sorted(found)


def _is_shown(name: str) -> bool:
    return not name.startswith((".", "__"))


def _extensions() -> set[str]:
    """Of the images that PIL reads."""
    return {extension for extension, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def _described(path: Path, files: Sequence[PurePath]) -> bool:
    """Whether something else than its place says what an image is."""
    card = path / "README.md"
    configured = card.is_file() and re.search(r"^configs:", card.read_text("utf-8", "replace"), re.MULTILINE)
    return bool(configured) or any(file.name in _METADATA for file in files)


def _splits(images: Sequence[PurePath]) -> dict[str, list[_Placed]]:
    """The images of each split.

    Folders are splits if one is called so and there are folders in them; else if all have no other name than that of a
    split, because "train station" and "test tube" may be two classes.
    """
    placed = _unwrapped([(image, image.parts) for image in images])
    tops = {below[0] for _, below in placed if len(below) > 1}
    flat = all(len(below) < 3 for _, below in placed)
    if not any(map(_split_of, tops)) or (flat and not all(map(_is_no_class, tops))):
        return {"train": placed}
    splits: dict[str, list[_Placed]] = {}
    for image, below in placed:
        if len(below) == 1:
            raise _loose(image)
        splits.setdefault(_split_of(below[0]) or below[0], []).append((image, below[1:]))
    return {split: _unwrapped(rows) for split, rows in splits.items()}


def _split_of(name: str) -> str | None:
    """The split that a folder of this name holds: "train2017", "Test images"."""
    return next((_WORDS[word] for word in _words(name) if word in _WORDS), None)


def _is_no_class(name: str) -> bool:
    """Whether a folder's name says of which split it is, and nothing else."""
    return _split_of(name) is not None and {*_words(name)} <= {*_WORDS, *_BESIDE}


def _words(name: str) -> list[str]:
    return re.split(r"[-._ 0-9]+", name.lower())


def _unwrapped(placed: list[_Placed]) -> list[_Placed]:
    """Without a folder around all others, which is neither a split nor a class."""
    while all(len(below) > 2 for _, below in placed) and len({below[0] for _, below in placed}) == 1:
        if _split_of(placed[0][1][0]):
            break
        placed = [(image, below[1:]) for image, below in placed]
    return placed


def _class_of(image: PurePath, below: Sequence[str], path: Path) -> str | None:
    """The class of an image at this place in its split; None if it lies in no folder."""
    if len(below) > 2:
        raise DataError(
            f"which folder of {str(path)!r} is the class of {str(image)!r}? A class is one folder with its images in "
            "it, flowers/train/rose/1.jpg: move them there"
        )
    return below[0] if len(below) == 2 else None


def _rows(images: Sequence[Path], classes: Sequence[str | None], names: Sequence[str]) -> Any:
    import datasets

    columns: dict[str, Any] = {"image": list(map(str, images))}
    features: dict[str, Any] = {"image": datasets.Image()}
    if names and any(classes):
        if None in classes:
            raise _loose(images[classes.index(None)])
        numbers = {name: number for number, name in enumerate(names)}
        columns["label"] = [numbers[name] for name in classes if name]
        features["label"] = datasets.ClassLabel(names=list(names))
    return datasets.Dataset.from_dict(columns, datasets.Features(features))


def _loose(image: PurePath) -> DataError:
    return DataError(f"{str(image)!r} lies beside folders with other images: move it into one, or remove it")


def _tell_of(path: Path, what: str, names: Sequence[object]) -> None:
    """Says what of a folder is not used."""
    if names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        tell(f"left out of {str(path)!r}, {what}: {', '.join(map(str, names[:_SHOWN]))}{more}")
