import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

import scap_hub
from scap_hub.errors import DataError, RecipeError, TrainingError
from scap_hub.recipe import DataSettings, FinetuneSettings
from scap_hub.run.report import measure
from scap_hub.training.data import Data, load_data
from scap_hub.training.distillation import attention_loss, feature_maps
from scap_hub.training.evaluate import count, evaluate
from scap_hub.training.finetune import finetune
from scap_hub.zoo.base import Preprocessing
from tests.nets import tiny_net

GREY = Preprocessing((1, 8, 8), (0.5,), (0.5,))
QUICK = FinetuneSettings(epochs=3, learning_rate=0.01)


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", GREY, num_classes=10)


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_tiny_net_learns_the_digits(digits):
    model = tiny_net()
    history = finetune(model, digits, FinetuneSettings(epochs=6, learning_rate=0.01))
    assert not model.training
    assert [row["epoch"] for row in history] == list(range(7))
    assert history[0]["top1"] < 0.3 and history[-1]["loss"] < history[1]["loss"]
    assert evaluate(model, digits.test)["top1"] > 0.9


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "sgd", "learning_rate": 0.1, "schedule": "onecycle", "warmup": 0.3},
        {"ema": 0.99, "label_smoothing": 0.1},
        {"mixup": 0.2, "gradient_accumulation": 2, "warmup": 0.0},
        {"precision": "bf16", "channels_last": True},
    ],
)
def test_options_train_too(digits, options):
    model = tiny_net()
    finetune(model, digits, FinetuneSettings(**{"epochs": 5, "learning_rate": 0.01, **options}))
    assert evaluate(model, digits.test)["top1"] > 0.85
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_the_learning_rate_rises_and_falls(digits):
    rates = [row["learning_rate"] for row in finetune(tiny_net(), digits, QUICK)[1:]]
    assert QUICK.learning_rate > rates[0] > rates[1] > rates[2]
    assert rates[2] == pytest.approx(0, abs=1e-6)


def test_weight_decay_shrinks_the_weights_of_layers_and_nothing_else():
    """A step of AdamW at gradient zero: weights times 1 - rate x decay, norms and biases as they were."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2)).eval()
    images = DataLoader(TensorDataset(torch.zeros(4, 1, 8, 8)), batch_size=4)
    before = copy.deepcopy(net.state_dict())
    data = Data(train=images, validation=None, calibration=images, labels=None, name="dark")
    settings = FinetuneSettings(epochs=1, learning_rate=0.1, weight_decay=0.5, warmup=0.0, distillation={"weight": 1})
    # A student that is its own teacher, in eval mode: there is nothing to learn.
    net.train = lambda mode=True: net
    finetune(net, data, settings, teacher=copy.deepcopy(net))
    for name, value in net.state_dict().items():
        decays = name in ("0.weight", "3.weight")
        expected = before[name] * (1 - 0.1 * 0.5) if decays else before[name]
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6, msg=name)


class Recording(nn.Module):
    """Notes the values it is given, one an image; its logits are as many multiples of it as there are classes."""

    def __init__(self, classes):
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.linspace(-1, 1, classes)), []

    def forward(self, images):
        self.seen.append(images[:, 0, 0, 0])
        return self.seen[-1][:, None] * self.weight


def test_mixup_gives_each_mixture_the_labels_of_both_its_images_in_their_shares():
    """Image k is k everywhere and of class k, so that a mixture says what it is made of."""
    values = torch.arange(5.0)
    images = values[:, None, None, None].expand(-1, 1, 2, 2)
    loader = DataLoader(TensorDataset(images, values.long()), batch_size=5)
    model = Recording(5)
    data = Data(train=loader, validation=None, calibration=loader, labels=None, name="ramp")
    settings = FinetuneSettings(epochs=3, mixup=1.0, learning_rate=1e-9, warmup=0.0, weight_decay=0.0)
    history = finetune(model, data, settings)
    shares = set()
    for mixed, row in zip(model.seen, history[1:], strict=True):
        share = 1 - float(mixed[0]) / 4  # of image 0, whose partner is the last one
        torch.testing.assert_close(mixed, share * values + (1 - share) * values.flip(0))
        targets = share * torch.eye(5) + (1 - share) * torch.eye(5).flip(0)
        logits = mixed[:, None] * model.weight.detach()
        assert row["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, targets)), rel=1e-5)
        shares.add(round(share, 3))
    assert len(shares) > 1 and all(0 < share < 1 for share in shares)


@pytest.fixture(scope="module")
def teacher(digits):
    model = tiny_net(1)
    finetune(model, digits, FinetuneSettings(epochs=6, learning_rate=0.01))
    return model


def test_distillation_needs_no_labels(digits, teacher):
    unlabelled = load_data("digits", GREY, DataSettings(labels=False))
    assert unlabelled.validation is None
    student, before = tiny_net(), copy.deepcopy(teacher.state_dict())
    with pytest.raises(DataError, match="these images have no labels"):
        finetune(student, unlabelled, QUICK)
    finetune(student, unlabelled, FinetuneSettings(epochs=5, learning_rate=0.01), teacher=teacher)
    assert evaluate(student, digits.test)["top1"] > 0.85
    assert same(teacher.state_dict(), before)


def test_any_data_set_and_keys_of_the_recipe_do_as_well(digits, teacher):
    """The public call: what it is given it reads as `prune` does."""
    models = [tiny_net() for _ in range(3)]
    settings = DataSettings(batch_size=128)
    ready = load_data("digits", GREY, settings, num_classes=10)
    finetune(models[0], ready, FinetuneSettings(epochs=1, learning_rate=0.01), teacher)
    size = {"input_size": (1, 8, 8), "data_settings": settings}
    scap_hub.finetune(models[1], "digits", teacher=teacher, epochs=1, learning_rate=0.01, **size)
    assert same(models[0].state_dict(), models[1].state_dict())
    history = scap_hub.finetune(models[2], ready.train, QUICK, teacher=teacher, epochs=1)
    assert len(history) == 2 and history[1]["loss"] > 0
    with pytest.raises(RecipeError, match="did you mean 'finetune_epochs'"):
        scap_hub.finetune(models[2], "digits", epoch=1)
    wrong = DataLoader(TensorDataset(torch.rand(8, 1, 8, 8), torch.full((8,), 10)), batch_size=8)
    with pytest.raises(DataError, match=r"label 10 in the DataLoader is outside the classifier's range 0\.\.9"):
        scap_hub.finetune(models[2], wrong, epochs=1)


def test_pure_distillation_ignores_labels(teacher):
    settings = FinetuneSettings(epochs=1, distillation={"weight": 1.0})
    images = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    trained = []
    for label in (0, 7):
        model = tiny_net()
        loader = DataLoader(TensorDataset(images, torch.full((64,), label)), batch_size=32)
        finetune(model, load_data(loader, GREY), settings, teacher=teacher)
        trained.append(model.state_dict())
    assert same(*trained) and not same(trained[0], tiny_net().state_dict())


def test_attention_maps_are_learned_whatever_the_widths(digits, teacher):
    """Of two narrow students, the one that learns where to look looks there."""
    images = next(iter(digits.test))[0]
    groups = scap_hub.channel_groups(teacher, images[:1])
    plan = scap_hub.select(groups, {g.name: torch.rand(g.size) for g in groups if g.prunable}, "ratio=0.5", round_to=1)
    distances = {}
    for weight in (0.0, 20.0):
        student = scap_hub.apply_plan(teacher, plan)
        settings = FinetuneSettings(epochs=3, learning_rate=0.01, distillation={"features": weight})
        finetune(student, digits, settings, teacher=teacher)
        with feature_maps(student.eval()) as own, feature_maps(teacher.eval()) as theirs, torch.no_grad():
            student(images), teacher(images)
        assert own.keys() == theirs.keys() == {(8, 8), (4, 4), (2, 2)}
        distances[weight] = float(attention_loss(own, theirs))
        assert not any(module._forward_hooks for net in (student, teacher) for module in net.modules())
    assert distances[20.0] < 0.7 * distances[0.0]


def test_attention_is_what_the_formula_says():
    student, teacher = torch.randn(2, 3, 4, 5), torch.randn(2, 7, 4, 5)
    expected = 0.0
    for image in range(2):
        q, p = ((maps[image] ** 2).mean(0) for maps in (student, teacher))
        expected += float(((q / q.norm() - p / p.norm()) ** 2).sum()) / 2
    assert float(attention_loss({(4, 5): student}, {(4, 5): teacher, (2, 2): teacher})) == pytest.approx(expected)
    with pytest.raises(TrainingError, match="makes none; set it"):
        attention_loss({}, {})


def test_the_best_weights_are_kept_the_ones_it_came_with_included(digits, teacher):
    model = copy.deepcopy(teacher)
    with pytest.warns(
        UserWarning, match="no epoch made the model better .* weights are those from before; lower finetune"
    ):
        history = finetune(model, digits, FinetuneSettings(epochs=2, optimizer="sgd", learning_rate=5.0, warmup=0.0))
    assert max(row["top1"] for row in history[1:]) < history[0]["top1"]
    assert same(model.state_dict(), teacher.state_dict())


def test_training_in_vain_is_told_wherever_training_is_told(teacher, tmp_path):
    changes = {"target": "ratio=0.9", "model_input_size": (1, 8, 8), "criterion": "l1", "evaluate_latency": False}
    training = {"epochs": 1, "dense_epochs": 1, "optimizer": "sgd", "learning_rate": 5.0, "warmup": 0.0}
    result = scap_hub.prune(teacher, "digits", {"finetune": training}, **changes)
    saved = result.save_pretrained(tmp_path / "out")
    told = "tuned for 1 epoch; none made it better on the validation images: its weights are those from before."
    assert result.report.tuned.kept == 0 and told in (saved / "README.md").read_text()
    assert [note for note in result.report.notes() if "Fine-tuning made it no better" in note]
    assert "none made it better" in (saved / "report.html").read_text()

    fine = scap_hub.prune(tiny_net(), "digits", {"finetune": {"epochs": 3, "learning_rate": 0.01}}, **changes)
    assert not [note for note in fine.report.notes() if "no better" in note]


def test_patience_stops_early(digits, teacher):
    settings = FinetuneSettings(epochs=9, optimizer="sgd", learning_rate=5.0, warmup=0.0, patience=2)
    assert len(finetune(copy.deepcopy(teacher), digits, settings)) == 3


def test_no_epochs_change_nothing(digits):
    model = tiny_net()
    assert [row["epoch"] for row in finetune(model, digits, FinetuneSettings(epochs=0))] == [0]
    assert same(model.state_dict(), tiny_net().state_dict())


class _Interrupting(nn.Module):
    """A teacher that stops the run at its n-th batch, as a lost machine would."""

    def __init__(self, teacher, after):
        super().__init__()
        self.teacher, self.left = teacher, after

    def forward(self, images):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.teacher(images)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_interrupted_run_resumes_exactly(tmp_path, teacher, workers):
    data = load_data("digits", GREY, DataSettings(batch_size=128, workers=workers))
    settings = FinetuneSettings(epochs=4, learning_rate=0.01, ema=0.9, mixup=0.2, optimizer="adamw")
    whole = tiny_net()
    history = finetune(whole, data, settings, teacher=teacher, output_dir=tmp_path / "whole", seed=3)

    with pytest.raises(KeyboardInterrupt):
        finetune(tiny_net(), data, settings, _Interrupting(teacher, 25), tmp_path / "cut", seed=3)
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["checkpoint-00002"]
    torch.manual_seed(99)
    resumed = tiny_net(5)
    continued = finetune(resumed, data, settings, teacher=teacher, output_dir=tmp_path / "cut", seed=3)
    assert same(resumed.state_dict(), whole.state_dict())
    for row, expected in zip(continued, history, strict=True):
        assert {**row, "seconds": 0} == {**expected, "seconds": 0}

    finished = tiny_net(6)
    finetune(finished, data, settings, teacher=teacher, output_dir=tmp_path / "cut", seed=3)
    assert same(finished.state_dict(), whole.state_dict())


def test_a_checkpoint_of_another_run_is_refused(tmp_path, digits):
    finetune(tiny_net(), digits, FinetuneSettings(epochs=1), output_dir=tmp_path)
    model = tiny_net()
    with pytest.raises(TrainingError, match=r"checkpoint-00001' is of a run with another epochs, seed; delete it"):
        finetune(model, digits, FinetuneSettings(epochs=2), output_dir=tmp_path, seed=1)
    assert same(model.state_dict(), tiny_net().state_dict())
    (tmp_path / "checkpoint-00001" / "model.safetensors").unlink()
    with pytest.raises(TrainingError, match=r"cannot resume from .*checkpoint-00001"):
        finetune(model, digits, FinetuneSettings(epochs=1), output_dir=tmp_path)


def test_a_loss_that_is_not_finite_names_the_step_and_restores_the_weights():
    images = torch.rand(64, 1, 8, 8)
    images[40] = float("nan")
    data = load_data(DataLoader(TensorDataset(images, torch.zeros(64).long()), batch_size=8), GREY)
    model = tiny_net()
    with pytest.raises(TrainingError) as error:
        finetune(model, data, FinetuneSettings(epochs=1, learning_rate=0.125))
    assert str(error.value) == (
        "the loss is not finite at step 6 of epoch 1; the weights of epoch 0 are restored; "
        "lower finetune.learning_rate (now 0.125) or check the images"
    )
    assert same(model.state_dict(), tiny_net().state_dict()) and not model.training


class Breaking(torch.utils.data.Dataset):
    """64 images; from the 100th that is read on they are not numbers."""

    def __init__(self):
        self.read = 0

    def __len__(self):
        return 64

    def __getitem__(self, index):
        self.read += 1
        return torch.full((1, 8, 8), float("nan") if self.read > 100 else index / 64), torch.tensor(index % 10)


def test_a_loss_that_is_not_finite_later_keeps_the_best_checkpoint(tmp_path):
    data = Data(
        train=DataLoader(Breaking(), batch_size=8), validation=None, calibration=None, labels=None, name="breaks"
    )
    model = tiny_net()
    with pytest.raises(TrainingError) as error:
        finetune(model, data, FinetuneSettings(epochs=3), output_dir=tmp_path)
    checkpoint = tmp_path / "checkpoint-00001"
    assert f"at step 5 of epoch 2; the weights of epoch 1 are restored and kept in {str(checkpoint)!r}" in str(
        error.value
    )
    assert same(model.state_dict(), load_file(checkpoint / "model.safetensors"))
    assert not same(model.state_dict(), tiny_net().state_dict())


def test_fewer_images_than_a_batch(tmp_path):
    few = DataLoader(TensorDataset(torch.rand(5, 1, 8, 8), torch.arange(5)), batch_size=64)
    history = finetune(tiny_net(), load_data(few, GREY), FinetuneSettings(epochs=1))
    assert len(history) == 2 and history[1]["loss"] > 0
    dropped = DataLoader(few.dataset, batch_size=64, drop_last=True)
    with pytest.raises(DataError, match=r"no batches: .* lower its batch_size"):
        load_data(dropped, GREY)
    data = Data(train=dropped, validation=None, calibration=few, labels=None, name="few")
    with pytest.raises(
        DataError, match=r"too few training images for a batch of 64 on each of 1 processes; lower data"
    ):
        finetune(tiny_net(), data, FinetuneSettings(epochs=1))


def test_the_same_seed_repeats_a_run(digits):
    first, second, other = tiny_net(), tiny_net(), tiny_net()
    for model, seed in ((first, 0), (second, 0), (other, 1)):
        finetune(model, digits, FinetuneSettings(epochs=1), seed=seed)
    assert same(first.state_dict(), second.state_dict())
    assert not same(first.state_dict(), other.state_dict())


def test_transformers_models_train_and_count():
    config = ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=10
    )
    model = ResNetForImageClassification(config)
    data = load_data("digits", Preprocessing((1, 16, 16), (0.5,), (0.5,)), num_classes=10)
    history = finetune(model, data, FinetuneSettings(epochs=2, learning_rate=5e-3))
    assert history[-1]["validation_loss"] < history[0]["validation_loss"]
    assert count(model, (1, 16, 16))["macs"] > 0


def test_evaluation_is_exact_and_leaves_the_mode(digits):
    model = tiny_net().train()
    model[1].eval()
    result = evaluate(model, digits.test)
    assert model.training and not model[1].training
    images, labels = (torch.cat(column) for column in zip(*digits.test, strict=True))
    output = model.eval()(images)
    assert result["images"] == 360
    assert result["top1"] == pytest.approx((output.argmax(1) == labels).double().mean().item())
    assert result["loss"] == pytest.approx(nn.functional.cross_entropy(output, labels).item(), rel=1e-5)
    with pytest.raises(DataError, match="accuracy needs labels"):
        evaluate(model, load_data("digits", GREY, DataSettings(labels=False)).calibration)


def test_costs_match_hand_counts():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.LazyLinear(5)
    )
    model(torch.zeros(2, 3, 6, 6))
    cost = count(model, (3, 6, 6))
    assert cost["macs"] == 36 * 8 * 27 + 16 * 8 * 9 + 128 * 5
    assert cost["params"] == 8 * 28 + 16 + 8 * 10 + 129 * 5
    assert cost["bytes"] == 4 * (cost["params"] + 16) + 8
    assert model.training
    assert count(timm.create_model("resnet18"), (3, 224, 224))["macs"] == pytest.approx(1.814e9, rel=1e-3)


def test_two_ranks_train_alike_and_see_each_image_once(tmp_path, digits):
    root = Path(__file__).parents[1]
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
            *("-m", "tests.ranks", str(tmp_path)),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert [(tmp_path / f"left-open{rank}").read_text() for rank in range(2)] == ["False", "False"]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert (first["ranks"], first["wrapped"]) == (2, "Sequential")
    assert (first["from_main"], second["from_main"]) == (0, 0)
    assert sorted(first["seen"] + second["seen"]) == list(range(70)) and second["seen"]
    assert sorted(first["mixed"] + second["mixed"]) == list(range(70))

    alone = evaluate(tiny_net(), digits.test)
    assert first["before"] == second["before"] == pytest.approx(alone)
    one = measure(tiny_net(), (1, 8, 8), digits, 10)
    for rank in (first, second):
        assert (rank["measured"]["by_class"], rank["measured"]["mistakes"]) == (one.by_class, one.mistakes)
    assert first["after"] == second["after"] and first["after"]["top1"] > 0.85
    for left, right in zip(first["history"], second["history"], strict=True):
        assert {**left, "seconds": 0} == {**right, "seconds": 0}
    assert same(first["state"], second["state"])
    assert same(first["state"], first["resumed"]) and same(second["state"], second["resumed"])
    assert first["error"] == second["error"] and "not finite at step 1 of epoch 1" in first["error"]


def test_every_epoch_leaves_a_line(capsys):
    data = load_data("digits", GREY, DataSettings(batch_size=64, calibration_images=16), num_classes=10)
    model = tiny_net()
    finetune(model, data, epochs=2, distillation={"weight": 0})
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.startswith("epoch ")]
    assert [line.partition(":")[0] for line in lines] == ["epoch 1 of 2", "epoch 2 of 2"]
    assert all("loss" in line and "Top-1" in line and "learning rate" in line for line in lines)
    assert lines[-1].endswith("0:00:00 left")


def test_attention_counts_the_same_whatever_computes_it():
    """The CPU's fused attention is left out by torch's counter, and used only where queries are as wide as values."""
    small = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, patch_size=8)
    model = ViTForImageClassification(ViTConfig(image_size=32, **small)).eval()
    groups = scap_hub.channel_groups(model, torch.randn(1, 3, 32, 32))
    values = next(group for group in groups.prunable if "v_proj" in group.name or "value" in group.name)
    plan = groups.cut({values.name: range(values.size - 2)})
    dense = count(model, (3, 32, 32))["macs"]
    assert dense == groups.macs(groups.everything())
    assert count(scap_hub.apply_plan(model, plan), (3, 32, 32))["macs"] < dense
