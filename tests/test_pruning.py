"""The pipeline through its one call."""

import json

import pytest
import timm
import torch
import transformers as hf
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import scap_hub
from scap_hub import errors
from scap_hub.recipe import Recipe, shipped_recipes
from scap_hub.zoo.timm.private import NOTES_ARGUMENTS
from tests.launched import on_two_ranks
from tests.nets import Clock, Residual, tiny_net
from tests.test_zoo import MODELS, TIMM

QUICK = {
    "data": {"calibration_images": 8, "batch_size": 8},
    "criterion": {"name": "scap", "options": {"autoencoder": "pca"}, "diagnostics": False},
    "repair": {"tune": {"steps": 2}},
    "finetune": {"epochs": 1},
    "evaluate": {"latency": False},
}


def images(count=16, channels=3, size=64, classes=5):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(count, channels, size, size, generator=generator)
    return DataLoader(TensorDataset(pixels, torch.arange(count) % classes), batch_size=8)


LARGE = {"vgg16_bn", "densenet121", "regnety_002", "mobilenetv2_100", "convnext_atto", "mobilenet_v2"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in MODELS]
)
def test_every_kind_of_model_goes_through_and_comes_back(name, tmp_path):
    model = MODELS[name]()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    result = scap_hub.prune(
        model, images(), QUICK, model_input_size=(3, 64, 64), target="macs=0.5", output_dir=tmp_path / "out"
    )
    report = result.report
    assert 0.45 < report.after.macs / report.before.macs <= 0.5
    assert report.after.params < report.before.params and report.after.bytes < report.before.bytes
    assert set(report.groups) == {
        group.name for group in scap_hub.channel_groups(model, images().dataset[0][0][None]) if group.prunable
    }
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items()), (
        "the given model is untouched"
    )
    # An older timm does not note with which arguments a model was made.
    owned = name == "module" or (bool(TIMM.get(name)) and not NOTES_ARGUMENTS)
    again = scap_hub.load(tmp_path / "out", model=model if owned else None)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        one, two = (getattr(net(x), "logits", net(x)) for net in (result.model, again))
    assert torch.equal(one, two)
    code = [] if owned else ["modeling_scap.py"]
    assert {path.name for path in (tmp_path / "out").iterdir()} - {"channels.png"} == {
        "model.safetensors", "config.json", "pruning_plan.json", "recipe.yaml", "report.json", "report.html",
        "README.md", *code,
    }  # fmt: skip
    assert not list(tmp_path.glob(".*")), "nothing is left beside the output"


def test_saved_recipe_repeats_the_run(tmp_path):
    net = Residual(width=16)
    first = scap_hub.prune(net, images(), QUICK, model_input_size=(3, 64, 64), output_dir=tmp_path / "a", seed=3)
    again = scap_hub.prune(net, images(), tmp_path / "a" / "recipe.yaml")
    assert again.plan == first.plan
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))


@pytest.mark.parametrize("criterion", ["scap", "l1", "random"])
def test_criteria_and_iterative_schedule(criterion):
    net = Residual(width=32)
    result = scap_hub.prune(
        net, images(), QUICK, criterion=criterion, schedule_steps=2, target="macs=0.4", round_to=1, finetune_epochs=0,
        model_input_size=(3, 32, 32), data_batch_size=8,
    )  # fmt: skip
    assert 0.35 < result.report.after.macs / result.report.before.macs <= 0.41
    small = scap_hub.apply_plan(net, result.plan)
    assert [tuple(p.shape) for p in small.parameters()] == [tuple(p.shape) for p in result.model.parameters()]


def test_what_a_criterion_draws_follows_the_seed_unless_its_options_say_otherwise():
    net, quick = Residual(width=16), QUICK | {"finetune": {"epochs": 0}}
    arguments = {"criterion": "random", "round_to": 1, "model_input_size": (3, 32, 32), "data_batch_size": 8}
    drawn = [scap_hub.prune(net, images(), quick, seed=seed, **arguments).plan for seed in (0, 1, 1)]
    assert drawn[0] != drawn[1] and drawn[1] == drawn[2]
    fixed = scap_hub.prune(net, images(), quick, seed=1, **arguments, criterion_options={"seed": 0})
    assert fixed.plan == drawn[0]


class Uncalled(nn.Module):
    """The weights of its middle layer are used without calling it."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = nn.functional.conv2d(torch.relu(self.first(x)), self.middle.weight, self.middle.bias)
        return self.head(torch.relu(self.last(torch.relu(x))).mean((2, 3)))


@pytest.mark.parametrize("criterion", ["scap", "scap-set", "l1", "taylor", "random"])
def test_what_cannot_be_watched_stays_whole_and_is_named(criterion):
    net = Uncalled()
    groups = scap_hub.channel_groups(net, torch.zeros(1, 3, 32, 32))
    assert {group.name for group in groups if group.prunable} == {"first", "middle", "last"}
    assert set(scap_hub.score(net, [], "random", groups=groups)) == {"first", "last"}
    result = scap_hub.prune(
        net, images(), QUICK | {"finetune": {"epochs": 0}}, criterion=criterion, target="params=0.7", round_to=1,
        model_input_size=(3, 32, 32), data_batch_size=8,
    )  # fmt: skip
    assert set(result.plan.groups) <= {"first", "last"} and result.plan.groups
    assert "a layer that is not called" in result.report.pinned["middle"]


def test_protected_layers_stay_whole():
    result = scap_hub.prune(
        Residual(width=16), images(), QUICK, protect=["expand"], finetune_epochs=0, model_input_size=(3, 64, 64)
    )
    assert "expand" not in result.plan.groups and result.plan.groups
    assert result.report.pinned["expand"] == "is protected by 'expand'"


def test_unlabelled_images_suffice_with_a_teacher():
    pixels = DataLoader(TensorDataset(torch.randn(16, 3, 32, 32)), batch_size=8)
    result = scap_hub.prune(Residual(width=16), pixels, QUICK, model_input_size=(3, 32, 32))
    assert result.report.after.top1 is None and len(result.report.history) == 2


class Nothing(nn.Module):
    def __init__(self):
        super().__init__()
        self.only = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.only(x).mean((2, 3))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(model="resnet81", dataset="digits"), errors.ModelError, "resnet18"),
        (dict(model="resnet50"), errors.ModelError, "resnet50"),
        (dict(model=timm.create_model("test_resnet", num_classes=1000)), errors.DataError, "timm/mini-imagenet"),
        (dict(model=Residual()), errors.DataError, "was given no data set"),
        (dict(), errors.RecipeError, "no model"),
        (dict(model=Nothing(), dataset=images(classes=4)), errors.TargetError, "nothing can be pruned"),
        (dict(model=Residual(), dataset=images(classes=7)), errors.DataError, "outside the classifier's range 0..4"),
        (dict(model=Residual(), dataset=images(), target="macs=0.0001"), errors.TargetError, "cannot be reached"),
        (dict(model=Residual(), dataset=images(), protect=["xyz"]), errors.RecipeError, "matches no layer"),
        (dict(model=Residual(), dataset=images(), criterion="scpa"), errors.RecipeError, "did you mean 'scap'"),
        (dict(model="no-such", criterion="scpa"), errors.RecipeError, "did you mean 'scap'"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line_and_leaves_nothing(arguments, error, message, tmp_path):
    if "model" in arguments and isinstance(arguments["model"], nn.Module):
        arguments = arguments | {"model_input_size": (3, 64, 64)}
    with pytest.raises(error, match=message) as caught:
        scap_hub.prune(**{"recipe": QUICK, "output_dir": tmp_path / "out", **arguments})
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_data_set_smaller_than_a_batch_goes_through():
    few = DataLoader(TensorDataset(torch.randn(5, 3, 32, 32), torch.arange(5)), batch_size=64)
    result = scap_hub.prune(Residual(width=16), few, QUICK, model_input_size=(3, 32, 32), data_batch_size=64)
    assert len(result.report.history) == 2 and result.report.after.macs < result.report.before.macs


@pytest.mark.parametrize(
    ("round_to", "target", "price"),
    [(1, "macs=0.5", (0.0, 0.0)), (8, "macs=0.5", (0.0, 0.1)), (16, "ratio=0.6", (0.01, 0.2))],
)
def test_the_report_tells_what_rounding_costs(round_to, target, price):
    report = scap_hub.prune(
        Residual(width=64), images(), QUICK, model_input_size=(3, 64, 64), finetune_epochs=0, criterion="l1",
        round_to=round_to, target=target,
    ).report  # fmt: skip
    (selection,) = report.selections
    assert 0 < selection.importance < 1 and price[0] <= selection.rounding_price <= price[1]
    lost = f"{100 * (1 - selection.importance):.2g} %"
    assert report.notes()[-1].endswith(f": {lost} of all importance was in the channels that went.")
    assert report.to_dict()["selections"][0]["latency"] is None


def test_existing_output_is_refused_before_any_work(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(errors.CheckpointError, match="not empty"):
        scap_hub.prune("no-such-model", "no-such-data", output_dir=tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def pruned_residual():
    torch.manual_seed(0)
    options = dict(model_input_size=(3, 64, 64), round_to=1, data_calibration_images=13)
    return scap_hub.prune(Residual(width=16), images(36), QUICK, **options)


TWO_RANKS = """
import sys, torch
from accelerate import PartialState
from tests.test_pruning import pruned_residual
result = pruned_residual()
state = PartialState()
assert state.num_processes == 2
saved = {"plan": result.plan.to_json(), "weights": result.model.state_dict()}
torch.save(saved, f"{sys.argv[1]}/{state.process_index}.pt")
"""


def test_two_ranks_agree_with_one_on_the_plan_and_with_each_other_on_the_weights(tmp_path):
    one, first, second = pruned_residual(), *on_two_ranks(TWO_RANKS, tmp_path)
    assert one.plan.to_json() == first["plan"] == second["plan"]
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name
    assert any(not torch.equal(weight, first["weights"][name]) for name, weight in one.model.state_dict().items())


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_runs(name, monkeypatch):
    for module in ("selection.latency", "timing.table"):
        monkeypatch.setattr(f"scap_hub.{module}.milliseconds", Clock())
    recipe = Recipe.resolve(name)
    result = scap_hub.prune(
        tiny_net(), "digits", name, model_input_size=(1, 8, 8),
        finetune_epochs=min(1, recipe.finetune.epochs), repair_tune_steps=min(8, recipe.repair.tune.steps or 0),
        data_calibration_images=32, evaluate_latency=False, data_batch_size=256,
    )  # fmt: skip
    assert result.report.after.macs < result.report.before.macs
    assert len(result.report.history) == 2 * result.recipe.schedule.steps * (name != "no-training")


def tiny_folder(path, classes=5):
    """A timm model in timm's folder layout, as `timm.models.push_to_hf_hub` writes it."""
    model = timm.create_model("test_resnet", num_classes=classes, in_chans=1)
    timm.models.save_for_hf(model, path, safe_serialization=True)
    return f"local-dir:{path}"


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_a_classifier_that_does_not_fit_is_replaced_and_tuned_first_once(tmp_path, monkeypatch, capsys):
    arguments = dict(
        model=tiny_folder(tmp_path / "dense"), dataset="digits", recipe=QUICK, output_dir=tmp_path / "out",
        criterion="l1", model_input_size=(1, 32, 32), finetune_learning_rate=5e-3, data_batch_size=64,
    )  # fmt: skip
    with pytest.raises(errors.DataError, match=r"has 10 classes, the classifier 5: leave out finetune\.dense_epochs=0"):
        scap_hub.prune(**arguments, finetune_dense_epochs=0)
    with pytest.raises(errors.DataError, match=r"labels: training the dense model \(finetune\.dense_epochs\)"):
        scap_hub.prune(**arguments, finetune_dense_epochs=1, data_labels=False)
    assert {path.name for path in tmp_path.iterdir()} == {"dense"}

    monkeypatch.setattr("scap_hub.run.tuning.NEW_HEAD_EPOCHS", 3)
    with monkeypatch.context() as patch:
        patch.setattr("scap_hub.run.pruning.select_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            scap_hub.prune(**arguments)
    said = capsys.readouterr().err
    assert "gets a new head for the 10 classes of 'digits' and is tuned first, for 3 epochs" in said
    report = scap_hub.prune(**arguments).report
    assert capsys.readouterr().err.count("validation loss") == 1  # the dense model's epochs are kept
    assert report.before.top1 > 0.5 and report.tuned.new_classes == 10 and report.tuned.history[-1]["top1"] > 0.5
    told = "Before it was pruned, the dense model was tuned for 3 epochs, with a new head for 10 classes."
    assert told in report.notes()
    assert told in (tmp_path / "out" / "README.md").read_text()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_classes"], config["label_names"]) == (10, [str(digit) for digit in range(10)])
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "out"}


def test_plain_numbers_get_a_new_head_by_the_number_of_classes(tmp_path):
    arguments = dict(
        model=tiny_folder(tmp_path / "dense"), dataset=images(channels=1, size=32), recipe=QUICK,
        criterion="l1", model_input_size=(1, 32, 32), finetune_epochs=0,
    )  # fmt: skip
    assert scap_hub.prune(**arguments).report.tuned is None
    assert scap_hub.prune(**arguments, model_num_classes=7).report.tuned.new_classes == 7


def test_a_classifier_with_the_datas_classes_among_others_stays(tmp_path):
    labels = [str(number) for number in reversed(range(12))]
    tiny_folder(tmp_path / "dense", 12)
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    (tmp_path / "dense" / "config.json").write_text(json.dumps({**config, "label_names": labels}))
    with pytest.warns(UserWarning, match=r"no more than guessing among 12 classes; .*tune it first with"):
        result = scap_hub.prune(
            tmp_path / "dense", "digits", QUICK, criterion="l1", model_input_size=(1, 32, 32), finetune_epochs=0
        )
    assert result.loaded.num_classes == 12 and result.report.tuned is None


def test_a_module_is_given_its_new_head_by_its_owner():
    with pytest.raises(errors.DataError, match=r"'digits' has 10 classes, the module's classifier 5: give it a new"):
        module = timm.create_model("test_resnet", num_classes=5, in_chans=1)
        scap_hub.prune(module, "digits", QUICK, model_input_size=(1, 64, 64))


def test_images_of_other_classes_serve_without_their_labels(tmp_path):
    result = scap_hub.prune(
        tiny_folder(tmp_path / "dense"), "digits", QUICK, criterion="l1", model_input_size=(1, 32, 32),
        data_labels=False, finetune_epochs=0,
    )  # fmt: skip
    assert result.report.after.top1 is None and result.loaded.num_classes == 5


def test_transformers_model_by_folder(tmp_path):
    config = hf.ResNetConfig(depths=[1, 1], hidden_sizes=[16, 32], embedding_size=16, num_labels=5, layer_type="basic")
    hf.ResNetForImageClassification(config).save_pretrained(tmp_path / "dense")
    result = scap_hub.prune(
        str(tmp_path / "dense"), images(), QUICK, model_input_size=(3, 64, 64), output_dir=tmp_path / "out"
    )
    again = scap_hub.load(tmp_path / "out")
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(x).logits, result.model(x).logits)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "resnet"


@pytest.mark.parametrize(
    ("criterion", "options"),
    [
        ("scap-set", {}),
        ("scap", {"autoencoder": "pca"}),
        *(pytest.param(*own, marks=pytest.mark.slow) for own in (("obs", {"sequential": True}), ("l1", {}))),
    ],
    ids=str,
)
def test_the_steps_one_by_one_give_the_plan_and_the_weights_of_prune(criterion, options):
    loader, net = images(32), Residual(width=16).eval()
    settings = dict(
        criterion=criterion, criterion_options=options, target="macs=0.5", round_to=1, finetune_epochs=0,
        data_batch_size=8, model_input_size=(3, 64, 64), evaluate_latency=False, criterion_diagnostics=False,
        repair_tune_steps=8, repair_tune_learning_rate=1e-2,
    )  # fmt: skip
    result = scap_hub.prune(net, loader, **settings)

    batches = [pixels for pixels, _ in loader]
    groups = scap_hub.channel_groups(net, batches[0][:1])
    scores = scap_hub.score(net, batches, criterion, groups=groups, **options)
    plan = scap_hub.select(groups, scores, target="macs=0.5", round_to=1, scope=scores.scope)
    plan = scap_hub.refine(net, groups, batches, plan, criterion, **options)
    small = scap_hub.apply_plan(net, plan)
    solved = scap_hub.repair(net, small, plan, batches)
    before, after = scap_hub.tune(net, small, batches, steps=8, learning_rate=1e-2)
    assert plan == result.plan and after <= before
    assert solved and all(after <= before for before, after in solved.values())
    for name, value in result.model.state_dict().items():
        assert torch.equal(value, small.state_dict()[name]), name


def test_refinement_is_part_of_the_steps():
    """Else the test above proves nothing of it: OBS keeps other channels once it knows how many stay."""
    net, batches = Residual(width=16).eval(), [pixels for pixels, _ in images(32)]
    groups = scap_hub.channel_groups(net, batches[0][:1])
    scores = scap_hub.score(net, batches, "obs", groups=groups)
    plan = scap_hub.select(groups, scores, target="macs=0.5", round_to=1, scope=scores.scope)
    refined = scap_hub.refine(net, groups, batches, plan, "obs", sequential=True)
    assert refined != plan
    assert {name: len(refined.kept(name)) for name in plan.groups} == {n: len(plan.kept(n)) for n in plan.groups}
    assert scap_hub.refine(net, groups, batches, plan, "l1") == plan
    with pytest.raises(errors.RecipeError, match="did you mean 'scap"):
        scap_hub.refine(net, groups, batches, plan, "scap-sett")


class Versioned(Residual):
    """Takes tensors only from a state dict that says which version they are of, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state, prefix, local_metadata, *rest):
        if local_metadata.get("version") != 2:
            raise ValueError("version should be set")
        super()._load_from_state_dict(state, prefix, local_metadata, *rest)


def test_a_class_that_asks_for_the_version_of_its_weights_is_trained_saved_resumed_and_loaded(tmp_path):
    dense, out = Versioned(width=16), tmp_path / "out"
    result = scap_hub.prune(
        dense, images(), QUICK, model_input_size=(3, 32, 32), output_dir=out, finetune_dense_epochs=1
    )
    loaded = scap_hub.load(out, model=Versioned(width=16))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x), result.model.eval()(x))


class Counting(Residual):
    """Counts the passes that it is trained by."""

    trained = 0

    def forward(self, x):
        y = super().forward(x)
        type(self).trained += self.training and y.requires_grad
        return y


def test_a_target_that_cannot_be_reached_is_told_before_anything_is_trained_or_scored(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(
        "from scap_hub.criteria import Criterion\n"
        "class Late(Criterion):\n    name = 'late'\n    def score(self, model, groups, batches):\n"
        "        raise RuntimeError('scored')\n"
    )
    arguments = {"criterion": f"{file}:Late", "model_input_size": (3, 32, 32), "output_dir": tmp_path / "out"}
    for epochs in (1, 0):
        with pytest.raises(errors.TargetError, match="cannot be reached"):
            scap_hub.prune(
                Counting(width=16), images(), QUICK, target="macs=0.001", finetune_dense_epochs=epochs, **arguments
            )
        assert not (epochs and Counting.trained), "without an epoch, a batch is timed"
