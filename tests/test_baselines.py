"""What pruning must beat besides other criteria, on the digits."""

import pytest
import torch
from torch import nn

import scap_hub
from scap_hub.errors import RecipeError
from scap_hub.run import baselines
from tests.nets import tiny_net
from tests.test_comparison import QUICK
from tests.test_pruning import images

SMALL = {split: images(16, size=32, classes=10) for split in ("train", "validation")}

TRAINED = QUICK | {
    "seeds": 1, "criterion": "l1", "data_batch_size": 32,
    "finetune_epochs": 1, "finetune_dense_epochs": 4, "finetune_learning_rate": 0.01,
}  # fmt: skip


@pytest.fixture(scope="module")
def found():
    criteria = ["l1", "scratch", "scratch-2x"]
    return scap_hub.compare(tiny_net(), "digits", criteria=criteria, targets=["macs=0.6"], **TRAINED)


def test_from_scratch_is_the_same_network_with_nothing_of_what_was_learned(found):
    pruned, once, twice = found.cells
    assert pruned["macs"] == once["macs"] == twice["macs"] and pruned["params"] == once["params"]
    assert once["repaired"] == twice["repaired"] < 0.3 < pruned["repaired"], "before its training it only guesses"
    assert once["repaired"] + 0.3 < once["validation"] < pruned["validation"]


def test_twice_as_long_trains_for_twice_the_steps(monkeypatch):
    settings = []
    whole = baselines.finetune
    monkeypatch.setattr(baselines, "finetune", lambda *a, **k: settings.append(a[2]) or whole(*a, **k))
    scap_hub.compare(tiny_net(), "digits", criteria=["scratch", "scratch-2x"], targets=["macs=0.6"], **TRAINED)
    assert [own.epochs for own in settings] == [1, 2]


def test_a_smaller_model_of_the_zoo_stands_at_the_nearest_target_and_other_weights_of_it_are_measured(
    tmp_path, monkeypatch
):
    arguments = TRAINED | {
        "model": "resnet34", "dataset": SMALL, "criteria": ["zoo:resnet18"], "output": tmp_path / "out.json",
        "targets": ["macs=0.9", "params=0.5", "macs=0.1"], "model_pretrained": False,
        "model_input_size": (3, 32, 32), "data_calibration_images": 8,
    }  # fmt: skip
    (cell,) = scap_hub.compare(**arguments).cells
    assert cell["target"] == "params=0.5" and 0.5 < cell["params"] < 0.6
    assert cell["validation"] >= cell["repaired"]
    assert scap_hub.compare(**arguments).cells == [cell]

    def better(*own, whole=baselines.load_model):
        loaded = whole(*own)
        loaded.module.fc.bias.data += 1
        return loaded

    monkeypatch.setattr(baselines, "load_model", better)
    assert scap_hub.compare(**arguments).cells != [cell]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("scratch", {"finetune_epochs": 0}, "'scratch' is trained for the fine-tuning's epochs, of which there are no"),
        ("zoo:resnet18", {"targets": ["ratio=0.5"]}, "resnet18 needs a target in MACs or parameters"),
        ("zoo:vit_tiny_patch16_224", {}, "wants its images as mean=.*std=.* the dense model as mean="),
    ],
)
def test_a_baseline_that_cannot_be_had_is_told(name, change, message):
    small = {"model_pretrained": False, "model_input_size": (3, 32, 32), "data_calibration_images": 8}
    with pytest.raises(RecipeError, match=message):
        scap_hub.compare("resnet34", SMALL, criteria=[name], **TRAINED | small | change)


def test_weights_that_cannot_be_drawn_anew_are_refused():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return x * self.scale[:, None, None]

    net = tiny_net()
    net = nn.Sequential(Scaled(), *net)
    found = scap_hub.compare(net, "digits", criteria=["scratch"], targets=["macs=0.6"], **TRAINED)
    assert "a Scaled has weights of its own, and no reset_parameters()" in found.cells[0]["error"]
