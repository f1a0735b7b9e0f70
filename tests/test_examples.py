import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import fashion_mnist

from scap_hub.adapters.base import Preprocessing
from scap_hub.training.data import load_data


@pytest.mark.skipif(not fashion_mnist.FOLDER.is_dir(), reason="needs Debian's dataset-fashion-mnist package")
def test_fashion_mnist_from_debians_package():
    splits = fashion_mnist.fashion_mnist()
    assert {name: len(split) for name, split in splits.items()} == {"train": 60_000, "test": 10_000}
    data = load_data(splits, Preprocessing((1, 28, 28), (0.5,), (0.5,)), num_classes=10)
    images, labels = next(iter(data.test))
    assert data.labels[:2] == ["T-shirt/top", "Trouser"] and images.shape == (64, 1, 28, 28)
    assert labels[:4].tolist() == [9, 2, 1, 1]


def test_fashion_mnist_says_how_to_install_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        fashion_mnist.fashion_mnist(tmp_path)
