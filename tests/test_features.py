"""Feature extraction: models without a head keep their features, and neighbours of one class stay neighbours."""

import datasets
import pytest
import timm
import torch
import transformers as hf

import scap_hub
from scap_hub.errors import DataError
from scap_hub.tasks import task_of
from scap_hub.tasks.features import nearest_accuracy
from scap_hub.training.data import load_data
from scap_hub.training.evaluate import evaluate
from scap_hub.zoo import load_model
from tests.scenes import FAST, SIZE, masked, rows, scenes, settled


def labelled(count):
    """Pictures of which every other one has its colours turned."""
    pictures = [image for image, _, _ in scenes(count)]
    turned = [image if i % 2 else image.convert("L").convert("RGB") for i, image in enumerate(pictures)]
    found = rows(image=turned, label=[i % 2 for i in range(count)])
    return found.cast_column("label", datasets.ClassLabel(names=["grey", "colour"]))


def test_a_headless_timm_model_keeps_its_features():
    torch.manual_seed(0)
    model = settled(timm.create_model("resnet10t", num_classes=0))
    options = {**FAST, "finetune_learning_rate": 5e-4}
    result = scap_hub.prune(model, labelled(48), "features", target="macs=0.7", finetune_epochs=2, **options)
    report = result.report
    assert result.task.name == "image-feature-extraction" and report.metric.name == "feature cosine"
    assert report.before.top1 == pytest.approx(1) and 0.6 < report.after.top1 < 1
    assert {"kNN top-1"} == report.after.others.keys() and report.after.others["kNN top-1"] > 0.7
    assert report.after.top1 == pytest.approx(max(row["cosine"] for row in report.history))


def test_neighbours_vote_without_the_image_itself():
    vectors = torch.nn.functional.normalize(torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]]))
    assert nearest_accuracy(vectors, torch.tensor([0, 0, 1, 1])) == 1
    assert nearest_accuracy(vectors, torch.tensor([0, 1, 2, 2])) == 0.5
    assert nearest_accuracy(vectors, torch.tensor([-5, -5, 10**12, 10**12])) == 1


@pytest.mark.parametrize(
    "model",
    [
        lambda: hf.ConvNextV2Model(hf.ConvNextV2Config(hidden_sizes=[8, 12, 16, 20], depths=[1] * 4)),
        lambda: hf.ResNetBackbone(hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1],
                                                  layer_type="basic", out_features=["stage1", "stage2"])),
        lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                                       num_attention_heads=2, image_size=64, patch_size=16)),
    ],
    ids=["model", "backbone", "tower"],
)  # fmt: skip
def test_transformers_models_without_a_head(model):
    torch.manual_seed(0)
    loaded = load_model(model(), input_size=SIZE)
    task = task_of(loaded)
    assert task.name == "image-feature-extraction" and loaded.num_classes == 0
    data = load_data(rows(image=[image for image, _, _ in scenes(20)]), loaded.preprocessing, task=task)
    found = evaluate(loaded.module, data.validation, task=data.task, teacher=loaded.module)
    assert found["cosine"] == pytest.approx(1) and "knn_top1" not in found


def test_a_classifier_by_name_can_lose_its_head_and_a_backbone_does_not_take_masks():
    assert load_model("resnet10t", pretrained=False, task="image-feature-extraction").num_classes == 0
    backbone = timm.create_model("resnet10t", num_classes=0)
    with pytest.raises(DataError, match=r"'annotation' looks like the targets of another task.*no head"):
        scap_hub.prune(backbone, masked(20), **FAST)
