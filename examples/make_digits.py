"""Writes scap_hub/data/digits/{train,test}.parquet from scikit-learn's copy of the UCI digits."""

import io
from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


def png(pixels: np.ndarray) -> dict:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return {"bytes": buffer.getvalue(), "path": None}


def main() -> None:
    digits = load_digits()
    pixels = (digits.images * 255 / 16).round().astype(np.uint8)
    rows = datasets.Dataset.from_dict(
        {"image": [png(image) for image in pixels], "label": digits.target.tolist()},
        features=datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)])}
        ),
    )
    splits = rows.train_test_split(test_size=360, seed=0, stratify_by_column="label")
    folder = Path(__file__).parents[1] / "scap_hub" / "data" / "digits"
    for name, split in splits.items():
        split.to_parquet(folder / f"{name}.parquet")


if __name__ == "__main__":
    main()
