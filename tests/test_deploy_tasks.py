"""int8 of models that do not answer by logits alone: judged by their task's metric, or by their outputs."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

import scap_hub
from scap_hub.deploy.onnx_metadata import size_multiple
from tests.test_deploy import QUICK
from tests.test_export_outputs import SIZE, onnxruntime, saved
from tests.test_task_doors import MODELS


def images_of(seed, count=16):
    return torch.randn(count, *SIZE, generator=torch.Generator().manual_seed(seed))


def splits(targets=None):
    """By name, batches of images, and of what `targets` says of them."""
    found = {name: images_of(seed) for seed, name in enumerate(("train", "validation", "test"))}
    columns = {name: (images,) if targets is None else (images, targets(images)) for name, images in found.items()}
    return {name: DataLoader(TensorDataset(*column), batch_size=8) for name, column in columns.items()}


def answers(file, images):
    return onnxruntime.InferenceSession(str(file)).run(None, {"pixel_values": images.numpy()})


def relative_error(ours, theirs):
    """Squared distance over the spread over the images, the mean over the outputs."""
    return np.mean(
        [((a - b).astype(float) ** 2).sum() / ((b - b.mean(0)) ** 2).sum() for a, b in zip(ours, theirs, strict=True)]
    )


@pytest.mark.parametrize("name", ["AutoModel", pytest.param("stages", marks=pytest.mark.slow)])
def test_without_labels_the_outputs_decide(name, tmp_path):
    saved(tmp_path, name)
    images = images_of(0)
    made = scap_hub.export(tmp_path, int8=True, dataset=DataLoader(TensorDataset(images), batch_size=8), max_loss=0.5)
    told, files = made.deployment, ("onnx/model_quantized.onnx", "onnx/model.onnx")
    error = relative_error(*(answers(tmp_path / file, images) for file in files))
    int8 = told.variants[-1]
    assert int8.output_error == pytest.approx(error, rel=1e-3) and 0 < error < 0.5
    assert told.variants[-2].output_error == 0 and int8.agreement is None
    assert "relative output error" in told.int8.decided_on and told.int8.loss == pytest.approx(error, rel=1e-3)
    assert told.head[3] == "output error" and told.rows()[-1][3] == f"{100 * int8.output_error:.2f} %"
    assert int8.bytes < told.variants[-2].bytes and "outputs = session.run" in told.card()


@pytest.mark.slow
def test_with_labels_the_tasks_metric_decides(tmp_path):
    """Depths within a quarter of the true ones, which the model in float32 gives for two pixels of three."""
    name = "AutoModelForDepthEstimation"
    saved(tmp_path, name)
    model = scap_hub.load(tmp_path)

    @torch.no_grad()
    def depths(images):
        found = model(images).predicted_depth
        return found * (1 + 0.5 * (torch.arange(found.shape[-1]) % 3 == 0))

    data = splits(depths)
    told = scap_hub.export(tmp_path, int8=True, dataset=data, max_loss=0.5).deployment
    images, truth = data["test"].dataset.tensors
    for variant in told.variants[-2:]:
        ratio = answers(tmp_path / variant.file, images)[0] / truth.numpy()
        assert variant.top1 == pytest.approx((np.maximum(ratio, 1 / ratio) < 1.25).mean(), abs=1e-6)
    assert told.variants[-2].top1 == pytest.approx(2 / 3, abs=0.02)
    assert "the validation images (delta1)" in told.int8.decided_on


class Boxes(Dataset):
    """Images, and what a detector sees in them."""

    def __init__(self, model, seed):
        self.images = images_of(seed)
        with torch.no_grad():
            found = model(self.images)
        self.targets = [
            {"class_labels": own[:, :-1].argmax(1)[:2], "boxes": boxes[:2].clamp(0, 1)}
            for own, boxes in zip(found.logits, found.pred_boxes, strict=True)
        ]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.targets[index]


def together(samples):
    images, targets = zip(*samples, strict=True)
    return torch.stack(images), list(targets)


@pytest.mark.slow
def test_a_detector_is_judged_by_its_precision(tmp_path):
    pytest.importorskip("torchmetrics")
    saved(tmp_path, "AutoModelForObjectDetection")
    model = scap_hub.load(tmp_path)
    data = {
        name: DataLoader(Boxes(model, seed), batch_size=8, collate_fn=together)
        for seed, name in enumerate(("train", "validation", "test"))
    }
    told = scap_hub.export(tmp_path, int8=True, dataset=data, max_loss=0.5).deployment
    assert "the validation images (mAP)" in told.int8.decided_on and told.metric == "mAP"
    full, int8 = told.variants[-2:]
    assert 0.1 < full.top1 <= 1 and 0 <= int8.top1 <= full.top1 + 0.05 and int8.output_error > 0


@pytest.mark.slow
def test_sets_of_masks_are_judged_by_their_overlap(tmp_path):
    saved(tmp_path, "masks")
    told = scap_hub.export(
        tmp_path, int8=True, dataset=splits(lambda images: (images[:, 0] > 0).long()), max_loss=0.5
    ).deployment
    assert "the validation images (mIoU)" in told.int8.decided_on
    assert all(0 <= variant.top1 <= 1 for variant in told.variants[-2:]) and told.variants[-1].output_error > 0


@pytest.mark.slow
def test_features_are_judged_by_the_file_in_float32_alone(tmp_path):
    """The dense model that is rebuilt for its speed has no weights, so that a cosine to it would mean nothing."""
    saved(tmp_path, "AutoModel")
    data = splits(lambda images: (images[:, 0].mean((1, 2)) > 0).long())
    told = scap_hub.export(tmp_path, int8=True, dataset=data, max_loss=0.5).deployment
    assert "the validation images (relative output error)" in told.int8.decided_on
    assert all(variant.top1 is None for variant in told.variants) and 0 < told.variants[-1].output_error < 0.5


@pytest.mark.slow
def test_a_run_ends_with_int8_of_an_extractor(tmp_path):
    torch.manual_seed(0)
    scap_hub.prune(
        MODELS["headless"](), splits(), QUICK, output_dir=tmp_path / "out", model_input_size=SIZE, target="macs=0.7",
        deploy_int8=True, deploy_max_loss=0.5,
    )  # fmt: skip
    assert (tmp_path / "out/onnx/model_quantized.onnx").is_file()
    assert "output error" in (tmp_path / "out/README.md").read_text()
    files = [tmp_path / "out/onnx" / name for name in ("model.onnx", "model_quantized.onnx")]
    assert [size_multiple(file) for file in files] == [None, None], "what it loses is measured at one size"
