"""Fashion-MNIST from Debian's package files: `datasets.DatasetDict` with train (60,000) and test (10,000)."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import datasets

FOLDER = Path("/usr/share/datasets/fashion-mnist")
LABELS = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def fashion_mnist(folder: Path = FOLDER) -> datasets.DatasetDict:
    """Reads Fashion-MNIST (Xiao et al., arXiv 1708.07747): 28 x 28 grey images, 10 classes.

    Raises:
        FileNotFoundError: Debian's package is not installed.
    """
    import datasets

    return datasets.DatasetDict(train=_split(folder, "train"), test=_split(folder, "t10k"))


def arrays(folder: Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 28, 28) and labels (N,), both uint8; the prefix is "train" or "t10k"."""
    images = _read(folder / f"{prefix}-images-idx3-ubyte.gz", header=16).reshape(-1, 28, 28)
    return images, _read(folder / f"{prefix}-labels-idx1-ubyte.gz", header=8)


def _split(folder: Path, prefix: str) -> datasets.Dataset:
    import datasets

    images, labels = arrays(folder, prefix)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=LABELS)})
    # PGM is a header and the bare pixels: nothing to compress.
    encoded = [{"bytes": b"P5 28 28 255\n" + image.tobytes(), "path": None} for image in images]
    return datasets.Dataset.from_dict({"image": encoded, "label": labels.tolist()}, features=features)


def _read(path: Path, header: int) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(
            f"Fashion-MNIST is not there ({path}); on Debian and Ubuntu: apt-get install dataset-fashion-mnist"
        )
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), dtype=np.uint8, offset=header)


if __name__ == "__main__":
    print(fashion_mnist())
