"""No wrong model leaves `prune` or `apply_plan`: what is guilty stays whole, or the run ends with the plan."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import scap_hub
from scap_hub import errors
from scap_hub.channels import memory, oracle
from scap_hub.channels.labels import Labels
from scap_hub.channels.operators import table
from scap_hub.hub.card import Measured
from scap_hub.plan import ranges
from scap_hub.run import pruning, verification
from scap_hub.run.guilty import smallest_failing
from tests.independent import TOLERANCE, difference, double, random_values, reference

QUICK = {
    "repair": {"least_squares": False, "batch_norm": False, "tune": {"steps": 0}},
    "data": {"calibration_images": 4, "batch_size": 4},
    "criterion": {"name": "l1", "diagnostics": False},
    "target": {"params": 0.6, "round_to": 1},
    "finetune": {"epochs": 0},
    "evaluate": {"latency": False},
    "model": {"input_size": [3, 8, 8]},
}


class Four(nn.Module):
    """Convolutions one after another, with an activation between each two."""

    def __init__(self, *activations):
        super().__init__()
        widths = [3, 10, 12, 14, 16]
        self.layers = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1) for i, o in pairwise(widths))
        self.head, self.activations = nn.Linear(16, 5), activations

    def forward(self, x):
        for layer, act in zip(self.layers, self.activations, strict=True):
            x = act(layer(x))
        return self.head(x.mean((2, 3)))


def images(count=8):
    pixels = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(pixels, torch.arange(count) % 5), batch_size=4)


@pytest.fixture
def faulty(monkeypatch):
    """Gives an operator a rule that reverses the channels; pruning keeps their order, so no proof by labels sees it."""

    def plant(name):
        known = table._OPERATORS[name]

        def reversed_channels(call):
            labels = known.rule(call)
            return Labels(labels.shape, tuple(np.flip(array, np.argmax(array.shape)) for array in labels.arrays))

        monkeypatch.setitem(table._OPERATORS, name, replace(known, rule=reversed_channels))

    return plant


def assert_right(net, result):
    """Checked without the oracle: nobody reads what is gone. The run repairs and trains nothing."""
    x = torch.randn(2, 3, 8, 8)
    dense = reference(net, result.plan, "all")
    with torch.no_grad():
        assert difference(result.model.double()(double(x)), dense(double(x))) < TOLERANCE


def test_a_right_plan_is_verified_and_the_report_and_the_card_say_so(tmp_path):
    net = random_values(Four(F.relu, F.silu, F.relu, F.relu)).eval()
    result = scap_hub.prune(net, images(), QUICK, output_dir=tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert 0 <= result.report.verified < 1e-9 and result.report.unverified is None
    assert report["verified"] == result.report.verified and report["stages"]["verification"] > 0
    order = list(report["stages"])
    assert order.index("surgery") < order.index("verification") < order.index("repair")
    assert any(note.startswith("Verified: ") for note in result.report.notes())
    assert "Verified: before repair" in (tmp_path / "out" / "README.md").read_text()
    assert_right(net, result)


def test_a_run_without_memory_for_float64_says_what_it_was_verified_in(monkeypatch, faulty):
    monkeypatch.setattr(memory, "free", lambda device: 0)
    net = random_values(Four(F.relu, F.silu, F.relu, F.relu)).eval()
    result = scap_hub.prune(net, images(), QUICK)
    assert result.report.precision == "float32" and 0 <= result.report.verified < 1e-4
    assert any(note.startswith("Verified: ") and "in float32" in note for note in result.report.notes())
    faulty("silu")
    with pytest.warns(UserWarning, match="made anew without 'layers.1'"):
        scap_hub.prune(net, images(), QUICK)


def test_the_guilty_group_is_found_and_pinned_and_the_rest_is_right(faulty):
    faulty("silu")
    net = random_values(Four(F.relu, F.silu, F.relu, F.relu)).eval()
    with pytest.warns(UserWarning, match="made anew without 'layers.1'"):
        result = scap_hub.prune(net, images(), QUICK)
    assert set(result.plan.groups) and "layers.1" not in result.plan.groups
    assert "something else: relative difference" in result.report.pinned["layers.1"]
    assert set(result.report.pinned) == {"layers.1", "head"} and result.report.verified < 1e-9
    assert result.report.after.params <= 0.6 * result.report.before.params
    assert_right(net, result)


def test_several_guilty_groups_are_found_at_once(faulty):
    faulty("silu")
    net = random_values(Four(F.silu, F.relu, F.silu, F.relu)).eval()
    with pytest.warns(UserWarning, match=r"made anew without 'layers\.(0|2)', 'layers\.(0|2)'") as told:
        result = scap_hub.prune(net, images(), QUICK, target="params=0.8")
    assert len([warning for warning in told if "made anew" in str(warning.message)]) == 1
    assert set(result.plan.groups) <= {"layers.1", "layers.3"} and result.plan.groups
    assert_right(net, result)


def test_a_run_in_which_everything_is_guilty_ends_with_the_smallest_failing_plan(faulty, tmp_path):
    faulty("silu")
    net = random_values(Four(F.silu, F.silu, F.silu, F.silu)).eval()
    with pytest.warns(UserWarning), pytest.raises(errors.VerificationError) as caught:
        scap_hub.prune(net, images(), QUICK, output_dir=tmp_path / "out")
    plan, file = caught.value.plan, tmp_path / "out-failing-plan.json"
    assert len(plan.groups) == 1 and caught.value.difference > 1e-3
    assert scap_hub.PruningPlan.from_json(file.read_text()) == plan and str(file) in str(caught.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(errors.VerificationError):
        oracle.verify(net, plan, torch.randn(1, 3, 8, 8))


def test_groups_pinned_in_one_step_stay_whole_in_the_next(faulty):
    faulty("silu")
    net = random_values(Four(F.relu, F.silu, F.relu, F.relu)).eval()
    with pytest.warns(UserWarning, match="made anew") as told:
        result = scap_hub.prune(net, images(), QUICK, schedule_steps=2)
    assert len([warning for warning in told if "made anew" in str(warning.message)]) == 1
    assert "layers.1" not in result.plan.groups and result.report.verified < 1e-9
    assert_right(net, result)


def wrong(plan):
    """The plan, but another channel is read by the second layer than the first one makes."""
    document = json.loads(plan.to_json())
    cut = document["tensors"]["layers.1.weight"]["keep"]
    kept = plan.indices(cut["1"])
    other = next(channel for channel in range(10) if channel not in kept)
    document["keeps"].append(ranges(sorted([other, *kept[1:]])))
    cut["1"] = len(document["keeps"]) - 1
    return scap_hub.PruningPlan.from_json(json.dumps(document))


def test_what_several_steps_do_together_is_verified_before_the_training(monkeypatch):
    net, joined = random_values(Four(F.relu, F.relu, F.relu, F.relu)).eval(), pruning.joined
    monkeypatch.setattr(pruning, "joined", lambda *arguments: wrong(joined(*arguments)))
    with pytest.raises(errors.VerificationError, match="the plan is wrong") as caught:
        scap_hub.prune(net, images(), QUICK, schedule_steps=2)
    assert len(caught.value.plan.groups) > 1


class Random(Four):
    """Random in eval mode."""

    def forward(self, x):
        return F.dropout(super().forward(x), 0.5)


def test_a_model_that_cannot_be_compared_is_refused_unless_the_recipe_accepts_it(tmp_path, monkeypatch):
    net = random_values(Random(F.relu, F.relu, F.relu, F.relu)).eval()
    with pytest.raises(errors.UnverifiableError, match=r"differs from itself.*evaluate\.verify=false"):
        scap_hub.prune(net, images(), QUICK, output_dir=tmp_path / "out")
    assert not (tmp_path / "out-failing-plan.json").exists(), "no plan is accused"
    monkeypatch.setattr("scap_hub.run.score_cache.score", None)  # what was scored is still there
    with pytest.warns(UserWarning, match="not verified: the dense model differs from itself"):
        report = scap_hub.prune(net, images(), QUICK, output_dir=tmp_path / "out", evaluate_verify=False).report
    assert report.verified is None and "differs from itself" in report.unverified
    assert any(note.startswith("Not verified: ") and "itself" in note for note in report.notes())


def test_a_wrong_plan_is_not_accepted_by_the_recipe(faulty):
    faulty("silu")
    net = random_values(Four(F.silu, F.silu, F.silu, F.silu)).eval()
    with pytest.warns(UserWarning), pytest.raises(errors.VerificationError, match="the plan is wrong"):
        scap_hub.prune(net, images(), QUICK, evaluate_verify=False)


@pytest.mark.parametrize("guilty", [{3}, {0}, {6}, {1, 5}, {0, 1, 2}, set(range(7))])
def test_the_smallest_failing_set_is_found(guilty):
    tried = []

    def fails(units):
        tried.append(units)
        return guilty <= set(units)

    assert set(smallest_failing(range(7), fails)) == guilty
    assert len(tried) <= 4 * len(guilty) + 1


# apply_plan


def test_apply_plan_verifies_where_it_has_inputs():
    net, x = random_values(Four(F.relu, F.relu, F.relu, F.relu)).eval(), torch.randn(2, 3, 8, 8)
    plan = scap_hub.PruningPlan.from_keep(scap_hub.channel_groups(net, x), {"layers.0": range(8)})
    for options in ({"inputs": x}, {"inputs": (x,)}, {"inputs": x, "verify": True}):
        assert len(scap_hub.apply_plan(net, plan, **options).layers[0].weight) == 8
        with pytest.raises(errors.VerificationError):
            scap_hub.apply_plan(net, wrong(plan), **options)
    assert len(scap_hub.apply_plan(net, wrong(plan), inputs=x, verify=False).layers[0].weight) == 8
    assert len(scap_hub.apply_plan(net, plan).layers[0].weight) == 8, "the input size is not known, and not asked for"
    with pytest.raises(errors.PlanError, match="pass inputs="):
        scap_hub.apply_plan(net, plan, verify=True)


def test_apply_plan_knows_the_input_of_models_of_the_zoos(monkeypatch):
    import timm
    import transformers as hf

    seen = []
    monkeypatch.setattr("scap_hub.channels.verified.check", lambda *arguments: seen.append(arguments[2].shape))
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_channels=1, num_labels=2)
    for net in (timm.create_model("test_resnet").train(), hf.ResNetForImageClassification(config)):
        scap_hub.apply_plan(net, scap_hub.PruningPlan(keeps=(), groups={}, tensors={}))
    assert seen == [(2, 3, 160, 160), (2, 1, 224, 224)]


def test_apply_plan_insists_only_when_told():
    net, x = random_values(Random(F.relu, F.relu, F.relu, F.relu)).eval(), torch.randn(2, 3, 8, 8)
    plan = scap_hub.PruningPlan.from_keep(scap_hub.channel_groups(net, x), {"layers.0": range(8)})
    with pytest.warns(UserWarning, match="not verified"):
        scap_hub.apply_plan(net, plan, inputs=x)
    with pytest.raises(errors.UnverifiableError):
        scap_hub.apply_plan(net, plan, inputs=x, verify=True)


def test_the_card_says_what_is_not_verified():
    from scap_hub.hub.card import _verified

    assert "Not verified" in _verified(Measured(unverified="it is random")) and not _verified(Measured())
    assert verification.IMAGES == 2
