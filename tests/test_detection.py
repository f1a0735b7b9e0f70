"""Object detection: boxes that follow their images, the models' own losses, and mean average precision."""

import copy
import warnings

import datasets
import numpy as np
import pytest
import torch
import transformers as hf
from torch.utils.data import DataLoader

import scap_hub
from scap_hub.compensation import tune
from scap_hub.errors import DataError
from scap_hub.run.inputs import load_dense
from scap_hub.run.stages import Stages
from scap_hub.tasks import task_of
from scap_hub.tasks.detection import Detected, ObjectDetection
from scap_hub.tasks.outputs import unlabelled
from scap_hub.training.data import load_data
from scap_hub.training.data.geometry import Geometry
from scap_hub.zoo import load_model
from tests.scenes import FAST, SIZE, rows, scenes, settled


def backbone():
    return hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip


def rt_detr():
    torch.manual_seed(0)
    config = hf.RTDetrConfig(
        backbone_config=backbone(), encoder_hidden_dim=16, encoder_in_channels=[8, 16, 16], d_model=16, num_queries=10,
        encoder_ffn_dim=16, decoder_ffn_dim=16, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        num_denoising=4, decoder_in_channels=[16, 16, 16], num_labels=2, hidden_expansion=0.5,
    )  # fmt: skip
    return settled(hf.RTDetrForObjectDetection(config))


def yolos():
    torch.manual_seed(0)
    config = hf.YolosConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=[64, 64],
        patch_size=16, num_detection_tokens=8, num_labels=2,
    )  # fmt: skip
    return hf.YolosForObjectDetection(config).eval()


def boxed(count, names=("red", "green"), **changes):
    """With columns image and objects, as transformers' examples have them; the last image has no objects."""
    pictures = scenes(count)
    objects = [{"bbox": boxes, "category": [0, 1]} for _, _, boxes in pictures]
    objects[-1] = {"bbox": [], "category": []}
    for key, value in changes.items():
        objects[0] = {**objects[0], key: value}
    found = datasets.Dataset.from_list(
        [{"objects": own} for own in objects],
        features=datasets.Features(
            {"objects": {"bbox": datasets.List(datasets.List(datasets.Value("float32"))),
                         "category": datasets.List(datasets.ClassLabel(names=list(names)))}}
        ),
    )  # fmt: skip
    return found.add_column("image", rows(image=[image for image, _, _ in pictures]).with_format("arrow")[:]["image"])


def data_of(dataset, model, **overrides):
    recipe = scap_hub.Recipe.resolve(None, **{**FAST, **overrides})
    return load_dense(model, dataset.cast_column("image", datasets.Image()), recipe, Stages(0))


def test_boxes_follow_their_image_and_classes_their_names():
    model = yolos()
    model.config.id2label = {0: "green", 1: "red"}
    _, data, _ = data_of(boxed(40, names=("red", "green")), model, data_augmentation="crop-flip")
    torch.manual_seed(0)
    images, targets = next(iter(data.train))
    assert data.task.name == "object-detection" and len(targets) == len(images)
    right = 0
    for image, target in zip(images, targets, strict=True):
        for number, (x, y, w, h) in zip(target["class_labels"], (target["boxes"] * 64).tolist(), strict=True):
            channel = 1 - int(number)  # red pictures in channel 0
            inside = image[
                channel, round(y - h / 2) + 1 : round(y + h / 2) - 1, round(x - w / 2) + 1 : round(x + w / 2) - 1
            ]
            right += bool((inside > 0.4).float().mean() > 0.5)
    assert right > 0.8 * sum(len(target["class_labels"]) for target in targets), "the upper one may hide the other"


def test_a_loaders_images_without_objects_and_other_types_are_read():
    loaded = load_model(yolos(), input_size=SIZE)
    targets = [
        {"class_labels": torch.tensor([]), "boxes": torch.tensor([])},
        {"class_labels": [1], "boxes": np.full((1, 4), 0.5)},
    ]
    samples = [{"pixel_values": torch.rand(SIZE), "labels": target} for target in targets]
    data = load_data(DataLoader(samples, 2, collate_fn=joined), None, task=task_of(loaded))
    images, found = next(iter(data.train))
    assert [target["class_labels"].tolist() for target in found] == [[], [1]]
    assert torch.isfinite(loaded.module(pixel_values=images, labels=found).loss)
    targets[1]["class_labels"] = [0.5]
    with pytest.raises(DataError, match=r"are fractions, such as 0\.5: give integers"):
        load_data(DataLoader(samples, 2, collate_fn=joined), None, task=task_of(loaded))


def joined(samples):
    """As in transformers' examples."""
    return {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "labels": [sample["labels"] for sample in samples],
    }


@pytest.mark.parametrize("model", [pytest.param(rt_detr, marks=pytest.mark.slow), yolos])
def test_without_metrics_a_detector_is_pruned_repaired_and_trained_without_boxes(model):
    pictures = rows(image=[image for image, _, _ in scenes(24)])
    options = {**FAST, "finetune_learning_rate": 1e-4}
    result = scap_hub.prune(model(), pictures, target="params=0.9", finetune_epochs=1, **options)
    assert result.task.name == "object-detection" and result.report.metric.name == "relative output error"
    assert result.report.after.params < 0.91 * result.report.before.params and result.report.before.top1 == 0


@pytest.mark.parametrize("model", [rt_detr, yolos])
def test_the_loss_is_the_models_own_and_the_teacher_teaches(model):
    model = model()
    loaded, data, _ = data_of(boxed(24), model)
    task, (images, targets) = data.task, next(iter(data.validation))
    loss = task.loss(task.output_for(model, images, targets), targets)
    assert torch.equal(loss, model(images, labels=targets).loss) and loss > 0
    with torch.no_grad():
        guide = task.output(model, images)
    assert task.distance(guide, guide, 1.0).item() == pytest.approx(0, abs=1e-5)
    shuffled = Detected(guide.logits.flip(1), guide.boxes.flip(1))
    assert task.distance(shuffled, guide, 1.0).item() == pytest.approx(0, abs=1e-4), "queries are matched"
    other = Detected(guide.logits.clone().requires_grad_(), (guide.boxes * 0.9).requires_grad_())
    task.distance(other, guide, 1.0).backward()
    assert other.boxes.grad.abs().sum() > 0
    assert loaded.num_classes == 2


def test_a_detector_is_tuned_towards_the_queries_that_are_most_alike():
    """Which query finds an object may change: place by place the outputs of the same detections are far apart."""

    class Swapped(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, pixel_values):
            result = self.model(pixel_values)
            return type(result)(logits=result.logits.flip(1), pred_boxes=result.pred_boxes.flip(1))

    dense = rt_detr()
    _, data, _ = data_of(boxed(24), dense)
    batches = [next(iter(data.validation))[0]]
    for task in (data.task, unlabelled(data.task)):
        small = Swapped(copy.deepcopy(dense))
        before, after = tune(small, Swapped(small), batches, steps=0)
        assert before > 0.01, "place by place"
        before, after = scap_hub.tune(dense, small, batches, steps=1, task=task)
        assert after <= before < 1e-3


@pytest.mark.parametrize(
    ("model", "processor"), [(rt_detr, hf.RTDetrImageProcessor()), (yolos, hf.YolosImageProcessor())]
)
def test_detections_are_those_of_the_models_own_processor(model, processor):
    model = model()
    with torch.no_grad():
        result = model(torch.rand(2, *SIZE))
    theirs = processor.post_process_object_detection(result, threshold=0.0, target_sizes=None)
    ours = ObjectDetection(2).found(Detected(result.logits, result.pred_boxes))
    for mine, other in zip(ours, theirs, strict=True):
        assert all(torch.allclose(mine[key].float(), other[key].float()) for key in ("scores", "labels", "boxes"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bbox": [[60.0, 0, 24, 24], [0, 0, 5, 5]]}, r"box \[60\.0, 0\.0, 24\.0, 24\.0\].*not within its 64 x 64"),
        ({"bbox": [[30.0, 30, 50, 50], [0, 0, 5, 5]]}, "would fit as two corners"),
        ({"bbox": [[0.1, 0.1, 0.5, 0.5], [0.2, 0.2, 0.1, 0.1]]}, "all within 0 and 1"),
        ({"bbox": [[0.0, 0, 5, 5]]}, "1 boxes and 2 categories"),
        ({"bbox": [[0.0, 0, 5, 5], [0.0, float("nan"), 5, 5]]}, r"nan, 5\.0, 5\.0\] .* is not four finite numbers"),
        ({"bbox": [[0.0, 0, 5, None], [0.0, 0, 5, 5]]}, "None.* is not four finite numbers"),
        ({"bbox": [[0.0, 0, 5]] * 4}, r"box \[0\.0, 0\.0, 5\.0\] .* is not four finite numbers"),
    ],
)
def test_boxes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(DataError, match=message):
        _, data, _ = data_of(boxed(12, **changes), yolos())
        list(data.calibration), list(data.validation)


def test_the_smallest_boxes_count_and_crowds_do_not():
    task, size = ObjectDetection(2), (640, 640)
    value = {"bbox": [[8.0, 8, 6, 6], [100, 0, 9, 9], [0, 0, 0, 5]], "category": [0, 1, 1], "iscrowd": [0, 1, 0]}
    target = Geometry((64, 64), (64, 64))(task.read(value, size, 2, "here"))
    [found] = task.join([task.moved(target)])
    assert found["class_labels"].tolist() == [0]
    torch.testing.assert_close(found["boxes"], torch.tensor([[11.0, 11, 6, 6]]) / 640)
    with pytest.raises(DataError, match="3 boxes and 1 values of iscrowd"):
        task.read({**value, "iscrowd": [0]}, size, 2, "here")


def test_columns_and_batches_that_do_not_fit_are_refused():
    pictures = scenes(12)
    with pytest.raises(DataError, match=r"no column fits object-detection.*annotation"):
        both = rows(image=[image for image, _, _ in pictures], annotation=[mask for _, mask, _ in pictures])
        data_of(both, yolos())
    for name in ("label", "things"):
        with pytest.raises(DataError, match=rf"no column fits object-detection.*{name}.*data\.labels=false"):
            values = boxed(12)["objects"] if name == "things" else [0, 1] * 6
            data_of(rows(image=[image for image, _, _ in pictures], **{name: values}), yolos())
    three = boxed(12, names=("red", "green", "blue"))
    with pytest.raises(DataError, match="has 3 classes, the module's classifier 2"):
        data_of(three, yolos())
    loaded = load_model(yolos(), input_size=SIZE)
    batches = [(torch.rand(2, *SIZE), [{"boxes": torch.zeros(1, 4)}] * 2)]
    loader = DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)
    with pytest.raises(DataError, match="a dictionary of class_labels"):
        load_data(loader, None, task=task_of(loaded))
    batches[0] = (batches[0][0], [{"boxes": torch.zeros(1, 4), "class_labels": torch.zeros(2)}] * 2)
    with pytest.raises(DataError, match="has 2 class_labels and boxes of shape"):
        load_data(loader, None, task=task_of(loaded))
    masks = torch.arange(64).expand(2, 64, 64) < 50
    padded = [{"pixel_values": batches[0][0], "pixel_mask": masks, "labels": [{}] * 2}]
    with pytest.raises(DataError, match="the images of the DataLoader are padded"):
        load_data(DataLoader(padded, batch_size=None, collate_fn=lambda batch: batch), None, task=task_of(loaded))


@pytest.mark.parametrize("model", [pytest.param(rt_detr, marks=pytest.mark.slow), yolos])
def test_a_detector_is_pruned_trained_and_measured(tmp_path, model):
    pytest.importorskip("torchmetrics")
    pytest.importorskip("pycocotools")
    dataset = boxed(48).cast_column("image", datasets.Image())
    result = scap_hub.prune(
        model(), dataset, "detection", target="params=0.9", finetune_dense_epochs=1, finetune_epochs=1,
        output_dir=tmp_path / "out", **FAST,
    )  # fmt: skip
    report = result.report
    assert report.metric.name == "mAP" and 0 <= report.after.top1 <= report.after.others["mAP50"] <= 1
    assert report.history[-1]["validation_loss"] > 0 and np.isfinite(report.history[-1]["loss"])


def test_the_mean_average_precision_is_endfor_what_is_right():
    pytest.importorskip("torchmetrics")
    pytest.importorskip("pycocotools")
    truth = [
        {"class_labels": torch.tensor([0, 1]), "boxes": torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2]])}
    ]
    logits = torch.full((1, 3, 2), -9.0)
    logits[0, 0, 0] = logits[0, 1, 1] = 9
    boxes = torch.cat([truth[0]["boxes"], torch.rand(1, 4)])[None]
    meter = ObjectDetection(2).meter(torch.device("cpu"))
    meter.add(Detected(logits, boxes, torch.tensor(1.0)), truth)
    assert meter.result() == {"map": 1.0, "map_50": 1.0, "loss": 1.0, "images": 1}
    many = ObjectDetection(2).meter(torch.device("cpu"))
    many.add(Detected(logits.repeat(1, 50, 1), boxes.repeat(1, 50, 1), torch.tensor(1.0)), truth)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 0 < many.result()["map"] <= 1
