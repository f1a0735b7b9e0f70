"""What a training does after each epoch, and in fp16."""

import sys
import warnings
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version
from torch.utils.data import DataLoader, TensorDataset

import scap_hub
from scap_hub.errors import RecipeError
from scap_hub.recipe import DataSettings, FinetuneSettings
from scap_hub.training.data import load_data
from scap_hub.training.evaluate import evaluate
from scap_hub.zoo.base import Preprocessing
from tests.nets import Residual, tiny_net

GREY = Preprocessing((1, 8, 8), (0.5,), (0.5,))
SETTINGS = FinetuneSettings(epochs=4, learning_rate=0.01, distillation={"weight": 0})


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", GREY, DataSettings(batch_size=128), num_classes=10)


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left.state_dict().values(), right.state_dict().values(), strict=True))


class Noting:
    def __init__(self, stop_after=None, fail_after=None):
        self.rows, self.scores, self.stop_after, self.fail_after = [], [], stop_after, fail_after

    def on_epoch_end(self, row, model):
        self.rows.append(row)
        self.scores.append(model)
        if row["epoch"] == self.fail_after:
            raise ZeroDivisionError
        return row["epoch"] == self.stop_after


def test_a_callback_sees_each_epoch_and_can_end_the_training(digits):
    noting, other = Noting(stop_after=2), Noting()
    model = tiny_net()
    history = scap_hub.finetune(model, digits, SETTINGS, callbacks=[noting, other])
    assert noting.rows == other.rows == history[1:] and len(history) == 3
    assert evaluate(model, digits.validation)["top1"] == max(row["top1"] for row in history)


def test_the_epoch_of_a_callback_that_fails_is_kept(digits, tmp_path):
    whole, model = tiny_net(), tiny_net()
    scap_hub.finetune(whole, digits, SETTINGS)
    with pytest.raises(ZeroDivisionError):
        scap_hub.finetune(model, digits, SETTINGS, output_dir=tmp_path, callbacks=[Noting(fail_after=2)])
    noting = Noting()
    scap_hub.finetune(model, digits, SETTINGS, output_dir=tmp_path, callbacks=[noting])
    assert [row["epoch"] for row in noting.rows] == [2, 3, 4]
    assert same(model, whole)
    again = scap_hub.finetune(tiny_net(), digits, SETTINGS, output_dir=tmp_path, callbacks=[Noting(stop_after=4)])
    assert len(again) == 5


def test_prune_tells_callbacks_of_its_epochs():
    images = DataLoader(TensorDataset(torch.randn(16, 3, 32, 32), torch.arange(16) % 5), batch_size=8)
    noting = Noting(stop_after=1)
    result = scap_hub.prune(
        Residual(), images, model_input_size=(3, 32, 32), criterion="l1", finetune_epochs=3, evaluate_latency=False,
        callbacks=[noting],
    )  # fmt: skip
    assert len(noting.rows) == 1 and result.report.history[1:] == noting.rows


TRACKIO = """
logged, config, finished = [], {}, []
class Run:
    def log(self, values, step=None): logged.append((step, values))
    def finish(self): finished.append(1)
def init(project): logged.append(project); return Run()
class config:
    held = {}
    @classmethod
    def update(cls, values, allow_val_change): cls.held.update(values)
"""


def test_epochs_are_logged_under_the_names_of_their_rows(digits, tmp_path, monkeypatch):
    (tmp_path / "trackio").mkdir()
    (tmp_path / "trackio" / "__init__.py").write_text(TRACKIO)
    (tmp_path / "trackio-1.0.dist-info").mkdir()
    (tmp_path / "trackio-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: trackio\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    history = scap_hub.finetune(tiny_net(), digits, SETTINGS, epochs=2, log_with="trackio")
    trackio = sys.modules.pop("trackio")
    project, *logged = trackio.logged
    assert project == "scap_hub" and trackio.finished == [1] and trackio.config.held["learning_rate"] == 0.01
    assert [row for _, row in logged] == history
    hands_on_steps = Version(version("accelerate")) >= Version("1.14")
    assert [step for step, _ in logged] == ([0, 1, 2] if hands_on_steps else [None] * 3)


def test_a_tracker_that_is_not_installed_is_told_before_any_work(digits, monkeypatch):
    monkeypatch.setattr("scap_hub.run.pruning.load_dense", lambda *_: pytest.fail("worked for nothing"))
    monkeypatch.setattr("scap_hub.training.callbacks._AVAILABLE", {"wandb": lambda: False})
    for call in (lambda **k: scap_hub.finetune(tiny_net(), digits, **k), lambda **k: None):
        if call(log_with=None) is None:
            call = lambda log_with: scap_hub.prune("resnet18", "digits", finetune_log_with=log_with)  # noqa: E731
        with pytest.raises(RecipeError, match="'wandb', which is not installed: pip install wandb, or leave it out"):
            call(log_with="wandb")
    with pytest.raises(RecipeError, match=r"log_with.*'tensorboard', 'wandb' or 'trackio'"):
        scap_hub.finetune(tiny_net(), digits, log_with="tensorbord")


def test_fp16_trains_with_a_scaled_loss_and_resumes_with_its_scale(digits, tmp_path, monkeypatch):
    settings = SETTINGS.model_copy(update={"precision": "fp16"})
    scales, kept = [], torch.amp.GradScaler.load_state_dict
    scale = torch.amp.GradScaler.scale
    monkeypatch.setattr(
        torch.amp.GradScaler, "scale", lambda self, x: scales.append(self.get_scale()) or scale(self, x)
    )
    monkeypatch.setattr(torch.amp.GradScaler, "__init__", _impatient)
    whole, resumed = tiny_net(), tiny_net(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scap_hub.finetune(whole, digits, settings)
    assert evaluate(whole, digits.test)["top1"] > 0.8 and scales[-1] > scales[0]
    with pytest.raises(ZeroDivisionError):
        scap_hub.finetune(tiny_net(), digits, settings, output_dir=tmp_path, callbacks=[Noting(fail_after=2)])
    loaded = []
    monkeypatch.setattr(
        torch.amp.GradScaler, "load_state_dict", lambda self, state: loaded.append(state["scale"]) or kept(self, state)
    )
    scap_hub.finetune(resumed, digits, settings, output_dir=tmp_path)
    assert loaded and loaded[0] != scales[0]
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


_init = torch.amp.GradScaler.__init__


def _impatient(self, device):
    _init(self, device, growth_interval=5)
