"""torchvision's detectors: a part is pruned, then the whole is fine-tuned on its targets and measured."""

import json
import warnings

import datasets
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models.detection import FCOS, FasterRCNN, KeypointRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.ssd import SSD

import scap_hub
from scap_hub.errors import DataError, RecipeError
from scap_hub.tasks import task_of
from scap_hub.training.callbacks import Callback
from scap_hub.training.data import load_data
from scap_hub.training.evaluate import evaluate
from scap_hub.zoo import load_model
from tests.launched import on_two_ranks
from tests.test_part_runs import detector

pytest.importorskip("torchmetrics")
pytest.importorskip("pycocotools")

QUICK = {
    "part": "backbone", "target": "macs=0.7", "criterion": "l1", "evaluate_latency": False, "target_round_to": 1,
}  # fmt: skip


class Squares(Dataset):
    """One bright square an image, of two sizes, which are the classes."""

    def __init__(self, count=24, change=lambda target: target):
        self.count, self.change = count, change

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        image, size = 0.2 * torch.rand(3, 32, 32, generator=generator), 10 + 6 * (index % 2)
        x, y = torch.randint(0, 32 - size, (2,), generator=generator).tolist()
        image[:, y : y + size, x : x + size] += 0.7
        boxes = torch.tensor([[x, y, x + size, y + size]], dtype=torch.float)
        return image, self.change({"boxes": boxes, "labels": torch.tensor([1 + index % 2])})


def lists(samples):
    """As torchvision's references put batches together."""
    return tuple(zip(*samples, strict=True))


def loader(**options):
    return DataLoader(Squares(**options), batch_size=6, collate_fn=lists, shuffle=True)


def stacked(samples):
    images, targets = lists(samples)
    return torch.stack(images), targets


def splits():
    return {"train": loader(), "validation": DataLoader(Squares(12), 6, collate_fn=stacked)}


def with_more(target):
    """What Mask R-CNN and Keypoint R-CNN want beside boxes."""
    (x, y, right, low), masks = target["boxes"][0].int().tolist(), torch.zeros(1, 32, 32, dtype=torch.uint8)
    masks[:, y:low, x:right] = 1
    return {
        **target,
        "masks": masks,
        "keypoints": torch.tensor([[[x + 1.0, y + 1.0, 1.0], [right - 1.0, low - 1.0, 1.0]]]),
    }


@pytest.mark.parametrize("kind", [MaskRCNN, KeypointRCNN, FCOS])
def test_detectors_that_learn_more_than_boxes_are_trained_too(kind):
    """Beside boxes: masks, keypoints, centres."""
    dense = detector(kind)
    result = scap_hub.prune(dense, loader(change=with_more), finetune_epochs=2, **QUICK)
    assert result.report.history[-1]["loss"] < result.report.history[1]["loss"]
    after = result.model.state_dict()
    assert isinstance(result.model, kind)
    assert not any(
        torch.equal(own, after[name]) for name, own in dense.state_dict().items() if "head" in name and "weight" in name
    )


class Killed(Callback):
    def on_epoch_end(self, row, model):
        if row["epoch"] == 1:
            raise KeyboardInterrupt


def test_a_killed_training_of_the_whole_is_taken_up(tmp_path):
    def run(folder, **more):
        options = {**QUICK, "finetune_epochs": 2, "output_dir": tmp_path / folder, **more}
        return scap_hub.prune(detector(FasterRCNN), splits(), **options)

    undisturbed = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("killed", callbacks=[Killed()])
    assert not (tmp_path / "killed").exists()
    seen = []
    resumed = run(
        "killed",
        callbacks=[type("Watch", (Callback,), {"on_epoch_end": lambda _, row, model: seen.append(row["epoch"])})()],
    )
    assert seen == [1, 2]  # what was done is told again, and not done again
    for name, own in undisturbed.model.state_dict().items():
        assert torch.equal(own, resumed.model.state_dict()[name]), name
    assert undisturbed.report.whole.figures == resumed.report.whole.figures


def test_the_sizes_of_a_family_are_trained_as_wholes(tmp_path):
    options = {key: value for key, value in QUICK.items() if key != "target"} | {"finetune_epochs": 1}
    targets = ["macs=0.8", "macs=0.6"]
    family = scap_hub.prune_family(detector(SSD), splits(), targets=targets, output_dir=tmp_path / "out", **options)
    alone = scap_hub.prune(detector(SSD), splits(), target=targets[1], **options)
    member = family.members["macs-0.6"]
    for name, own in alone.model.state_dict().items():
        assert torch.equal(own, member.model.state_dict()[name]), name
    assert member.report.whole.figures == alone.report.whole.figures
    assert [row["epoch"] for row in member.report.history] == [0, 1]
    # The table has what the wholes find.
    assert family.head()[4:6] == ["mAP, whole", "mAP50, whole"]
    saved = json.loads((tmp_path / "out" / "family.json").read_text())
    assert saved["dense"]["others"]["mAP, whole"] == alone.report.whole.figures["mAP"][0]
    assert saved["members"][1]["others"]["mAP, whole"] == alone.report.whole.figures["mAP"][1]
    with pytest.raises(RecipeError, match="a whole detector learns from its targets alone"):
        scap_hub.prune_family(detector(SSD), splits(), targets=targets, teacher="next-larger", **options)


def test_the_forecast_counts_the_training_of_the_whole():
    """It is longer than that of the part, and other epochs take other times."""
    options = {key: value for key, value in QUICK.items() if key != "evaluate_latency"}
    found = {
        epochs: scap_hub.forecast(detector(FasterRCNN), splits(), finetune_epochs=epochs, **options).seconds
        for epochs in (0, 1, 100)
    }
    assert found[0]["fine-tuning"] == 0
    assert 20 < found[100]["fine-tuning"] / found[1]["fine-tuning"] < 500
    unlabelled = scap_hub.forecast(detector(FasterRCNN), splits(), finetune_epochs=1, data_labels=False, **options)
    assert unlabelled.seconds["fine-tuning"] < found[1]["fine-tuning"]


TWO_RANKS = """
import sys, torch
from accelerate import PartialState
from tests.test_whole_detectors import QUICK, FasterRCNN, detector, scap_hub, splits
result = scap_hub.prune(detector(FasterRCNN), splits(), finetune_epochs=1, **QUICK)
state = PartialState()
assert state.num_processes == 2
saved = {"figures": result.report.whole.figures, "weights": result.model.state_dict()}
torch.save(saved, f"{sys.argv[1]}/{state.process_index}.pt")
"""


@pytest.mark.slow
def test_two_processes_train_one_detector(tmp_path):
    first, second = on_two_ranks(TWO_RANKS, tmp_path)
    assert first["figures"] == second["figures"]
    dense = detector(FasterRCNN).state_dict()
    for name, own in first["weights"].items():
        assert torch.equal(own, second["weights"][name]), name
    assert not torch.equal(first["weights"]["rpn.head.cls_logits.weight"], dense["rpn.head.cls_logits.weight"])


@pytest.mark.parametrize("kind", [FasterRCNN, RetinaNet, SSD])
def test_the_whole_is_trained_and_measured_after_its_part_was_pruned(kind):
    dense, seen = detector(kind), []

    class Watch(Callback):
        def on_epoch_end(self, row, model):
            seen.append((row["epoch"], type(model)))
            return False

    result = scap_hub.prune(dense, splits(), finetune_epochs=2, callbacks=[Watch()], **QUICK)
    assert seen == [(1, kind), (2, kind)]
    assert result.recipe.finetune.epochs == 2
    report = result.report
    assert [row["epoch"] for row in report.history] == [0, 1, 2]
    assert report.history[2]["loss"] < report.history[1]["loss"]
    assert report.after.macs <= 0.7 * report.before.macs
    # What is reported is what the whole does on the validation images.
    task = task_of(load_model(dense))
    for place, model in enumerate((dense, result.model)):
        found = evaluate(model, splits()["validation"], task=task)
        assert report.whole.figures["mAP"][place] == pytest.approx(found["map"])
        assert report.whole.figures["mAP50"][place] == pytest.approx(found["map_50"])
    assert "mAP, whole" in repr(report)


def test_a_pruned_detector_learns_to_find_squares_and_is_saved(tmp_path):
    dense, data = detector(FasterRCNN), {**splits(), "train": loader(count=96)}
    options = {**QUICK, "finetune_epochs": 4, "finetune_learning_rate": 1e-2, "output_dir": tmp_path / "out"}
    result = scap_hub.prune(dense, data, **options)
    before, after = result.report.whole.figures["mAP50"]
    assert after > before + 0.3
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| mAP50, whole | {100 * before:.2f} % | {100 * after:.2f} % |" in card
    heads = [name for name in dense.state_dict() if name.startswith(("rpn", "roi_heads")) and "weight" in name]
    assert not any(torch.equal(dense.state_dict()[name], result.model.state_dict()[name]) for name in heads)
    again = scap_hub.load(tmp_path / "out", model=detector(FasterRCNN, seed=1))
    assert all(torch.equal(own, again.state_dict()[name]) for name, own in result.model.state_dict().items())
    # The same by hand.
    rows = scap_hub.finetune(scap_hub.apply_plan(dense, result.plan), splits(), epochs=1)
    assert "map" in rows[-1]


@pytest.mark.parametrize("kind", [FasterRCNN, SSD])
def test_measuring_a_detector_changes_nothing_in_it_and_draws_nothing(kind):
    model = detector(kind)
    model.backbone.add_module("norm", nn.BatchNorm2d(8))
    task, state = task_of(load_model(model)), {name: own.clone() for name, own in model.state_dict().items()}
    images, targets = stacked([Squares()[index] for index in range(4)])
    drawn = torch.random.get_rng_state()
    with torch.no_grad():
        first, second = (task.output_for(model, images, targets) for _ in range(2))
    assert torch.equal(first.own_loss, second.own_loss)
    assert all(torch.equal(first.images[0][name], own) for name, own in model(images)[0].items())
    assert torch.equal(drawn, torch.random.get_rng_state())
    assert all(torch.equal(state[name], own) for name, own in model.state_dict().items())
    assert not any(module.training for module in model.modules())


def test_data_sets_with_columns_are_read_as_the_detector_wants_them():
    features = datasets.Features({
        "image": datasets.Image(),
        "objects": {"bbox": datasets.List(datasets.List(datasets.Value("float32"), 4)),
                    "category": datasets.List(datasets.ClassLabel(names=["nothing", "small", "large"]))},
    })  # fmt: skip
    boxes = [[8, 16, 24, 20], [0, 0, 64, 32]]
    rows = [{"image": Image.new("RGB", (64, 64), "white"), "objects": {"bbox": boxes, "category": [1, 2]}}] * 12
    loaded = load_model(detector(FasterRCNN), input_size=(3, 32, 32))
    data = load_data(datasets.Dataset.from_list(rows, features=features), loaded.preprocessing, task=task_of(loaded))
    images, targets = next(iter(data.validation))
    assert images.shape[1:] == (3, 32, 32)
    assert images.min() == images.max() == 1  # the detector normalises them itself
    assert targets[0]["boxes"].tolist() == [[4, 8, 16, 18], [0, 0, 32, 16]]
    assert targets[0]["labels"].tolist() == [1, 2]
    rows = [{**row, "objects": {"bbox": boxes, "category": [0, 1]}} for row in rows]
    background = datasets.Dataset.from_list(rows, features=features)
    with pytest.raises(DataError, match=r"category 0 .* is the background"):
        next(iter(load_data(background, loaded.preprocessing, task=task_of(loaded)).validation))


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (FasterRCNN, {"labels": torch.tensor([0])}, "category 0 .* is the background"),
        (FasterRCNN, {"labels": torch.tensor([3])}, r"category 3 .* outside the model's range 0\.\.2"),
        (RetinaNet, {"labels": torch.tensor([3])}, r"outside the model's range 0\.\.2"),
        (SSD, {"labels": torch.tensor([0])}, "is the background"),
        (FasterRCNN, {"boxes": torch.tensor([[20.0, 20, 10, 10]])}, "give corners, not widths"),
        (FasterRCNN, {"boxes": torch.tensor([[0.1, 0.1, 0.5, 0.5]])}, "give pixels, not shares"),
        (FasterRCNN, {"boxes": torch.tensor([1.0, 1, 5, 5])}, r"a dictionary of boxes \(n, 4\), corners in pixels"),
        (FasterRCNN, {"labels": torch.tensor([1.0])}, "labels .n,., integers"),
    ],
)
def test_targets_that_do_not_fit(kind, change, message):
    with pytest.raises(DataError, match=message):
        scap_hub.prune(detector(kind), loader(change=lambda own: {**own, **change}), finetune_epochs=1, **QUICK)


def test_a_data_set_needs_no_loader():
    """Its dictionaries stay apart, and a tenth of it is held out."""
    result = scap_hub.prune(detector(FasterRCNN), Squares(), finetune_epochs=1, **QUICK)
    assert set(result.report.whole.figures) == {"mAP", "mAP50"}
    before, after = (row["validation_loss"] for row in result.report.history)
    assert after < before


def test_images_that_are_normalised_already_are_told():
    class Normalised(Squares):
        def __getitem__(self, index):
            image, target = super().__getitem__(index)
            return (image - 0.5) / 0.25, target

    for data in (Normalised(), DataLoader(Normalised(), batch_size=6, collate_fn=lists)):
        with pytest.warns(UserWarning, match="values down to -2, and the model takes them from 0 on"):
            scap_hub.prune(detector(SSD), data, **QUICK)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scap_hub.prune(detector(SSD), Squares(), **QUICK)


def test_images_of_several_sizes_are_refused():
    class Uneven(Squares):
        def __getitem__(self, index):
            image, target = super().__getitem__(index)
            return torch.nn.functional.pad(image, (0, index % 2)), target

    data = DataLoader(Uneven(), batch_size=6, collate_fn=lists)
    with pytest.raises(DataError, match=r"are \(3, 32, 32\) and \(3, 32, 33\) in one batch: give images of one size"):
        scap_hub.prune(detector(FasterRCNN), data, **QUICK)


def test_images_without_objects_are_fine():
    def emptied(target):
        empty = int(target["labels"][0]) == 2
        return {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)} if empty else target

    result = scap_hub.prune(detector(FasterRCNN), loader(change=emptied), finetune_epochs=1, **QUICK)
    assert result.report.history[-1]["loss"] > 0
