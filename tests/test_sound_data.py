"""Data that cannot be silently wrong: class numbers, pixels, unreadable images, types."""

import copy
import json
import re
from itertools import product
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    ConvNextImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
)

import scap_hub
from scap_hub.criteria.base import Criterion
from scap_hub.criteria.scap.outputs import _probes
from scap_hub.errors import DataError, ModelError
from scap_hub.hub.card import Measured, model_card
from scap_hub.recipe import DataSettings
from scap_hub.run.report import Measures, Report, Selection
from scap_hub.training.data import load_data
from scap_hub.training.data.sources import open_splits
from scap_hub.training.evaluate import evaluate
from scap_hub.zoo import load_model
from scap_hub.zoo.base import Preprocessing

COLOUR = Preprocessing((3, 16, 16), (0.5,) * 3, (0.5,) * 3)
GREY = Preprocessing((1, 16, 16), (0.5,), (0.5,))
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
PROCESSORS = {
    "ConvNextImageProcessor": {},
    "ViTImageProcessor": {"do_convert_rgb": True},
    "DeiTImageProcessor": {},
    "MobileNetV2ImageProcessor": {},
    "MobileViTImageProcessor": {"size": {"shortest_edge": 288}},
    "LevitImageProcessor": {},
    "PerceiverImageProcessor": {},
    "EfficientNetImageProcessor": {},
}


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def rows(names, count=20, images=None):
    """The class is written in the image: each is of one brightness."""
    labels = [index % len(names) for index in range(count)]
    images = images or [Image.new("RGB", (16, 16), (10 * names.index(names[label]) + 5,) * 3) for label in labels]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def pairs(loader, names, by_label):
    """{name in the data: name that the label has for the model}."""
    images, labels = (torch.cat(column) for column in zip(*loader, strict=True))
    brightness = ((images.mean((1, 2, 3)) * 0.5 + 0.5) * 255).round().int().tolist()
    return {names[(value - 5) // 10]: by_label[label] for value, label in zip(brightness, labels.tolist(), strict=True)}


MODEL = ["Great Dane", "sea_horse", "cat", "tree-frog"]
DATA = ["cat", "great-dane", "sea horse", "TREE FROG"]


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_get_the_models_numbers(streaming):
    source = datasets.DatasetDict(train=rows(DATA), test=rows(DATA[::-1]))
    if streaming:
        source = {name: split.to_iterable_dataset() for name, split in source.items()}
    settings = DataSettings(augmentation="none", workers=0, batch_size=5)
    data = load_data(source, COLOUR, settings, num_classes=4, model_classes=MODEL)
    assert data.labels == MODEL
    right = dict(zip(DATA, [MODEL[2], MODEL[0], MODEL[1], MODEL[3]], strict=True))
    for loader in (data.train, data.calibration):
        assert right.items() >= pairs(loader, DATA, MODEL).items()
    assert pairs(data.test, DATA[::-1], MODEL) == right


def test_some_of_the_models_classes():
    data = load_data(rows(DATA[:2]), COLOUR, num_classes=4, model_classes=MODEL)
    assert data.labels == MODEL
    assert {label for batch in data.train for label in batch[1].tolist()} == {0, 2}
    fillers = [*MODEL, "N/A", "N/A"]  # as those of COCO's numbers that no class has
    assert load_data(rows(DATA[:2]), COLOUR, num_classes=6, model_classes=fillers, new_head="auto").labels == fillers
    new_head = load_data(rows(DATA[:2]), COLOUR, num_classes=4, model_classes=MODEL, new_head=True)
    assert new_head.labels == DATA[:2]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cat", "dog", "sea horse", "tree frog"], "'dog' is unknown to the model, which has 'Great Dane'"),
        (["a", "b", "c", "d"], "'a', 'b', 'c', 'd' are unknown to the model"),
        (["cat", "Cat_", "sea horse", "tree frog"], "several classes are called 'cat', 'Cat_'"),
    ],
)
def test_names_that_do_not_match_are_refused(names, message):
    with pytest.raises(DataError) as error:
        load_data(rows(names), COLOUR, num_classes=4, model_classes=MODEL)
    assert message in str(error.value) and "data.match_classes=false" in str(error.value)
    as_numbered = load_data(rows(names), COLOUR, DataSettings(match_classes=False), num_classes=4, model_classes=MODEL)
    assert as_numbered.labels == MODEL
    assert load_data(rows(names), COLOUR, num_classes=4, model_classes=MODEL, new_head=True).labels == names


def test_names_that_differ_in_their_spelling_alone():
    model = ["a-b", "ab", "c"]
    data = load_data(rows(["c", "a-b", "ab"]), COLOUR, num_classes=3, model_classes=model)
    assert pairs(data.calibration, ["c", "a-b", "ab"], model) == {name: name for name in model}


def test_splits_that_name_other_classes():
    source = datasets.DatasetDict(train=rows(["a", "b"]), test=rows(["a", "x"]))
    with pytest.raises(DataError, match=r"\[test\] does not name its classes as the training images do: 'x'"):
        load_data(source, COLOUR, num_classes=2)


def test_a_run_measures_by_name():
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic",
        id2label=dict(enumerate("zyxwvutsrq")), label2id={name: i for i, name in enumerate("zyxwvutsrq")},
    )  # fmt: skip
    model = transformers.ResNetForImageClassification(config)
    names = sorted("zyxwvutsrq")
    run = {
        "data_calibration_images": 16,
        "finetune_epochs": 0,
        "repair_tune_steps": 0,
        "criterion": "l1",
        "evaluate_latency": False,
    }
    source = rows(names, 60, list(digit_pictures(60)))
    ours = scap_hub.prune(model, source, **run, model_input_size=(3, 32, 32))
    in_the_models_order = source.map(lambda row: {"label": 9 - row["label"]}).cast_column(
        "label", datasets.Value("int64")
    )
    theirs = scap_hub.prune(model, in_the_models_order, **run, model_input_size=(3, 32, 32))
    assert ours.report.before.top1 == theirs.report.before.top1
    assert ours.loaded.labels == list("zyxwvutsrq")


def digit_pictures(count):
    random = np.random.default_rng(0)
    for _ in range(count):
        yield Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8))


def picture(mode, size=(90, 70)):
    image = Image.effect_mandelbrot(size, (-2, -1.5, 1, 1.5), 100).convert("RGB")
    via = {"PA": "P", "RGBa": "RGBA"}.get(mode, mode)
    if mode == "LAB":
        return Image.frombytes("LAB", size, image.tobytes())
    return image.convert(via).convert(mode)


def decoded(images, preprocessing, **options):
    """What the model is given, without a file between, which holds few of the modes."""
    from scap_hub.training.data.transforms import finish, pixels_of, upright

    pixels = options.get("pixels") or pixels_of(preprocessing)
    stack = torch.stack([pixels(upright(image, preprocessing.input_size[0])) for image in images])
    return finish((stack,), None, preprocessing.mean, preprocessing.std)[0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("channels", "crop_mode"), [(1, "center"), (1, "squash"), (3, "center"), (3, "squash"), (3, "border")]
)
def test_pixels_are_timms(mode, crop_mode, channels):
    if (mode, channels) == ("LAB", 1):
        pytest.skip("PIL does not make grey of it")
    size, mean, std = (channels, 56, 48), (0.4, 0.5, 0.6)[:channels], (0.2, 0.3, 0.4)[:channels]
    ours = decoded([picture(mode)], Preprocessing(size, mean, std, "bilinear", 0.875, crop_mode))
    transform = timm.data.create_transform(
        size, interpolation="bilinear", mean=mean, std=std, crop_pct=0.875, crop_mode=crop_mode
    )
    theirs = transform(picture(mode).convert("L" if channels == 1 else "RGB"))
    torch.testing.assert_close(ours[0], theirs, atol=1e-6, rtol=0)


def test_transparent_palettes_are_timms(tmp_path):
    image = picture("P")
    image.info["transparency"] = 3
    image.save(tmp_path / "p.png", transparency=3)
    source = datasets.Dataset.from_dict({"image": [str(tmp_path / "p.png")]}).cast_column("image", datasets.Image())
    (ours,) = next(iter(load_data(source, COLOUR).calibration))
    transform = timm.data.create_transform(
        (3, 16, 16), mean=COLOUR.mean, std=COLOUR.std, crop_pct=1.0, interpolation="bicubic"
    )
    torch.testing.assert_close(ours[0], transform(Image.open(tmp_path / "p.png").convert("RGB")), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("name", "options"), PROCESSORS.items())
def test_pixels_are_those_of_the_image_processor(tmp_path, name, options):
    processor = getattr(transformers, name)(**options)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    # What its users get: for some names transformers 5.0 has a second class, which rounds otherwise.
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    pictures = [picture("RGB", size) for size in ((320, 250), (200, 300))]
    source = datasets.Dataset.from_dict({"image": pictures}, features=datasets.Features({"image": datasets.Image()}))
    data = load_data(source, loaded.preprocessing, pixels=loaded.zoo.pixels(loaded))
    ours = sorted(next(iter(data.calibration))[0], key=lambda image: float(image.mean()))
    theirs = sorted(processor(pictures, return_tensors="pt")["pixel_values"], key=lambda image: float(image.mean()))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other.float(), atol=1e-5, rtol=0)


RAMP = np.linspace(30, 65505, 256).round().reshape(16, 16)


@pytest.mark.parametrize(("mode", "dtype"), [("I;16", "<u2"), ("I;16L", "<u2"), ("I;16B", ">u2"), ("I", "<i4")])
@pytest.mark.parametrize("preprocessing", [GREY, COLOUR])
def test_sixteen_bits_are_scaled_to_eight(mode, dtype, preprocessing):
    image = Image.frombytes(mode, (16, 16), RAMP.astype(dtype).tobytes())
    expected = torch.arange(256.0).reshape(1, 16, 16) / 255 * 2 - 1
    torch.testing.assert_close(
        decoded([image], preprocessing)[0], expected.expand(preprocessing.input_size), atol=1e-6, rtol=0
    )


def test_sixteen_bit_files(tmp_path):
    for kind in ("png", "tiff", "pgm"):
        folder = tmp_path / kind / "train" / "a"
        folder.mkdir(parents=True)
        Image.fromarray(RAMP.astype(np.uint16)).save(folder / f"x.{kind}")
        (image,) = next(iter(load_data(str(tmp_path / kind), GREY, DataSettings(labels=False)).calibration))
        assert (image.flatten().diff() > 0).all() and image.min() == -1 and image.max() == 1


@pytest.mark.parametrize("mode", ["I", "F"])
def test_eight_bits_in_wider_modes_stay(mode):
    values = np.arange(256).reshape(16, 16)
    image = Image.fromarray(values.astype("<i4" if mode == "I" else np.float32))
    expected = torch.from_numpy(values).float()[None] / 255 * 2 - 1
    torch.testing.assert_close(decoded([image], GREY)[0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("least", "most", "dtype"),
    [(0, 1, np.float32), (-4, 9, np.float32), (0, 4e4, np.float32), (0, 1e6, np.int32), (-300, 9, np.int32)],
)
def test_ranges_that_nobody_knows_are_refused(least, most, dtype):
    values = np.linspace(least, most, 256).astype(dtype)
    features = datasets.Features({"image": datasets.Image()})
    source = datasets.Dataset.from_dict({"image": [Image.fromarray(values.reshape(16, 16))]}, features=features)
    with pytest.raises(DataError, match="what is white is unknown: save it with 8 or 16 bits"):
        list(load_data(source, GREY).calibration)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_their_exif_entry_says(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "train").mkdir()
    uneven = Image.fromarray(RAMP.astype(np.uint8) // 2 + np.arange(16, dtype=np.uint8)).convert("RGB")
    uneven.save(tmp_path / "train" / "x.png", exif=exif)
    (ours,) = next(iter(load_data(str(tmp_path), COLOUR).calibration))
    with Image.open(tmp_path / "train" / "x.png") as image:
        assert image.getexif()[0x0112] == orientation
        turned = transformers.image_utils.load_image(image)
    assert torch.equal(ours[0], decoded([turned], COLOUR)[0])
    moved = not torch.equal(ours[0], decoded([uneven], COLOUR)[0])
    assert moved == (orientation != 1)


def grid(*parts):
    """Names of four images for each combination of folders: "train val" and "rose tulip" make train/rose/0.png, ..."""
    return ["/".join(names) for names in product(*(part.split(",") for part in parts), [f"{i}.png" for i in range(4)])]


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (grid("bus,car,train"), {"train": (12, ["bus", "car", "train"])}),
        (grid("hammer,saw,test tube"), {"train": (12, ["hammer", "saw", "test tube"])}),
        (grid("train station,test tube"), {"train": (8, ["test tube", "train station"])}),
        (grid("train,images"), {"train": (8, ["images", "train"])}),
        (grid("train images,test_set"), {"train": (4, None), "test": (4, None)}),
        ([*grid("rose,tulip"), "rose/a-train-ride.png"], {"train": (9, ["rose", "tulip"])}),
        (grid("train,val", "rose,dev"), {"train": (8, ["dev", "rose"]), "validation": (8, ["dev", "rose"])}),
        (
            [*grid("Train,Test", "a,b"), "Train/a/blood_test_1.png", "Test/a/val.png"],
            {"train": (9, ["a", "b"]), "test": (9, ["a", "b"])},
        ),
        (grid("data", "flowers", "train,val", "a,b"), {"train": (8, ["a", "b"]), "validation": (8, ["a", "b"])}),
        ([*grid("train", "images", "a,b"), "test/1.png"], {"train": (8, ["a", "b"]), "test": (1, None)}),
        (grid("train2017,val2017"), {"train": (4, None), "validation": (4, None)}),
        (grid("my[set]", "ro?,tulip*"), {"train": (8, ["ro?", "tulip*"])}),
        ([*grid(".git,__MACOSX,a,b"), "a/._1.png"], {"train": (8, ["a", "b"])}),
        (grid("all"), {"train": (4, None)}),
    ],
)
def test_split_and_class_follow_from_the_place_alone(tmp_path, files, splits):
    place_images(tmp_path, files)
    found = open_splits(str(tmp_path), DataSettings())
    assert {
        split: (len(rows), getattr(rows.features.get("label"), "names", None)) for split, rows in found.items()
    } == (splits)
    for row in (row for rows in found.values() if "label" in rows.features for row in rows):
        assert Path(row["image"].filename).parent.name == splits["train"][1][row["label"]]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([*grid("train", "a,b"), "train/x.png"], "train/x.png' lies beside folders with other images"),
        ([*grid("train", "a,b"), "x.png"], "'x.png' lies beside folders with other images"),
        (grid("rose,tulip", "2019,2020"), "is the class of 'rose/2019/0.png'"),
    ],
)
def test_unclear_folders_are_refused(tmp_path, files, message):
    place_images(tmp_path, files)
    with pytest.raises(DataError, match=re.escape(message)):
        open_splits(str(tmp_path), DataSettings())


def test_what_of_a_folder_is_not_used_is_said(tmp_path, capsys):
    place_images(tmp_path, [*grid("train,extra", "a,b"), "train/a/big.png_large"])
    (tmp_path / "train" / "notes.txt").touch()
    found = open_splits(str(tmp_path), DataSettings(streaming=True))
    assert sum(1 for _ in found["train"]) == 8
    told = capsys.readouterr().err
    assert "no images by their names: train/a/big.png_large, train/notes.txt" in told
    assert "neither train nor validation nor test: extra" in told


def test_a_failure_inside_datasets_is_one_line(tmp_path):
    place_images(tmp_path, grid("train", "a,b"))
    (tmp_path / "train" / "metadata.csv").write_text("file_name,label\n")
    with pytest.raises(DataError, match="cannot be loaded as a folder"):
        open_splits(str(tmp_path), DataSettings())


def place_images(path, files):
    for file in files:
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path / file, "png")


def folder_with(tmp_path, good, broken):
    random = np.random.default_rng(0)
    for index in range(good + broken):
        folder = tmp_path / "train" / "ab"[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{index:03}.png"
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
        if index < broken:
            path.write_bytes(path.read_bytes()[:60] if index % 2 else b"no picture")
    return str(tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("limit", [0, 512 * 2**20])
def test_unreadable_images_are_skipped_and_counted(tmp_path, monkeypatch, workers, limit):
    monkeypatch.setattr("scap_hub.training.data.images.MEMORY_LIMIT", limit)
    settings = DataSettings(max_broken=0.25, batch_size=4, workers=workers, augmentation="none")
    data = load_data(folder_with(tmp_path, 32, 8), COLOUR, settings, num_classes=2)
    sizes = [len(images) for images, _ in data.train]
    assert set(sizes) == {4}
    read = sum(len(images) for images, _ in data.train), sum(len(batch[0]) for batch in data.validation)
    assert read[1] + sum(len(batch[0]) for batch in data.calibration) == 32
    assert list(data.skipped().values()) == [8]


def test_more_unreadable_images_than_allowed_are_named(tmp_path):
    for workers in (0, 1):
        settings = DataSettings(max_broken=0.25, workers=workers)
        data = load_data(folder_with(tmp_path / str(workers), 20, 13), COLOUR, settings, num_classes=2)
        with pytest.raises(DataError, match=r"^1[0-3] images of .*\[train\] cannot be read: ") as error:
            list(data.calibration)
        message = str(error.value)
        listed = message.partition("cannot be read: ")[2].partition("; repair or remove")[0]
        assert "\n" not in message and listed.count("; ") == 9 and message.endswith("data.max_broken, which allows 8")


def test_the_default_tolerates_one_in_a_thousand():
    bad = {"bytes": b"no picture", "path": None}
    good = {
        "bytes": next(iter(rows(["a"], 1).cast_column("image", datasets.Image(decode=False))))["image"]["bytes"],
        "path": None,
    }

    def source(broken, count=2000):
        features = datasets.Features({"image": datasets.Image()})
        return datasets.Dataset.from_dict({"image": [bad] * broken + [good] * (count - broken)}, features=features)

    assert (
        sum(len(batch[0]) for batch in load_data(source(2), COLOUR, DataSettings(calibration_images=2000)).calibration)
        == 1998
    )
    with pytest.raises(DataError, match=r"3 images of custom\[train\] cannot be read"):
        list(load_data(source(3), COLOUR, DataSettings(calibration_images=2000, batch_size=2000)).calibration)


def test_streams_skip_and_count_too(tmp_path):
    source = datasets.load_dataset(folder_with(tmp_path, 30, 3))["train"].to_iterable_dataset()
    settings = DataSettings(workers=0, calibration_images=33, batch_size=5)
    data = load_data(source, COLOUR, settings, num_classes=2)
    assert sum(len(batch[0]) for batch in data.calibration) == 30
    assert sum(len(batch[0]) for batch in data.train) == 30
    assert list(data.skipped().values()) == [3]
    with pytest.raises(DataError, match="cannot be read"):
        list(load_data(source, COLOUR, DataSettings(workers=0, max_broken=0), num_classes=2).train)


def test_a_decompression_bomb_is_an_unreadable_image(tmp_path, monkeypatch):
    folder = folder_with(tmp_path, 4, 0)
    Image.new("L", (400, 400)).save(tmp_path / "train" / "a" / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match=r"bomb.png \(Image size \(160000 pixels\) exceeds limit"):
        list(load_data(folder, COLOUR, num_classes=2).train)


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_labels_out_of_range_fail_at_the_start(part):
    numbers = lambda last: rows(["a", "b"]).remove_columns("label").add_column("label", [0] * 19 + [last])  # noqa: E731
    source = datasets.DatasetDict({name: numbers(7 if name == part else 1) for name in ("train", "validation", "test")})
    with pytest.raises(DataError, match=rf"label 7 in custom\[{part}\]"):
        load_data(source, COLOUR, num_classes=2)


def test_probes_are_as_many_as_asked_for_whatever_the_images():
    for images in (torch.zeros(100, 1, 4, 4), torch.randn(100, 1, 4, 4), torch.full((100, 1, 4, 4), torch.nan)):
        assert sum(map(len, _probes(list(images.split(7)), 64))) == 64
    assert sum(map(len, _probes([torch.zeros(5, 1, 4, 4)], 64))) == 5


def net(classes=10):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, classes),
    )  # fmt: skip


QUICK = {"model_input_size": (1, 8, 8), "evaluate_latency": False, "data_calibration_images": 64}


class Contrary(Criterion):
    """Says after the fact that the other channels should stay."""

    name = "contrary"

    def score(self, model, groups, batches):
        return {group.name: torch.arange(group.size) / group.size for group in groups if group.prunable}

    def refine(self, model, groups, batches, plan):
        return scap_hub.PruningPlan.from_keep(groups, {name: range(len(plan.kept(name))) for name in plan.groups})


def test_a_threshold_is_not_refined_away():
    run = {
        "criterion": "contrary",
        "finetune_epochs": 0,
        "repair_tune_steps": 0,
        "criterion_diagnostics": False,
        **QUICK,
    }
    result = scap_hub.prune(net(), "digits", target="threshold=0.6", **run)
    for group in result.report.groups.values():
        assert (
            {index for index, score in enumerate(group.scores) if score >= 0.6}
            <= set(group.kept)
            != set(range(group.size))
        )
    budget = scap_hub.prune(net(), "digits", target="ratio=0.5", **run)
    assert all(group.kept == list(range(len(group.kept))) for group in budget.report.groups.values())


def test_a_threshold_in_the_precision_of_the_scores():
    groups = scap_hub.channel_groups(net(), (torch.zeros(1, 1, 8, 8),))
    for dtype in (torch.float16, torch.float32, torch.float64):
        scores = {
            group.name: torch.tensor([0.7] * 11 + [0.1] * (group.size - 11), dtype=dtype) for group in groups.prunable
        }
        for round_to, count in ((1, 11), (4, 12)):
            plan = scap_hub.select(groups, scores, "threshold=0.7", round_to=round_to)
            assert all(set(range(11)) <= set(plan.kept(name)) and len(plan.kept(name)) == count for name in scores)


def test_a_missed_latency_budget_is_told():
    measures = Measures(1, 1, 1, None)
    missed = Report(measures, measures, selections=[Selection(0.9, 0.0, 0.62, False, 0.5)])
    assert missed.missed == "0.620 of the dense model's time is left, and 0.5 was asked for"
    assert any("The budget is missed" in note for note in missed.notes())
    assert Report(measures, measures, selections=[Selection(0.9, 0.0, 0.5, True, 0.5)]).missed is None
    loaded = load_model(net(), input_size=(1, 8, 8))
    plan = scap_hub.PruningPlan.from_keep(scap_hub.channel_groups(net(), (torch.zeros(1, 1, 8, 8),)), {})
    assert "budget is missed**: 0.620" in model_card(loaded, plan, Measured(missed=missed.missed))


@pytest.mark.parametrize(
    ("criterion", "dtype"),
    [
        *(("scap", torch.bfloat16), ("scap", torch.float64), ("l1", torch.float16)),
        *(pytest.param("l1", dtype, marks=pytest.mark.slow) for dtype in (torch.bfloat16, torch.float64)),
        pytest.param("scap", torch.float16, marks=pytest.mark.slow),
    ],
)
def test_a_run_keeps_the_models_type(tmp_path, dtype, criterion):
    model = net().to(dtype)
    before = copy.deepcopy(model.state_dict())
    result = scap_hub.prune(model, "digits", criterion=criterion, target="macs=0.5", finetune_epochs=1, **QUICK)
    assert {parameter.dtype for parameter in result.model.parameters()} == {dtype}
    assert result.report.after.top1 is not None and len(result.report.history) == 2
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    single = scap_hub.prune(
        net().to(dtype).float(), "digits", criterion=criterion, target="macs=0.5", finetune_epochs=1, **QUICK
    )
    if dtype != torch.float64:
        assert json.loads(result.plan.to_json()) == json.loads(single.plan.to_json())
        scores = [{name: group.scores for name, group in run.report.groups.items()} for run in (result, single)]
        assert scores[0] == scores[1]
    assert abs(result.report.after.top1 - single.report.after.top1) < 0.05
    result.save_pretrained(tmp_path / "saved")
    again = scap_hub.load(tmp_path / "saved", model=net().to(dtype))
    images = torch.rand(2, 1, 8, 8, dtype=dtype)
    assert again[0].weight.dtype == dtype and torch.equal(again(images), result.model(images))


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_a_half_checkpoint_of_transformers_stays_one(tmp_path, dtype):
    """Transformers 5 loads what the checkpoint has."""
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=10)
    ResNetForImageClassification(config).to(dtype).save_pretrained(tmp_path / "dense")
    ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=1.0).save_pretrained(tmp_path / "dense")
    quick = {"evaluate_latency": False, "data_calibration_images": 64, "finetune_epochs": 1}
    result = scap_hub.prune(tmp_path / "dense", "digits", target="macs=0.6", output_dir=tmp_path / "out", **quick)
    opened = AutoModelForImageClassification.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    assert {weight.dtype for weight in (*opened.parameters(), *result.model.parameters())} == {dtype}
    images = torch.randn(2, 3, 32, 32).to(dtype)
    assert torch.equal(opened(images).logits, result.model.cpu().eval()(images).logits)


def test_overflow_is_told():
    model = net().half()
    with torch.no_grad():
        model[7].weight.fill_(60000)
        model[3].weight.fill_(100)
    with pytest.raises(ModelError, match="NaN or Inf in float16: give the model in float32 or bfloat16"):
        evaluate(model, load_data("digits", Preprocessing((1, 8, 8), (0.5,), (0.5,))).test)
