"""Depth estimation: metric and inverse depths, from maps in a data set to what a report says."""

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

import scap_hub
from scap_hub.errors import DataError
from scap_hub.tasks import DepthEstimation, task_of
from scap_hub.training.data import load_data
from scap_hub.training.evaluate import evaluate
from scap_hub.zoo import load_model
from tests.scenes import FAST, SIZE, rows, scenes, settled


def glpn():
    torch.manual_seed(0)
    config = hf.GLPNConfig(
        hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, num_attention_heads=[1] * 4, sr_ratios=[4, 2, 1, 1],
        decoder_hidden_size=16, max_depth=6,
    )  # fmt: skip
    return hf.GLPNForDepthEstimation(config).eval()


def depth_anything():
    torch.manual_seed(0)
    backbone = hf.Dinov2Config(
        image_size=56, patch_size=14, hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
        out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False,
    )  # fmt: skip
    config = hf.DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=16, neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=16,
        head_hidden_size=8, patch_size=14,
    )  # fmt: skip
    return hf.DepthAnythingForDepthEstimation(config).eval()


def with_depths(count, seed=0):
    """Bright squares are near (1), the ground is far (4), and a strip is unknown (0)."""
    pictures = scenes(count, seed)
    maps = [np.where(np.asarray(mask) > 0, 1.0, 4.0).astype(np.float32) for _, mask, _ in pictures]
    for depths in maps:
        depths[:4] = 0
    return rows(image=[image for image, _, _ in pictures], depth_map=[Image.fromarray(depths) for depths in maps])


def test_a_metric_depth_model_is_pruned_and_trained():
    options = {**FAST, "finetune_distillation_weight": 0.0}
    result = scap_hub.prune(settled(glpn()), with_depths(48), target="macs=0.6", finetune_epochs=3, **options)
    report = result.report
    assert result.task.name == "depth-estimation" and report.metric.name == "delta1"
    assert report.history[-1]["validation_loss"] < report.history[0]["validation_loss"]
    assert report.after.macs < 0.62 * report.before.macs and 0 < report.after.others["AbsRel"] < 1


def test_the_loss_of_metric_depths_is_the_models_own():
    model, task = glpn(), DepthEstimation()
    images, depths = torch.rand(2, *SIZE), torch.rand(2, 64, 64) * 4
    depths[:, :9] = 0
    own = model(images, labels=depths)
    assert torch.allclose(task.loss(own.predicted_depth, depths), own.loss, atol=1e-6)


@pytest.mark.parametrize("keeps", [True, False])
def test_the_card_tells_of_an_image_processor_that_makes_other_sizes_than_were_measured(tmp_path, keeps):
    size = {"height": 64, "width": 64}
    squashing = hf.DPTImageProcessor(size=size, keep_aspect_ratio=False)
    glpn().save_pretrained(tmp_path / "model")
    (hf.GLPNImageProcessor() if keeps else squashing).save_pretrained(tmp_path / "model")
    untrained = FAST | {"repair_tune_steps": 0, "repair_least_squares": False}
    result = scap_hub.prune(str(tmp_path / "model"), with_depths(20), target="macs=0.9", finetune_epochs=0, **untrained)
    card = (result.save_pretrained(tmp_path / "out") / "README.md").read_text()
    published = hf.AutoImageProcessor.from_pretrained(tmp_path / "out")
    made = published(Image.new("RGB", (96, 128)), return_tensors="pt")["pixel_values"].shape[2:]
    assert made == ((128, 96) if keeps else (64, 64))
    assert ("measured on images of exactly this size; the image processor beside the\nweights makes" in card) is keeps


def test_figures_are_those_of_their_formulas():
    task = DepthEstimation()
    true, said = torch.tensor([[[1.0, 2.0], [4.0, 0.0]]]), torch.tensor([[[1.2, 3.0], [4.0, 9.0]]])
    meter = task.meter(torch.device("cpu"))
    meter.add(said, true)
    found = meter.result()
    assert found["delta1"] == pytest.approx(2 / 3) and found["abs_rel"] == pytest.approx((0.2 + 0.5) / 3)
    meter = task.meter(torch.device("cpu"))
    meter.add(true, 1000 * true)
    with pytest.warns(UserWarning, match="1000 times larger than the model's: give both in one unit"):
        meter.result()
    inverse = DepthEstimation(inverse=True)
    said = 3 * (1 / true.clamp(min=0.1)) + 5
    assert torch.allclose(inverse.depths(said, true)[true > 0], true[true > 0], rtol=1e-4)
    assert inverse.loss(said, true) < 1e-5 < inverse.loss(-said, true), "a scale may not be negative"


def test_a_relative_model_says_inverse_depths():
    model = depth_anything()
    loaded = load_model(model, input_size=(3, 56, 56))
    task = task_of(loaded)
    assert task == DepthEstimation(inverse=True)
    data = load_data(with_depths(20), loaded.preprocessing, task=task)
    found = evaluate(model, data.validation, task=data.task)
    assert 0 < found["delta1"] <= 1 and found["loss"] > 0


def test_maps_that_do_not_fit_are_refused():
    pictures = [image for image, _, _ in scenes(20)]
    for wrong, message in (
        (Image.new("RGB", (64, 64)), "not one number for each pixel"),
        (Image.new("F", (32, 64)), r"\(64, 32\).*its image \(64, 64\)"),
        (Image.new("F", (64, 64)), "no pixel of the depth maps has a depth"),
    ):
        with pytest.raises(DataError, match=message):
            scap_hub.prune(glpn(), rows(image=pictures, depth=[wrong] * 20), finetune_epochs=0, **FAST)
