"""Semantic segmentation, from a model and a data set with masks to a pruned model and its mean IoU."""

import json

import datasets
import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import scap_hub
from scap_hub.errors import DataError, RecipeError
from scap_hub.recipe import DataSettings
from scap_hub.run.inputs import load_dense
from scap_hub.run.stages import Stages
from scap_hub.tasks import SemanticSegmentation, task_of
from scap_hub.training.data import load_data
from scap_hub.training.evaluate import evaluate
from scap_hub.training.finetune import finetune
from scap_hub.zoo import load_model
from scap_hub.zoo.base import default_preprocessing
from tests.scenes import FAST, SIZE, masked, rows, scenes, segmenter

STAGES = ["stage1", "stage2", "stage3", "stage4"]


def data_of(dataset, model=None, **overrides):
    """Model and data as `prune` reads them."""
    recipe = scap_hub.Recipe.resolve(None, **{**FAST, **overrides})
    return load_dense(model or segmenter(), dataset, recipe, Stages(0))


def test_a_segmenter_is_pruned_and_training_brings_its_mean_iou_back(tmp_path):
    result = scap_hub.prune(
        segmenter(), masked(64), target="macs=0.4", finetune_dense_epochs=4, finetune_epochs=3,
        repair_least_squares=False, repair_batch_norm=False,
        output_dir=tmp_path / "out", **FAST,
    )  # fmt: skip
    report, history = result.report, result.report.history
    assert result.task.name == "semantic-segmentation" and report.metric.name == "mIoU"
    assert report.after.macs < 0.42 * report.before.macs and report.verified < 1e-9
    assert history[-1]["mean_iou"] > history[0]["mean_iou"] + 0.1 and report.after.top1 > 0.6
    assert report.after.top1 == max(row["mean_iou"] for row in history)
    assert 0.8 < report.after.others["pixel accuracy"] <= 1
    assert [row[0] for row in report.rows()][3:5] == ["mIoU", "pixel accuracy"]
    x = torch.rand(2, *SIZE)
    assert torch.equal(scap_hub.load(tmp_path / "out")(x).logits, result.model(x).logits)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: image-segmentation" in card and "Mean IoU" in card


def test_the_mean_iou_is_that_of_its_formula():
    images = torch.zeros(2, 3, 4, 4)
    truth = torch.tensor([[[0, 0, 1, 1]] * 4, [[2, 2, 255, 255]] * 4])

    class Says(nn.Module):
        def forward(self, x):
            said = torch.tensor([[[0, 1, 1, 1]] * 4, [[2, 2, 0, 0]] * 4])[: len(x)]
            return nn.functional.one_hot(said, 4).permute(0, 3, 1, 2).float() + 0 * x.sum()

    task = task_of(load_model(nn.Conv2d(3, 4, 1)), "semantic-segmentation")
    loader = DataLoader(TensorDataset(images, truth), batch_size=2)
    data = load_data({"train": loader, "validation": loader}, None, task=task, num_classes=4)
    found = evaluate(Says(), data.validation, task=data.task)
    # class 0: 4 of 8 pixels, class 1: 8 of 12, class 2: all; class 3 occurs nowhere.
    assert found["mean_iou"] == pytest.approx((4 / 8 + 8 / 12 + 1) / 3)
    assert found["pixel_accuracy"] == pytest.approx(20 / 24)


def test_the_loss_is_the_models_own():
    config = hf.ConvNextConfig(
        hidden_sizes=[8, 12, 16, 20], depths=[1] * 4, out_features=[f"stage{i}" for i in range(1, 5)]
    )
    torch.manual_seed(0)
    model = hf.UperNetForSemanticSegmentation(
        hf.UperNetConfig(
            backbone_config=config, hidden_size=16, num_labels=3, auxiliary_channels=8, auxiliary_in_channels=16
        )
    ).eval()
    loaded = load_model(model, input_size=SIZE)
    task = task_of(loaded)
    images, targets = torch.rand(2, *SIZE), torch.randint(0, 3, (2, 64, 64))
    targets[0, :9] = 255
    own = model(images, labels=targets).loss
    assert torch.equal(task.loss(task.output_for(model, images, targets), targets), own)
    plain = task.loss(task.output(model, images), targets)
    assert not torch.equal(plain, own), "its auxiliary head counts too"


def test_a_model_that_predicts_sets_of_masks_is_read_as_its_processor_does():
    torch.manual_seed(0)
    backbone = hf.SwinConfig(image_size=64, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=2,
                             out_features=STAGES)  # fmt: skip
    config = hf.Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        dim_feedforward=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=5, num_labels=3,
        train_num_points=32,
    )  # fmt: skip
    model = hf.Mask2FormerForUniversalSegmentation(config).eval()
    loaded = load_model(model, input_size=SIZE)
    task, images, targets = task_of(loaded), torch.rand(2, *SIZE), torch.randint(0, 3, (2, 64, 64))
    assert task.name == "semantic-segmentation"
    output = task.output_for(model, images, targets)
    assert output.own_loss.isfinite() and output.logits.shape[:2] == (2, 3)
    processor = hf.Mask2FormerImageProcessor()
    theirs = processor.post_process_semantic_segmentation(model(images), target_sizes=[(96, 96)] * 2)
    mine = nn.functional.interpolate(output.logits.exp(), (96, 96), mode="bilinear").argmax(1)
    assert (torch.stack(theirs) == mine).float().mean() > 0.97


def fast(name):
    """The image processor that transformers loads; 5.0 still has a slow one, whose numbers differ, of that name."""
    return getattr(hf, f"{name}Fast", None) or getattr(hf, name)


def processor_folder(path, model, processor):
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize(
    "processor",
    [
        fast("SegformerImageProcessor")(size={"height": 64, "width": 64}, do_reduce_labels=True),
        fast("MobileViTImageProcessor")(size={"shortest_edge": 72}, crop_size={"height": 64, "width": 64}),
    ],
    ids=["squashed", "cropped"],
)
def test_images_and_masks_are_those_of_the_models_own_processor(tmp_path, processor):
    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 255, (h, w, 3)).astype(np.uint8)) for h, w in ((50, 90), (80, 60))]
    masks = [Image.fromarray(draw.integers(0, 3, (image.height, image.width)).astype(np.uint8)) for image in images]
    folder = processor_folder(tmp_path / "model", segmenter(), processor)
    dataset = datasets.DatasetDict(train=rows(image=images * 6, mask=masks * 6), test=rows(image=images, mask=masks))
    _, data, _ = data_of(dataset, folder, model_input_size=None)
    ours = next(iter(data.test))
    # One by one: SegFormer's of transformers 5.0 gives the mask of the first image alone.
    theirs = [processor(*pair, return_tensors="pt") for pair in zip(images, masks, strict=True)]
    pixels, labels = (torch.cat([each[key] for each in theirs]) for key in ("pixel_values", "labels"))
    torch.testing.assert_close(ours[0], pixels.float(), atol=0.01, rtol=0)
    assert (ours[1] == labels).float().mean() > (0.999 if processor.do_reduce_labels else 0.95)


def test_a_mask_moves_with_its_image():
    _, data, _ = data_of(masked(32), data_augmentation="crop-flip")
    torch.manual_seed(0)
    images, masks = next(iter(data.train))
    bright = images[:, :2].amax(1) > 0.4
    assert (bright == (masks.eq(1) | masks.eq(2))).float().mean() > 0.995
    assert masks.eq(255).any() and not masks.eq(255).all(), "what comes in from outside has no class"


def test_without_masks_it_is_compared_with_the_dense_model():
    pictures = rows(image=[image for image, _, _ in scenes(40)])
    options = {**FAST, "finetune_learning_rate": 3e-4}
    report = scap_hub.prune(segmenter(), pictures, target="macs=0.7", finetune_epochs=3, **options).report
    assert report.metric.name == "relative output error"
    assert report.history[-1]["output_error"] < report.history[0]["output_error"]
    assert report.before.top1 == 0 < report.after.top1 == min(row["output_error"] for row in report.history)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"label": [0, 1] * 10},
            r"no column fits semantic-segm.*wants images of class numbers.*label \(ClassLabel",
        ),
        (
            {"annotation": [Image.new("L", (64, 64), 7)] * 20},
            r"class 7 in a mask of custom.train. is outside.*0\.\.2",
        ),
        ({"annotation": [Image.new("L", (32, 64))] * 20}, r"\(64, 32\).*its image \(64, 64\)"),
        ({"annotation": [Image.new("RGB", (64, 64))] * 20}, "mode 'RGB': give class numbers"),
        ({"annotation": [Image.new("L", (64, 64), 255)] * 20}, "no pixel of the masks has a class"),
    ],
)
def test_masks_that_do_not_fit_are_refused(columns, message):
    dataset = rows(image=[image for image, _, _ in scenes(20)], **columns)
    if "label" in columns:
        dataset = dataset.cast_column("label", datasets.ClassLabel(names=["a", "b"]))
    with pytest.raises(DataError, match=message):
        scap_hub.prune(segmenter(), dataset, finetune_epochs=0, **FAST)


def test_masks_of_0_and_255_are_told_of():
    """As binary masks are drawn: 255 is no class, so there is one class left."""
    masks = [mask.point(lambda value: 255 * (value > 0)) for _, mask, _ in scenes(20)]
    dataset = rows(image=[image for image, _, _ in scenes(20)], annotation=masks)
    with pytest.warns(UserWarning, match="in masks of 0 and 255, make 255 class 1"):
        scap_hub.prune(segmenter(), dataset, target="macs=0.7", finetune_epochs=0, repair_tune_steps=0, **FAST)


def test_a_single_logit_says_one_class_or_none():
    model, images, masks = segmenter(num_labels=1), torch.rand(2, *SIZE), torch.randint(0, 2, (2, 64, 64))
    masks[:, :9] = 255
    task = task_of(load_model(model, input_size=SIZE))
    task.check(masks, 1, "here")
    with torch.no_grad():
        said = nn.functional.interpolate(model(images).logits, (64, 64), mode="bilinear")[:, 0][masks < 255]
        output = task.output_for(model, images, masks)
    true, meter = masks[masks < 255], task.meter(torch.device("cpu"))
    expected = nn.functional.binary_cross_entropy_with_logits(said, true.float())
    assert torch.allclose(task.loss(output, masks), expected)
    meter.add(output, masks)
    both = [((said > 0) == number, true == number) for number in (0, 1)]
    overlaps = [float((own & other).sum() / (own | other).sum()) for own, other in both]
    assert meter.result()["mean_iou"] == pytest.approx(sum(overlaps) / 2)
    with pytest.raises(DataError, match=r"class 5 in a mask of the images that are measured is outside.*0\.\.1"):
        meter.add(output, torch.where(masks == 1, 5, masks))


def test_an_unreadable_image_may_be_all_of_a_batch():
    whole, kept = masked(4), datasets.Image(decode=False)
    broken = [row | ({"image": {"bytes": b"none", "path": None}} if not number else {})
              for number, row in enumerate(whole.cast_column("image", kept))]  # fmt: skip
    test = datasets.Dataset.from_list(broken, features=whole.features)
    settings = DataSettings(batch_size=1, max_broken=0.5)
    source = datasets.DatasetDict(train=whole, test=test)
    data = load_data(source, default_preprocessing(SIZE), settings, task=SemanticSegmentation(), num_classes=3)
    assert evaluate(segmenter(), data.test, task=data.task)["images"] == 3


def test_masks_of_a_loader_have_the_size_of_their_images():
    loader = DataLoader([(torch.rand(3, 64, 96), torch.zeros(96, 64).long())] * 4, 2)
    with pytest.raises(DataError, match=r"target of the DataLoader is \(96, 64\) pixels.*its image \(64, 96\)"):
        load_data(loader, None, task=SemanticSegmentation())


def test_what_means_nothing_for_masks_is_refused():
    with pytest.raises(RecipeError, match=r"finetune\.mixup means nothing for semantic-segmentation"):
        finetune(segmenter(), masked(20), mixup=0.2, epochs=1, input_size=SIZE)
    with pytest.raises(DataError, match="has no head for semantic-segmentation"):
        data_of(masked(20), hf.SegformerModel(segmenter().config), task="semantic-segmentation")
    with pytest.raises(RecipeError, match="did you mean 'semantic-segmentation'"):
        data_of(masked(20), task="semantic_segmentation")


def test_a_head_for_another_task_is_built_where_the_name_is_given(tmp_path):
    folder = processor_folder(
        tmp_path / "model", hf.SegformerForImageClassification(segmenter().config),
        hf.SegformerImageProcessor(size={"height": 64, "width": 64}),
    )  # fmt: skip
    assert load_model(folder).name == "SegformerForImageClassification"
    loaded, data, _ = data_of(masked(20), folder, task="semantic-segmentation")
    assert (loaded.name, data.task.name) == ("SegformerForSemanticSegmentation", "semantic-segmentation")
    assert json.loads(json.dumps(loaded.config))["architectures"] == ["SegformerForSemanticSegmentation"]


class Drawn(torch.utils.data.Dataset):
    """Pairs of PIL images."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return scenes(20)[index][:2]


@pytest.mark.parametrize(
    "source",
    [
        lambda: masked(20).to_iterable_dataset(num_shards=2),
        Drawn,
        lambda: DataLoader([{"pixel_values": torch.rand(SIZE), "labels": torch.zeros(64, 64).long()}] * 8, 4),
    ],
    ids=["stream", "torch data set", "loader of dictionaries"],
)
def test_masks_come_from_streams_torch_data_sets_and_loaders(source):
    settings = DataSettings(batch_size=4)
    data = load_data(source(), default_preprocessing(SIZE), settings, task=SemanticSegmentation(), num_classes=3)
    images, masks = next(iter(data.train))
    assert images.shape == (4, *SIZE) and masks.shape == (4, 64, 64) and masks.dtype == torch.int64
    assert data.task.name == "semantic-segmentation" and data.task.metric.name == "mIoU"
