"""Models of which nothing is known but that they have outputs, and tasks of the caller's own."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import scap_hub
from scap_hub.errors import DataError
from scap_hub.tasks import Outputs, task_named
from scap_hub.training.evaluate import evaluate
from tests.scenes import FAST
from tests.test_tasks import Segmentation

OPTIONS = {
    **FAST,
    "model_input_size": None,
    "finetune_learning_rate": 3e-4,
    "target": "macs=0.6",
    "repair_tune_steps": 20,
}


class Pair(nn.Module):
    """Returns a map and a vector, in a dictionary, and a number of images."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
        self.map, self.vector = nn.Conv2d(16, 2, 1), nn.Linear(16, 5)

    def forward(self, x):
        x = self.body(x)
        return {"map": self.map(x), "both": (self.vector(x.mean((2, 3))), len(x))}


def images(count=48, seed=0):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_a_module_of_any_outputs_follows_its_dense_self(tmp_path):
    torch.manual_seed(0)
    module = Pair()
    loader = DataLoader(TensorDataset(images(), torch.zeros(48, 2, 2), torch.arange(48)), batch_size=16)
    with pytest.raises(DataError, match="must yield"):
        scap_hub.prune(module, loader, task="image-classification", **OPTIONS)
    result = scap_hub.prune(module, loader, finetune_epochs=2, output_dir=tmp_path / "out", **OPTIONS)
    assert result.task.name == "outputs" and result.report.metric.name == "relative output error"
    assert result.report.before.top1 == 0 and 0 < result.report.after.top1 < 0.8
    assert result.report.after.macs < 0.65 * result.report.before.macs
    losses = [row["loss"] for row in result.report.history[1:]]
    assert len(losses) == 2 and losses[-1] < 1
    again = scap_hub.load(tmp_path / "out", model=Pair())
    assert torch.equal(again(images(2))["map"], result.model(images(2))["map"])


def test_the_output_error_is_that_of_its_formula():
    dense, other = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
    x = images(10)
    with torch.no_grad():
        wanted, found = dense(x).double(), other(x).double()
        error = (found - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
    loader = DataLoader(TensorDataset(x), batch_size=4)
    measured = evaluate(other, loader, task=Outputs(), teacher=dense)
    assert measured["output_error"] == pytest.approx(float(error), rel=1e-5) and measured["images"] == 10
    assert evaluate(dense, loader, task=Outputs(), teacher=dense)["output_error"] == 0
    with pytest.raises(DataError, match="give that as teacher"):
        evaluate(other, loader, task=Outputs())


def test_the_dense_model_alone_cannot_be_trained_on_its_own_outputs():
    with pytest.raises(DataError, match="learns from the dense model alone"):
        scap_hub.prune(Pair(), DataLoader(TensorDataset(images()), 16), finetune_dense_epochs=1, **OPTIONS)


def test_a_task_of_the_callers_own_is_used_as_it_is():
    torch.manual_seed(0)
    x = images()
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 2, 1))
    loader = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=16)
    data, fast = {"train": loader, "validation": loader}, {**OPTIONS, "finetune_learning_rate": 0.03}
    result = scap_hub.prune(net, data, task=Segmentation(), finetune_epochs=8, finetune_dense_epochs=8, **fast)
    assert result.report.metric.name == "pixel accuracy" and result.report.after.top1 > 0.8
    assert {"pixels", "validation_loss"} <= result.report.history[-1].keys()
    assert task_named("outputs").name == "outputs"
