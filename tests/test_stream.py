"""Training on streams: by steps, from any place on, and each reader its own share."""

import itertools

import datasets
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

import scap_hub
from scap_hub.errors import DataError, RecipeError, TrainingError
from scap_hub.recipe import DataSettings, FinetuneSettings
from scap_hub.training.data import load_data, stream
from scap_hub.training.data.stream import START, Share, Stream
from scap_hub.zoo.base import Preprocessing
from tests.nets import tiny_net

GREY = Preprocessing((1, 8, 8), (0.5,), (0.5,))
IMAGES = 90


def rows(shards=5):
    """Image k has brightness 2k and label k % 10."""
    numbers = range(IMAGES)
    source = {"image": [Image.new("L", (8, 8), 2 * k) for k in numbers], "label": [k % 10 for k in numbers]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    return datasets.Dataset.from_dict(source, features=features).to_iterable_dataset(num_shards=shards)


def data(shards=5, **settings):
    settings = {"batch_size": 8, "calibration_images": 8, "workers": 0, "augmentation": "crop", **settings}
    return load_data(rows(shards), GREY, DataSettings(**settings), num_classes=10)


def numbers(samples):
    return [int(image.flatten()[0]) // 2 for (image, _), _ in samples]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(stream, "BLOCK", 7)


@pytest.mark.parametrize(("shards", "readers"), [(5, 1), (5, 3), (5, 5), (2, 3), (1, 4)])
def test_every_image_goes_to_one_reader_in_every_pass(shards, readers):
    whole: Stream = data(shards).train.dataset
    for passed in range(3):
        shares = [
            [int(row["label"]) for row, *_ in whole._rows(passed, Share(number, readers), 0, 0)]
            for number in range(readers)
        ]
        assert all(shares) and sorted(itertools.chain(*shares)) == sorted([k % 10 for k in range(IMAGES)])


def test_a_pass_goes_on_from_every_place():
    whole: Stream = data().train.dataset
    samples = list(itertools.islice(whole.endless(START), 2 * IMAGES))
    order = numbers(samples)
    assert sorted(order[:IMAGES]) == sorted(order[IMAGES:]) == list(range(IMAGES))
    assert order[:IMAGES] != order[IMAGES:] != list(range(IMAGES))
    for done in (1, 7, 20, 60, 89, 90, 91, 130):
        rest = itertools.islice(whole.endless(samples[done - 1][1]), 30)
        assert numbers(rest) == order[done : done + 30]


def test_the_ranks_of_a_stream_measure_each_image_once():
    parts = [data().train.dataset.of_rank(rank, 3) for rank in range(3)]
    found = [[int(image.flatten()[0]) // 2 for image, _ in part] for part in parts]
    assert all(found) and sorted(itertools.chain(*found)) == list(range(IMAGES))


def test_an_unknown_length_is_trained_on_by_steps():
    with pytest.raises(DataError, match=r"does not say how many .* set finetune.steps, .* a pass .* their number / 8"):
        scap_hub.finetune(tiny_net(), data(), epochs=1)
    history = scap_hub.finetune(tiny_net(), data(), epochs=3, steps=20)
    assert [row["epoch"] for row in history] == [0, 1, 2, 3]
    assert history[-1]["learning_rate"] == pytest.approx(0, abs=1e-6)
    assert len(scap_hub.finetune(tiny_net(), data(), epochs=5, steps=2)) == 3
    with pytest.raises(RecipeError, match="steps"):
        scap_hub.finetune(tiny_net(), data(), steps=0)


def test_prune_tells_that_before_any_work(monkeypatch):
    monkeypatch.setattr("scap_hub.run.pruning.prune_loaded", lambda *_, **__: pytest.fail("worked for nothing"))
    with pytest.raises(DataError, match=r"set finetune\.steps"):
        scap_hub.prune(tiny_net(), rows(), model_input_size=(1, 8, 8))


@pytest.mark.filterwarnings("ignore:the dense model has top-1")
def test_a_run_on_streams_of_unknown_length(monkeypatch):
    run = {"model_input_size": (1, 8, 8), "criterion": "l1", "target": "ratio=0.5", "evaluate_latency": False}
    run |= {"criterion_diagnostics": False, "finetune_epochs": 1, "data_batch_size": 8}
    streams = datasets.IterableDatasetDict({"train": rows(), "validation": rows(1)})
    monkeypatch.setattr("scap_hub.run.forecast.fastest", lambda call, seconds: 1.0)
    told = [scap_hub.forecast(tiny_net(), streams, finetune_steps=steps, **run).seconds for steps in (20, 40)]
    longer = told[1]["fine-tuning"] - told[0]["fine-tuning"]
    assert longer == pytest.approx(2 * 20) and told[0]["measuring"] == 0, "a second a step, and one for the teacher"
    report = scap_hub.prune(tiny_net(), streams, finetune_steps=1, **run).report
    assert len(report.history) == 2 and report.after.top1 is not None


def test_steps_are_optimiser_steps(monkeypatch):
    taken = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: taken.append(1) or step(self, *a, **k))
    scap_hub.finetune(tiny_net(), data(), epochs=2, steps=7, gradient_accumulation=2)
    assert len(taken) == 7


def test_the_dense_model_is_tuned_as_long_by_epoch():
    settings = FinetuneSettings(epochs=5, steps=100).lasting(2)
    assert (settings.epochs, settings.steps) == (2, 40)
    assert FinetuneSettings(epochs=5).lasting(2).steps is None


class Numbers(IterableDataset):
    """As many images as nobody knows."""

    def __iter__(self):
        generator = torch.Generator().manual_seed(int(torch.randint(1000, ())))
        for k in range(50):
            yield torch.rand(1, 8, 8, generator=generator), k % 10


class Stopping(torch.nn.Module):
    """A teacher that ends the run at its n-th batch, as a lost machine would."""

    def __init__(self, after):
        super().__init__()
        self.net, self.left = tiny_net(1), after

    def forward(self, images):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.net(images)


@pytest.mark.parametrize(
    "kind",
    ["stream", "stream with loader processes", "torch stream", pytest.param("digits", marks=pytest.mark.slow)],
)
def test_a_training_by_steps_resumes_exactly(kind, tmp_path, capsys):
    def source():
        if kind == "torch stream":
            return load_data(DataLoader(Numbers(), batch_size=8), GREY, num_classes=10)
        if kind == "digits":
            return load_data("digits", GREY, DataSettings(batch_size=128), num_classes=10)
        return data(workers=2 if "processes" in kind else 0)

    settings = FinetuneSettings(epochs=4, steps=22, mixup=0.2, gradient_accumulation=1, ema=0.9)
    whole, resumed = tiny_net(), tiny_net(5)
    history = scap_hub.finetune(whole, source(), settings, Stopping(1000), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        scap_hub.finetune(tiny_net(), source(), settings, Stopping(14), tmp_path / "cut")
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["checkpoint-00002"]
    torch.manual_seed(99)
    capsys.readouterr()
    again = scap_hub.finetune(resumed, source(), settings, Stopping(1000), tmp_path / "cut")
    assert [row["loss"] for row in again[1:]] == [row["loss"] for row in history[1:]]
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )
    assert ("batches again" in capsys.readouterr().err) == (kind in ("torch stream", "digits"))


def test_another_number_of_loader_processes_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        scap_hub.finetune(tiny_net(), data(), None, Stopping(8), tmp_path, epochs=4, steps=20)
    with pytest.raises(TrainingError, match=r"read by 0 loader processes, not 1; set data\.workers to 0"):
        scap_hub.finetune(tiny_net(), data(workers=1), None, Stopping(8), tmp_path, epochs=4, steps=20)
