import os
import subprocess
import sys

import datasets
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from scap_hub.errors import DataError
from scap_hub.recipe import DataSettings, FinetuneSettings
from scap_hub.training.data import load_data
from scap_hub.training.finetune import finetune
from scap_hub.zoo.base import Preprocessing
from tests.hub_client import running_hub

GREY = Preprocessing((1, 8, 8), (0.5,), (0.5,))
COLOUR = Preprocessing((3, 16, 16), (0.5,) * 3, (0.5,) * 3)
NAMES = ["cat", "dog"]


def net():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 2))


def pictures(count=20, mode="RGB", size=(20, 24)):
    random = np.random.default_rng(0)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    return [Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)) for _ in range(count)]


def rows(count=20, **columns):
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}
    values = {"image": pictures(count), "label": [i % 2 for i in range(count)]}
    for name, (feature, column) in columns.items():
        features[name], values[name] = feature, column
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def image_folder(path):
    for index, picture in enumerate(pictures()):
        folder = path / "train" / NAMES[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{index}.png")
    return path


def parquet_file(path):
    path.mkdir()
    rows().to_parquet(path / "flowers.parquet")
    return path / "flowers.parquet"


def parquet_folder(path):
    parquet_file(path)
    (path / "flowers.parquet").rename(path / "train.parquet")
    rows(6).to_parquet(path / "validation.parquet")
    return path


def saved(path):
    rows().save_to_disk(path)
    return path


def saved_dict(path):
    datasets.DatasetDict(train=rows(), validation=rows(6)).save_to_disk(path)
    return path


@pytest.mark.parametrize("make", [image_folder, parquet_file, parquet_folder, saved, saved_dict])
def test_folders_and_files(tmp_path, make):
    data = load_data(str(make(tmp_path / "data")), COLOUR, DataSettings(batch_size=5), num_classes=2)
    has_validation = make in (parquet_folder, saved_dict)
    assert data.labels == NAMES
    assert len(data.train.dataset) == (20 if has_validation else 18)
    assert len(data.validation.dataset) == (6 if has_validation else 2)
    images, labels = next(iter(data.train))
    assert images.shape == (5, 3, 16, 16) and images.dtype == torch.float32
    assert labels.dtype == torch.int64 and set(labels.tolist()) <= {0, 1}


def test_digits_are_embedded():
    data = load_data("digits", GREY, num_classes=10)
    assert data.labels == [str(digit) for digit in range(10)]
    assert [len(part.dataset) for part in (data.train, data.validation, data.test)] == [1293, 144, 360]
    assert len(data.calibration.dataset) == 256
    images, labels = next(iter(data.test))
    assert images.shape == (64, 1, 8, 8) and images.min() == -1 and images.max() == 1
    assert len(labels.unique()) == 10


def test_only_colour_images_are_mirrored_unless_asked():
    def settings(source, preprocessing, **options):
        chosen = load_data(source, preprocessing, DataSettings(**options)).train.collate_fn.keywords
        return chosen["shift"], chosen["mirror"]

    assert settings("digits", GREY) == (True, False)
    assert settings("digits", COLOUR) == (True, False)
    assert settings("digits", GREY, augmentation="crop-flip") == (True, True)
    assert settings(rows(), COLOUR) == (True, True)
    assert settings(rows(), COLOUR, augmentation="crop") == (True, False)
    assert settings(rows(), COLOUR, augmentation="none") == (False, False)


def test_augmentation_moves_and_mirrors_whole_images():
    ramp = torch.arange(16, dtype=torch.uint8).mul(16).expand(16, 16)
    source = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(ramp.numpy().copy()).convert("RGB")] * 40, "label": [0] * 40},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ramp"])}),
    )
    data = load_data(source, COLOUR, DataSettings(batch_size=32))
    images, _ = next(iter(data.train))
    rising = (images.diff(dim=3) >= 0).flatten(1).all(1)
    falling = (images.diff(dim=3) <= 0).flatten(1).all(1)
    assert (rising ^ falling).all() and rising.any() and falling.any()
    assert len({tuple(row.tolist()) for row in images[:, 0, 0]}) > 4
    plain, _ = next(iter(data.calibration))
    assert torch.equal(plain, plain[:1].expand_as(plain))


@pytest.mark.parametrize("mode", ["center", "squash"])
@pytest.mark.parametrize("size", [(90, 70), (60, 120)])
def test_preprocessing_agrees_with_timm(mode, size):
    picture = Image.effect_mandelbrot(size, (-2, -1.5, 1, 1.5), 100).convert("RGB")
    source = datasets.Dataset.from_dict({"image": [picture]}, features=datasets.Features({"image": datasets.Image()}))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    data = load_data(source, Preprocessing((3, 56, 56), mean, std, "bicubic", 0.875, mode))
    (ours,) = next(iter(data.calibration))
    transform = timm.data.create_transform(
        (3, 56, 56), interpolation="bicubic", mean=mean, std=std, crop_pct=0.875, crop_mode=mode
    )
    theirs = transform(picture)
    assert (ours[0] - theirs).abs().mean() < 0.1 * theirs.std()


def test_the_split_is_fixed_and_the_seed_moves_only_calibration():
    def tensors(loader):
        return torch.cat([batch[0] for batch in loader])

    settings = DataSettings(calibration_images=50)
    first, again, other = (load_data("digits", GREY, settings, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(tensors(first.calibration), tensors(again.calibration))
    assert not torch.equal(tensors(first.calibration), tensors(other.calibration))
    assert torch.equal(tensors(first.validation), tensors(other.validation))
    assert not set(first.train.dataset.indices) & set(first.validation.dataset.indices)
    assert set(other.calibration.dataset.indices) <= set(other.train.dataset.indices)


def test_colour_for_grey_models_and_grey_for_colour_models():
    assert next(iter(load_data(rows(), GREY).train))[0].shape[1] == 1
    assert next(iter(load_data("digits", COLOUR).train))[0].shape[1] == 3


def test_images_too_many_for_memory_are_decoded_again(monkeypatch):
    expected = [batch[0] for batch in load_data(rows(), COLOUR).calibration]
    monkeypatch.setattr("scap_hub.training.data.images.MEMORY_LIMIT", 0)
    data = load_data(rows(), COLOUR)
    assert data.calibration.num_workers > 0
    assert all(torch.equal(batch[0], other) for batch, other in zip(data.calibration, expected, strict=True))


def test_images_without_labels_serve_for_calibration_and_distillation(tmp_path):
    for index, picture in enumerate(pictures()):
        picture.save(tmp_path / f"{index}.png")
    data = load_data(str(tmp_path), COLOUR, num_classes=2)
    assert (data.validation, data.labels, len(data.train.dataset)) == (None, None, 20)
    assert [len(batch) for batch in data.calibration] == [1]
    foreign = load_data(rows(), COLOUR, DataSettings(labels=False), num_classes=1)
    assert foreign.labels is None and len(next(iter(foreign.train))) == 1


def test_hidden_labels_are_no_labels():
    hidden = rows(6).remove_columns("label").add_column("label", [-1] * 6)
    data = load_data(datasets.DatasetDict(train=rows(), test=hidden), COLOUR, num_classes=2)
    assert data.test is None and data.validation is not None


def test_streams(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    path = str(parquet_folder(tmp_path / "data"))
    data = load_data(path, COLOUR, DataSettings(streaming=True, batch_size=4, calibration_images=7, workers=0))
    assert [len(batch[1]) for batch in data.train] == [4] * 5
    assert [len(batch[1]) for batch in data.validation] == [4, 2]
    assert len(data.calibration.dataset) == 7 and data.labels == NAMES
    with pytest.raises(DataError, match=r"stream of unknown length: .*\[train\] does not say how many images it has"):
        finetune(net(), data, FinetuneSettings(epochs=1))


def test_a_stream_that_says_its_length_can_be_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    path = parquet_folder(tmp_path / "data")
    splits = "".join(
        f"  - name: {name}\n    num_examples: {count}\n" for name, count in {"train": 20, "validation": 6}.items()
    )
    (path / "README.md").write_text(f"---\ndataset_info:\n  splits:\n{splits}---\n")
    data = load_data(str(path), COLOUR, DataSettings(streaming=True, batch_size=4, calibration_images=7, workers=0))
    history = finetune(net(), data, FinetuneSettings(epochs=2))
    assert len(data.train) == 5 and history[-1]["epoch"] == 2 and "top1" in history[-1]


def test_loaders_are_used_as_they_are():
    loader = DataLoader(TensorDataset(torch.rand(40, 1, 8, 8), torch.arange(40) % 10), batch_size=16, shuffle=True)
    before = torch.random.get_rng_state()
    data = load_data(loader, GREY, DataSettings(calibration_images=20, batch_size=8), num_classes=10)
    assert torch.equal(before, torch.random.get_rng_state())
    assert data.train.sampler is loader.sampler and data.validation is None
    assert [len(images) for images, _ in data.calibration] == [8, 8, 4]
    both = load_data({"train": loader, "validation": loader}, GREY)
    assert both.validation.sampler is loader.sampler


def test_columns_can_be_named():
    source = rows(other=(datasets.ClassLabel(names=["a", "b", "c"]), [2] * 20), depth=(datasets.Image(), pictures()))
    data = load_data(source, COLOUR, DataSettings(image_column="depth", label_column="other"))
    assert data.labels == ["a", "b", "c"] and next(iter(data.train))[1].unique().tolist() == [2]


def text_labels():
    return rows(species=(datasets.Value("string"), ["oak"] * 20)).remove_columns("label")


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        (
            lambda: rows().remove_columns("image"),
            {},
            "no image columns; the columns of 'custom' are label (ClassLabel)",
        ),
        (
            lambda: rows(depth=(datasets.Image(), pictures())),
            {},
            "2 image columns; the columns of 'custom' are image (Image), label (ClassLabel), depth (Image); "
            "set data.image_column",
        ),
        (lambda: rows(fine=(datasets.ClassLabel(names=["a"]), [0] * 20)), {}, "2 label columns"),
        (text_labels, {"label_column": "species"}, "column 'species' holds string, not class labels"),
        (lambda: text_labels().rename_column("species", "label"), {}, "column 'label' holds string, not class labels"),
        (rows, {"label_column": "lable"}, "no column 'lable'; the columns of 'custom' are image (Image), label"),
        (rows, {"train_split": "fit"}, "no split 'fit' for training; the data set has train"),
        (lambda: rows().select([]), {}, "custom[train] has no images"),
        (lambda: datasets.DatasetDict(a=rows(), b=rows()), {}, "which split of 'custom' to train on? It has a, b"),
        (lambda: None, {}, "no data set; pass dataset=... or set data.dataset"),
        (
            lambda: 3,
            {},
            "a datasets.Dataset or DatasetDict, a torch data set, or a DataLoader, not int",
        ),
        (lambda: "/no/such/folder", {}, "no data set '/no/such/folder': there is no such file or folder"),
        (lambda: DataLoader(TensorDataset(torch.rand(4, 8))), {}, "must yield (images, labels) or (images,) tuples"),
    ],
)
def test_mistakes_are_named(source, settings, message):
    with pytest.raises(DataError) as error:
        load_data(source(), COLOUR, DataSettings(**settings))
    assert message in str(error.value)


def test_labels_outside_the_classifiers_range():
    numbers = rows().remove_columns("label").add_column("label", [9] * 20)
    message = r"label 9 in .* is outside the classifier's range 0\.\.4; for a new classifier set model.num_classes"
    with pytest.raises(DataError, match=message):
        load_data(numbers, COLOUR, num_classes=5)
    loader = DataLoader(TensorDataset(torch.rand(4, 1, 8, 8), torch.tensor([0, 1, -3, 1])), batch_size=4)
    with pytest.raises(DataError, match=r"label -3 in the DataLoader is outside the classifier's range 0\.\.4"):
        load_data(loader, GREY, num_classes=5)


def test_classes_that_are_not_the_models():
    for count in (5, 1000):
        message = (
            rf"'digits' has 10 classes, the classifier {count}: leave out finetune.dense_epochs=0.* data.labels=false"
        )
        with pytest.raises(DataError, match=message):
            load_data("digits", GREY, num_classes=count)
    assert len(load_data("digits", GREY, num_classes=5, new_head=True).labels) == 10
    unlabelled = load_data("digits", GREY, DataSettings(labels=False), num_classes=5)
    assert unlabelled.labels is None and len(next(iter(unlabelled.train))) == 1


def test_rows_without_a_label(tmp_path):
    source = rows().remove_columns("label").add_column("label", [None, *[0] * 19])
    with pytest.raises(DataError, match=r"column 'label' of custom.train. has rows without a label"):
        load_data(source, COLOUR)


def test_a_broken_image_is_named(tmp_path):
    folder = image_folder(tmp_path / "data")
    (folder / "train" / "cat" / "broken.png").write_bytes(b"not a picture")
    data = load_data(str(folder), COLOUR, DataSettings(batch_size=21, workers=0))
    with pytest.raises(DataError, match=r"an image of .*\[train\] cannot be read: .*broken.png"):
        for loader in (data.train, data.validation):
            list(loader)


ON_THE_HUB = """
import sys
import datasets
from scap_hub.zoo.base import Preprocessing
from scap_hub.errors import DataError
from scap_hub.recipe import DataSettings
from scap_hub.training.data import load_data

flowers = datasets.load_dataset(sys.argv[1])
flowers.push_to_hub("me/flowers")
datasets.DatasetDict(train=flowers["train"]).push_to_hub("me/flowers", revision="small")

def load(name="me/flowers", **settings):
    settings = DataSettings(batch_size=4, calibration_images=8, workers=0, **settings)
    return load_data(name, Preprocessing((3, 16, 16), (0.5,) * 3, (0.5,) * 3), settings, num_classes=2)

data = load()
print(len(data.train.dataset), len(data.validation.dataset), data.labels)
print(len(load(train_split="validation", validation_split="train").train.dataset))
print(len(load(revision="small").train.dataset))
print([len(labels) for _, labels in load(streaming=True).train])
for wrong in (dict(name="me/flowes"), dict(revision="v2")):
    try:
        load(**wrong)
    except DataError as error:
        print(error)
"""


def test_data_sets_on_the_hub(tmp_path):
    folder = parquet_folder(tmp_path / "flowers")
    with running_hub() as hub:
        environment = hub.environment(tmp_path / "home", HF_TOKEN="hf_write")
        command = [sys.executable, "-c", ON_THE_HUB, str(folder)]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [
        "20 6 ['cat', 'dog']",
        "6",
        "18",  # without a validation split a tenth is held out
        "[4, 4, 4, 4, 4]",
        "the Hub has no data set 'me/flowes', or it is private: check the name, or `hf auth login`",
        "'me/flowers' has no revision 'v2' on the Hub: check its branches and tags",
    ]


UNREACHABLE = "cannot reach the Hub for data set 'me/flowers', and there is no such folder"


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("HF_HUB_OFFLINE", "1", "data set 'me/flowers' cannot be loaded on the Hub, and there is no such folder"),
        # Nobody listens on port 9 (discard).
        ("HF_ENDPOINT", "http://127.0.0.1:9", UNREACHABLE),
    ],
)
def test_a_hub_name_without_a_network_fails_at_once(tmp_path, variable, value, message):
    script = (
        "import time, torch, datasets\n"
        "from scap_hub.errors import DataError\nfrom scap_hub.training.data import load_data\n"
        "from scap_hub.zoo.base import Preprocessing\n"
        "start = time.time()\n"
        "try:\n    load_data('me/flowers', Preprocessing((1, 8, 8), (0.5,), (0.5,)))\n"
        "except DataError as error:\n    print(time.time() - start, error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", script], env=environment | {variable: value}, capture_output=True, text=True, check=True
    )
    seconds, _, error = ran.stdout.partition(" ")
    assert error.startswith(message) and error.count("\n") == 1
    assert float(seconds) < 5, "datasets alone repeats the question for 23 s"
