"""The seam of a task: one that is not classification trains, is measured, and is named on the card."""

from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import scap_hub
from scap_hub.errors import DataError
from scap_hub.hub.card import Measured, model_card
from scap_hub.run.report import measure
from scap_hub.tasks import Meter, Metric, Task
from scap_hub.training.data import load_data
from scap_hub.training.evaluate import evaluate
from scap_hub.zoo import load_model
from tests.nets import Residual


class Pixels(Meter):
    def __init__(self):
        self.right = self.pixels = self.loss = self.images = 0

    def add(self, output, targets):
        self.right += int((output.argmax(1) == targets).sum())
        self.pixels += targets.numel()
        self.loss += float(F.cross_entropy(output, targets)) * len(targets)
        self.images += len(targets)

    def result(self):
        return {"pixels": self.right / self.pixels, "loss": self.loss / self.images, "images": self.images}


class Segmentation(Task):
    """A class for each pixel: targets (N, H, W), outputs (N, classes, H, W)."""

    name: ClassVar[str] = "image-segmentation"
    metric: ClassVar[Metric] = Metric("pixels", "pixel accuracy", "Pixel accuracy", "pixel_accuracy")

    def target_column(self, kinds, asked, listing):
        return asked

    def class_names(self, feature):
        return None

    def targets(self, rows, column, num_classes, where):
        return None

    def target(self, value, num_classes, where):
        return torch.tensor(value)

    def check(self, targets, num_classes, where):
        if targets.ndim != 3:
            raise DataError(f"{where} has no maps of classes")

    def output(self, model, images):
        return model(images).float()

    def loss(self, output, targets, label_smoothing=0.0):
        return F.cross_entropy(output, targets, label_smoothing=label_smoothing)

    def distance(self, output, guide, temperature):
        return (output - guide).square().mean()

    def partners(self, targets):
        return targets.flip(0)

    def meter(self, device):
        return Pixels()


def bright_pixels():
    images = torch.rand(64, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(images, (images[:, 0] > 0.5).long()), batch_size=16)
    return load_data({"train": loader, "validation": loader}, None, task=Segmentation())


def test_a_task_of_another_kind_trains_and_is_measured():
    data, net = bright_pixels(), nn.Conv2d(1, 2, 1)
    with torch.no_grad():
        net.weight.zero_(), net.bias.copy_(torch.tensor([1.0, 0.0]))
    teacher = nn.Conv2d(1, 2, 1)
    with torch.no_grad():
        teacher.weight.copy_(torch.tensor([-8.0, 8.0])[:, None, None, None])
        teacher.bias.copy_(torch.tensor([4.0, -4.0]))
    history = scap_hub.finetune(net, data, teacher=teacher, epochs=20, learning_rate=0.3)
    assert history[0]["pixels"] < 0.6 < 0.95 < max(row["pixels"] for row in history)
    assert "top1" not in history[-1]
    found = evaluate(net, data.validation, task=data.task)
    assert found["pixels"] == max(row["pixels"] for row in history), "the best epoch's weights are kept"
    assert measure(net, (1, 6, 6), data).top1 == found["pixels"], "the report's one number for quality"


def test_its_targets_are_checked():
    loader = DataLoader(TensorDataset(torch.rand(4, 1, 6, 6), torch.zeros(4).long()), batch_size=4)
    with pytest.raises(DataError, match="the DataLoader has no maps of classes"):
        load_data(loader, None, task=Segmentation())
    unlabelled = DataLoader(TensorDataset(torch.rand(4, 1, 6, 6)), batch_size=4)
    with pytest.raises(DataError, match="Pixel accuracy needs labels"):
        evaluate(nn.Conv2d(1, 2, 1), unlabelled, task=Segmentation())


def test_its_card_has_its_names():
    loaded = load_model(Residual(), input_size=(3, 32, 32))
    groups = scap_hub.channel_groups(loaded.module, torch.zeros(1, 3, 32, 32))
    measured = Measured({"top1": 0.5}, {"top1": 0.25}, dataset="pixels", task=Segmentation())
    card = model_card(loaded, scap_hub.PruningPlan.from_keep(groups, {}), measured)
    assert "pipeline_tag: image-segmentation" in card and "type: pixel_accuracy" in card
    assert "| Pixel accuracy (pixels) | 50.00% | 25.00% |" in card and "classification" not in card.split("---")[1]
