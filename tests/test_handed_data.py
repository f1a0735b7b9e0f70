"""Torch data sets and loaders that a user hands over: never trained or measured on what they do not mean."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset, default_collate
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

import scap_hub
from scap_hub.errors import DataError, ModelError
from scap_hub.recipe import DataSettings
from scap_hub.training.data import load_data
from scap_hub.training.evaluate import count
from scap_hub.zoo import load_model
from scap_hub.zoo.base import Preprocessing

COLOUR = Preprocessing((3, 16, 16), (0.5,) * 3, (0.5,) * 3)
NAMES = ["ash", "birch", "cedar"]
MODELS = ["cedar", "Ash", "birch"]
TENSORS = v2.Compose(
    [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(COLOUR.mean, COLOUR.std), v2.ToPureTensor()]
)
SETTINGS = DataSettings(batch_size=8, workers=0)


def brightness(name):
    return 20 + 80 * NAMES.index(name)


@pytest.fixture
def folder(tmp_path):
    """The class is written in the image: each is of one brightness."""
    for name in NAMES:
        (tmp_path / name).mkdir()
        for number in range(10):
            Image.new("RGB", (20, 16), (brightness(name),) * 3).save(tmp_path / name / f"{number}.png")
    return tmp_path


def seen(loader, models=MODELS):
    """{name in the image: names that its label has for the model}."""
    found = {}
    for images, labels in loader:
        assert images.dtype == torch.float32 and labels.dtype == torch.int64
        for image, label in zip(images, labels, strict=True):
            level = (image.mean().item() * 0.5 + 0.5) * 255
            name = min(NAMES, key=lambda name: abs(brightness(name) - level))
            assert abs(brightness(name) - level) < 1
            found.setdefault(name, set()).add(models[label])
    return found


RIGHT = {"ash": {"Ash"}, "birch": {"birch"}, "cedar": {"cedar"}}


class Around(Dataset):
    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return self.dataset[index]


class Own(Dataset):
    """Names its classes, and has nothing of torchvision's."""

    classes = tuple(NAMES)

    def __len__(self):
        return 30

    def __getitem__(self, index):
        return torch.full((3, 16, 16), brightness(NAMES[index % 3]) / 127.5 - 1), index % 3


class Dicts(Around):
    """Samples as transformers' processors name them."""

    def __getitem__(self, index):
        return dict(zip(("pixel_values", "labels"), self.dataset[index], strict=True))


@pytest.mark.parametrize("transform", [None, TENSORS])
@pytest.mark.parametrize("workers", [0, 1])
def test_image_folders_are_matched_by_name(folder, transform, workers):
    settings = DataSettings(batch_size=8, workers=workers)
    given = ImageFolder(folder, transform and v2.Compose([v2.Resize((16, 16)), transform]))
    data = load_data(given, COLOUR, settings, num_classes=3, model_classes=MODELS)
    assert data.labels == MODELS
    for loader in (data.train, data.validation, data.calibration):
        assert seen(loader).items() <= RIGHT.items()
    assert seen(data.train) == RIGHT
    assert len(data.validation.dataset) == 3 and len(data.calibration.dataset) == 27
    alone = load_data({"train": given, "test": Subset(given, range(30))}, COLOUR, settings, num_classes=3)
    assert alone.labels == NAMES and seen(alone.test, NAMES) == {name: {name} for name in NAMES}


def test_pil_images_are_as_of_the_same_folder(folder):
    named = load_data(str(folder), COLOUR, SETTINGS, num_classes=3, model_classes=MODELS)
    given = load_data(ImageFolder(folder), COLOUR, SETTINGS, num_classes=3, model_classes=MODELS)
    for ours, theirs in ((given.calibration, named.calibration), (given.validation, named.validation)):
        for mine, other in zip(ours, theirs, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: Subset(d, range(30)), lambda d: ConcatDataset([d, d])])
def test_loaders_over_named_classes_are_renumbered(wrap):
    for source in (wrap(Own()), DataLoader(wrap(Own()), batch_size=7)):
        data = load_data(source, COLOUR, SETTINGS, num_classes=3, model_classes=MODELS)
        assert seen(data.train) == seen(data.calibration) == RIGHT
    loaders = {name: DataLoader(wrap(Own()), batch_size=7) for name in ("train", "validation", "test")}
    data = load_data(loaders, COLOUR, SETTINGS, num_classes=3, model_classes=MODELS)
    assert seen(data.validation) == seen(data.test) == RIGHT
    assert seen(loaders["test"], NAMES) == {name: {name} for name in NAMES}, "the caller's loader stays as it is"


@pytest.mark.parametrize("transform", [None, TENSORS])
def test_samples_in_dictionaries_keep_their_labels(folder, transform):
    settings = DataSettings(match_classes=False, **SETTINGS.model_dump(exclude={"match_classes"}))
    pairs, dicts = (load_data(around(ImageFolder(folder, transform)), COLOUR, settings, num_classes=3)
                    for around in (Around, Dicts))  # fmt: skip
    for ours, theirs in zip(dicts.validation, pairs.validation, strict=True):
        assert all(map(torch.equal, ours, theirs)) and len(ours) == 2


def test_labels_that_may_have_been_changed_are_refused(folder):
    own = default_collate
    uncertain = (
        DataLoader(Own(), collate_fn=lambda samples: own(samples)),
        DataLoader(Around(Own())),
        Around(Own()),
        ImageFolder(folder, target_transform=lambda label: [1, 2, 0][label]),
    )
    for source in uncertain:
        with pytest.raises(DataError, match=r"numbers its classes otherwise than the model.*data\.match_classes=false"):
            load_data(source, COLOUR, SETTINGS, num_classes=3, model_classes=MODELS)
        load_data(source, COLOUR, SETTINGS, num_classes=3, model_classes=NAMES)
    settings = DataSettings(workers=0, match_classes=False)
    data = load_data(uncertain[-1], COLOUR, settings, num_classes=3, model_classes=MODELS)
    assert seen(data.train) == RIGHT


def test_other_names_counts_and_numbers_are_refused():
    cases = [
        (["ash", "birch", "oak"], "'cedar' is unknown to the model, which has 'oak'"),
        ([*NAMES, "oak"], None),
        ([*MODELS[:2], "oak", "elm"], "'Own' has 3 classes, the classifier 4"),
    ]
    for models, message in cases:
        if message is None:
            load_data(DataLoader(Own()), COLOUR, SETTINGS, num_classes=4, model_classes=models)
            continue
        with pytest.raises(DataError, match=message):
            load_data(DataLoader(Own()), COLOUR, SETTINGS, num_classes=len(models), model_classes=models)
        unlabelled = DataSettings(labels=False, workers=0)
        data = load_data(DataLoader(Own()), COLOUR, unlabelled, num_classes=len(models), model_classes=models)
        assert {len(batch) for batch in data.train} == {1} and data.validation is None
    other, gaps = Own(), Own()
    other.classes = NAMES[::-1]
    with pytest.raises(DataError, match="0 is 'ash' in one and 'cedar' in another"):
        load_data(ConcatDataset([Own(), other]), COLOUR, SETTINGS, num_classes=3)
    gaps.class_to_idx = {"ash": 1, "cedar": 0}
    load_data(gaps, COLOUR, SETTINGS, num_classes=3, model_classes=MODELS)
    gaps.class_to_idx = {"ash": 0, "cedar": 2}
    with pytest.raises(DataError, match="its class_to_idx leaves out numbers"):
        load_data(gaps, COLOUR, SETTINGS, num_classes=3, model_classes=MODELS)
    gaps.class_to_idx = {"tench": 0, "Tinca tinca": 0, "shark": 1}
    assert load_data(gaps, COLOUR, SETTINGS, num_classes=2, model_classes=["tench, Tinca tinca", "shark"])


def load(images, labels, batch_size=4, num_classes=3, **options):
    loader = DataLoader(TensorDataset(images, labels), batch_size=batch_size, **options)
    return load_data(loader, COLOUR, SETTINGS, num_classes=num_classes)


IMAGES = torch.linspace(-1, 1, 9 * 3 * 16 * 16).reshape(9, 3, 16, 16)
LABELS = torch.arange(9) % 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "labels",
    [
        LABELS, LABELS.to(torch.uint8), LABELS.int(), LABELS.float(), LABELS.double(), LABELS[:, None],
        LABELS[:, None].float(), nn.functional.one_hot(LABELS), nn.functional.one_hot(LABELS).double(),
        nn.functional.one_hot(LABELS).bool(),
    ],
)  # fmt: skip
def test_types_that_are_clear_are_read(dtype, labels):
    data = load(IMAGES.to(dtype), labels, 5)
    for loader in (data.train, data.calibration):
        images, numbers = (torch.cat(column) for column in zip(*loader, strict=True))
        assert images.dtype == torch.float32 and torch.equal(images, IMAGES.to(dtype).float())
        assert numbers.dtype == torch.int64 and torch.equal(numbers, LABELS)


ONE_HOT = nn.functional.one_hot(LABELS)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS + 0.5, "label 0.5 in the DataLoader is no class number"),
        (LABELS / torch.zeros(9), "is no class number"),
        (ONE_HOT * 0.9 + 0.03, "is no class number"),
        (ONE_HOT + ONE_HOT.flip(1), r"labels of shape \(4, 3\) in the DataLoader for 4 images are neither"),
        (torch.zeros(9, 3), r"labels of shape \(4, 3\)"),
        (nn.functional.one_hot(LABELS, 5), r"labels of shape \(4, 5\)"),
        (torch.zeros(9, 3, 3), r"labels of shape \(4, 3, 3\)"),
        (LABELS - 1, r"label -1 in the DataLoader is outside the classifier's range 0\.\.2"),
    ],
)
def test_labels_that_are_unclear_are_refused(labels, message):
    with pytest.raises(DataError, match=message) as error:
        load(IMAGES, labels)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_wrong_label_in_a_later_batch_is_one_line(workers):
    labels = torch.cat([LABELS[:8], torch.tensor([3])])
    loader = DataLoader(TensorDataset(IMAGES, labels), batch_size=5, num_workers=workers)
    data = load_data(loader, COLOUR, DataSettings(calibration_images=4), num_classes=3)
    with pytest.raises(DataError, match=r"^label 3 in the DataLoader is outside the classifier's range") as error:
        scap_hub.finetune(net(), data, epochs=1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(4, 1, 8, 8), (4, 8, 8, 3)])
def test_images_of_other_channels_than_the_models_are_refused(shape):
    loader = DataLoader(TensorDataset(torch.rand(shape), torch.arange(4) % 2), batch_size=2)
    with pytest.raises(DataError, match=rf"have {shape[1]} channels, .*and the model takes 3"):
        list(load_data(loader, COLOUR, SETTINGS, num_classes=3).calibration)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.bool])
def test_integer_images_are_refused(dtype):
    images = (IMAGES.abs() * 255).to(dtype)
    for source in (TensorDataset(images, LABELS), DataLoader(TensorDataset(images, LABELS), batch_size=4)):
        with pytest.raises(DataError, match=r", not normalised: scale them .* mean \(0\.5, 0\.5, 0\.5\)"):
            list(load_data(source, COLOUR, SETTINGS, num_classes=3).calibration)


def test_samples_that_make_no_batch(folder):
    (folder / "ash" / "0.png").unlink()
    Image.new("RGB", (30, 30)).save(folder / "ash" / "0.png")
    uneven = ImageFolder(folder, v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]))
    cases = [
        (DataLoader(ImageFolder(folder), batch_size=4), "cannot batch PIL images: give the data set itself"),
        (DataLoader(uneven, batch_size=4), "make no batch: .*give images of one size"),
        (uneven, "make no batch: .*give images of one size"),
        (TensorDataset(torch.zeros(0, 3, 16, 16)), "the data set has no images"),
        (DataLoader([(IMAGES[0], "ash")]), r"this one yields list of a tensor \(1, 3, 16, 16\), tuple of str"),
    ]
    for source, message in cases:
        with pytest.raises(DataError, match=message):
            list(load_data(source, COLOUR, SETTINGS, num_classes=3).calibration)
        with pytest.raises(DataError, match=message):
            scap_hub.finetune(net(), source, epochs=1, data_settings=SETTINGS, input_size=(3, 16, 16))
    (folder / "ash" / "0.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="image 0 of the data set cannot be read"):
        load_data(ImageFolder(folder), COLOUR, SETTINGS, num_classes=3)


def net(classes=3):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 1),
        nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16, classes),
    )  # fmt: skip


def test_a_last_batch_of_one_image():
    loader = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4, shuffle=True)
    data = load_data({"train": loader, "validation": loader}, COLOUR, SETTINGS, num_classes=3)
    assert [len(images) for images, _ in data.train] == [4, 4]
    assert [len(images) for images, _ in data.validation] == [4, 4, 1]
    history = scap_hub.finetune(net(), data, epochs=1)
    assert len(history) == 2 and len(loader) == 3
    for small in (load(IMAGES, LABELS, 64), load_data(TensorDataset(IMAGES, LABELS), COLOUR, num_classes=3)):
        assert len(scap_hub.finetune(net(), small, epochs=1)) == 2
    with pytest.raises(DataError, match=r"a batch of one image cannot be trained on .* give batches of two or more"):
        scap_hub.finetune(net(), load(IMAGES, LABELS, 1), epochs=1)


class Streamed(IterableDataset):
    def __iter__(self):
        return iter(zip(IMAGES, LABELS, strict=True))


class Changing(DataLoader):
    def __iter__(self):
        for images, labels in super().__iter__():
            yield images / 2, labels


def test_streams_and_loaders_of_another_kind():
    data = load_data(Streamed(), COLOUR, SETTINGS, num_classes=3)
    assert torch.equal(torch.cat([images for images, _ in data.train]), IMAGES)
    with pytest.raises(DataError, match="Changing has an __iter__ of its own"):
        load_data(Changing(TensorDataset(IMAGES, LABELS)), COLOUR, SETTINGS, num_classes=3)


def test_prune_with_a_data_set_of_pictures(folder):
    run = {"criterion": "l1", "target": "ratio=0.5", "finetune_epochs": 1, "evaluate_latency": False}
    result = scap_hub.prune(net(), ImageFolder(folder), model_input_size=(3, 16, 16), data_batch_size=8, **run)
    assert result.report.after.top1 is not None and len(result.report.history) == 2
    assert np.isfinite(result.report.history[-1]["loss"])


RUN = {
    "criterion": "l1",
    "target": "ratio=0.5",
    "finetune_epochs": 0,
    "repair_tune_steps": 0,
    "evaluate_latency": False,
}


@pytest.mark.parametrize("name", ["timm's, in a loader", "transformers', in a data set"])
def test_a_model_is_measured_and_published_for_the_size_of_the_tensors(tmp_path, name):
    source, named = TensorDataset(torch.randn(8, 3, 32, 48), torch.arange(8) % 3), {}
    if name.startswith("timm"):
        source, model = DataLoader(source, batch_size=4), "test_resnet"
        named = {"model_pretrained": False, "model_num_classes": 3}
    else:
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=3)
        model = ResNetForImageClassification(config)
    result = scap_hub.prune(model, source, output_dir=tmp_path / "small", **named, **RUN)
    loaded = load_model(tmp_path / "small")
    assert loaded.preprocessing.input_size == (3, 32, 48)
    assert count(loaded.module, (3, 32, 48))["macs"] == result.report.after.macs


def images_in_a_list(samples):
    images, labels = zip(*samples, strict=True)
    return list(images), torch.stack(labels)


def test_a_list_of_images_has_a_size_and_workers_of_the_caller_do_not_stay():
    source = TensorDataset(torch.randn(8, 3, 32, 48), torch.arange(8) % 3)
    model, workers = timm.create_model("test_resnet", num_classes=3), {"num_workers": 1, "persistent_workers": True}
    loader = DataLoader(source, batch_size=4, collate_fn=images_in_a_list, **workers)
    result = scap_hub.prune(model, loader, **RUN)
    assert result.report.about["input_size"] == [3, 32, 48]
    assert result.report.before.macs == count(model, (3, 32, 48))["macs"]
    assert loader._iterator is None


class Once(IterableDataset):
    """Can be read only once."""

    def __init__(self):
        self.samples = iter([(torch.randn(3, 32, 32), number % 3) for number in range(8)])

    def __iter__(self):
        return self.samples


def test_images_that_can_be_read_only_once_are_told():
    train = TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8) % 3)
    model = timm.create_model("test_resnet", num_classes=3)
    with pytest.raises(DataError, match=r"at least one image: .* each time"):
        scap_hub.prune(model, {"train": train, "validation": Once()}, **RUN)


def test_images_that_a_model_cannot_take_are_told_before_any_work():
    model = ViTForImageClassification(
        ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=32)
    )
    with pytest.raises(
        ModelError, match=r"ViT\w+ does not run on images of '\w+', \(3, 16, 16\) each: .*model \(32\*32\);"
    ):
        scap_hub.prune(model, DataLoader(TensorDataset(torch.randn(8, 3, 16, 16)), batch_size=4), **RUN)


def test_floats_that_are_no_normalised_pixels_are_told():
    raw = TensorDataset((IMAGES * 127.5 + 127.5).round(), LABELS)
    for source in (raw, DataLoader(raw, batch_size=4)):
        with pytest.warns(UserWarning, match=r"have values up to 255, and normalised .* would be within 1: normalise"):
            load_data(source, COLOUR, SETTINGS, num_classes=3)


@pytest.mark.parametrize("name", ["no/such-photos", "/no/such/photos", "photoz"])
def test_a_typo_in_the_data_is_told_before_the_model_is_loaded(name, monkeypatch):
    monkeypatch.setattr("scap_hub.run.inputs.load_model", lambda *args: pytest.fail("loaded for nothing"))
    with pytest.raises(DataError, match=name) as error:
        scap_hub.prune("resnet50", name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_images_of_another_size_than_the_model_is_measured_for_are_told(split):
    sizes = {"train": 32, "validation": 32, split: 48}
    loaders = {
        name: DataLoader(TensorDataset(torch.randn(8, 3, size, size), torch.arange(8) % 4), batch_size=4)
        for name, size in sizes.items()
    }
    told = f"images of {split} are 48x48 pixels, and MACs, .* of 32x32: .* model.input_size=\\[3, 48, 48\\]"
    recipe = {"data": {"calibration_images": 8}, "criterion": "l1", "evaluate": {"latency": False}}
    changes = {"target": "ratio=0.5", "model_input_size": (3, 32, 32), "finetune_epochs": 0, "repair_tune_steps": 0}
    with pytest.warns(UserWarning, match=told):
        result = scap_hub.prune(timm.create_model("resnet10t", num_classes=4), loaders, recipe, **changes)
    assert result.report.about["input_size"] == [3, 32, 32]
