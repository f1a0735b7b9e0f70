import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import custom_criterion
import fashion_mnist

import scap_hub
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


def test_custom_criterion_is_registered_by_its_definition():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 2, 1))
    groups = scap_hub.channel_groups(net, torch.zeros(1, 3, 5, 5))
    scores = scap_hub.score(net, [], "spread", groups=groups)["0"]
    expected = net[0].weight.detach().double().flatten(1).std(1)
    torch.testing.assert_close(scores, expected / expected.mean(), rtol=1e-5, atol=0)
    assert custom_criterion.Spread.name == "spread"
