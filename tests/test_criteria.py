"""Baselines, the registry, and watching a model."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from scap_hub.channels import channel_groups
from scap_hub.criteria import L1, Criterion, base, score
from scap_hub.criteria.base import criterion
from scap_hub.criteria.calibration import watch
from scap_hub.criteria.rows import NORMALISATIONS
from scap_hub.errors import CalibrationError, ModelError, RecipeError
from scap_hub.recipe import Recipe
from scap_hub.scores import Scores
from tests.tapped_nets import group, plain, tap


def pairs(model, taps, batches):
    """What `watch` reads, whole: [(x, y) per tap] per batch."""
    return list(watch(model, taps, batches, lambda tap, x: x.clone(), lambda tap, x, y: (x, y.clone())))


def test_l1_is_the_mean_of_relative_filter_norms():
    model, _ = plain(width=(6, 6))
    both = group(tap(model, "0"), tap(model, "3", rows=[5, 4, 3, 2, 1, 0]))
    first, second = (model[i].weight.detach().double().abs().sum((1, 2, 3)) for i in (0, 3))
    expected = (first / first.mean() + second.flip(0) / second.mean()) / 2
    torch.testing.assert_close(score(model, [], "l1", groups=[both])["0"], expected)
    low, high = score(model, [], L1(normalisation="minmax"), groups=[group(both.taps[0])])["0"].aminmax()
    assert (low, high) == (0, 1)


def test_a_channel_that_one_layer_lacks_takes_the_other_layer_s_score():
    model, _ = plain(width=(4, 4))
    part = group(tap(model, "0"), tap(model, "3", rows=[-1, -1, 0, 1]))
    whole = L1().score(model, [group(part.taps[0])], [])["0"]
    torch.testing.assert_close(L1().score(model, [part], [])["0"][2:], whole[2:])
    with pytest.raises(ModelError, match="no producer to watch for channel 2"):
        L1().score(model, [group(part.taps[1], size=3)], [])


def test_random_depends_on_seed_and_name_only():
    model, groups = plain()
    one, other = (score(model, [], "random", groups=order) for order in (groups, groups[::-1]))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["0"], score(model, [], "random", groups=groups, seed=1)["0"])
    assert not torch.equal(one["0"], one["3"][:6])


def test_normalisations_of_ties_and_constants():
    assert NORMALISATIONS["rank"](torch.tensor([3.0, 1, 1 + 1e-9, 7]).double()).tolist() == [0.625, 0.25, 0.25, 0.875]
    for name, constant in (("rank", 0.5), ("minmax", 0), ("mean", 1)):
        assert NORMALISATIONS[name](torch.full((3,), 2.0)).tolist() == [constant] * 3
        assert NORMALISATIONS[name](torch.zeros(3)).isfinite().all()


def test_only_prunable_groups_are_scored():
    model, groups = plain()
    pinned = group(groups[0].taps[0], prunable=False)
    for name in ("scap", "l1", "random"):
        scores = score(model, [torch.randn(4, 3, 8, 8)], name, groups=[pinned, groups[1]])
        assert {key: value.shape for key, value in scores.items()} == {"3": (8,)}
        assert score(model, [torch.randn(4, 3, 8, 8)], name, groups=[pinned]) == {}


def test_a_criterion_of_one_s_own():
    @dataclass(kw_only=True)
    class Last(Criterion):
        name: ClassVar[str] = "last"
        slope: float = 1.0

        def score(self, model, groups, batches):
            return {group.name: self.slope * torch.arange(group.size) for group in groups}

    model, groups = plain()
    assert score(model, [], "last", groups=groups, slope=2.0)["0"].tolist() == [0, 2, 4, 6, 8, 10]
    with pytest.raises(RecipeError, match="options slope beside a ready criterion"):
        score(model, [], Last(), groups=groups, slope=2.0)
    with pytest.raises(RecipeError, match="unknown criterion 'lst'; did you mean 'last'"):
        score(model, [], "lst", groups=groups)


def test_plain_scores_become_a_value():
    class Plain(Criterion):
        scope: ClassVar[str] = "local"

        def __init__(self, scores):
            self.scores = scores

        def score(self, model, groups, batches):
            return self.scores

    model, groups = plain()
    scores = score(model, [], Plain({"3": torch.arange(8), "0": torch.ones(6)}), groups=groups)
    assert isinstance(scores, Scores) and scores.scope == "local" and not scores.fidelity
    assert list(scores) == ["0", "3"] and all(values.dtype == torch.float64 for values in scores.values())
    for wrong, error, message in (
        ({"0": torch.ones(5)}, RecipeError, r"Plain gives scores of shape \(5,\) for group '0'; .* its 6 channels"),
        ({"1": torch.ones(6)}, RecipeError, "Plain scores '1', which is none of the groups"),
        ({"0": torch.full((6,), torch.nan)}, CalibrationError, "Plain gives NaN or Inf for group '0'"),
    ):
        with pytest.raises(error, match=message):
            score(model, [], Plain(wrong), groups=groups)


def test_weights_that_are_not_finite_are_told_by_criteria_that_read_no_images():
    model, groups = plain()
    with torch.no_grad():
        model[0].weight[0] = torch.nan
    with pytest.raises(CalibrationError, match="L1 gives NaN or Inf for group '0'"):
        score(model, [], "l1", groups=groups)


def test_the_default_is_that_of_a_recipe():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)).eval()
    batches = [torch.randn(4, 3, 8, 8)]
    groups = channel_groups(model, batches[0])
    named = score(model, batches, Recipe().criterion.name, groups=groups)
    assert named.scope == "cost-aware"
    torch.testing.assert_close(score(model, batches, groups=groups)["0"], named["0"])


def test_a_name_is_given_once():
    with pytest.raises(RecipeError, match=r"two criteria are named 'l1': scap_hub\..*L1 and tests\..*Other"):

        class Other(L1):
            name: ClassVar[str] = "l1"

    def define(slope):
        @dataclass(kw_only=True)
        class Again(Criterion):
            name: ClassVar[str] = "again"

            def score(self, model, groups, batches):
                return {group.name: slope * torch.arange(group.size) for group in groups}

    model, groups = plain()
    for slope in (1, 2):  # a notebook's cell that runs again
        define(slope)
        assert score(model, [], "again", groups=groups)["0"][1] == slope
    assert type(criterion("l1")) is L1


@pytest.fixture
def registry(monkeypatch):
    """What is registered in the test is forgotten after it."""
    monkeypatch.setattr(base, "_CRITERIA", dict(base._CRITERIA))


MINE = """
from __future__ import annotations
from dataclasses import dataclass
from typing import ClassVar
import torch
from scap_hub.criteria import L1, Criterion

@dataclass(kw_only=True)
class Mine(Criterion):
    name: ClassVar[str] = "mine-from-a-file"
    slope: float = 1.0
    seed: int = 0

    def score(self, model, groups, batches):
        return {group.name: self.slope * torch.arange(group.size) for group in groups}

class Unrelated:
    pass

limit = 3
"""


def test_a_criterion_in_a_file(tmp_path, monkeypatch, registry):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MINE)
    model, groups = plain()
    for name in ("mine.py:Mine", f"{tmp_path}/mine.py:Mine"):
        assert score(model, [], name, groups=groups, slope=2.0)["0"].tolist() == [0, 2, 4, 6, 8, 10]
    assert criterion("mine.py:Mine", seed=5).seed == 5
    assert score(model, [], "mine.py:L1", groups=groups)["0"].shape == (6,)
    recipe = Recipe.resolve({"criterion": {"name": "mine.py:Mine", "options": {"slope": 2.0}}})
    assert criterion(recipe.criterion.name, recipe.criterion.options).slope == 2
    assert Recipe.resolve(None, criterion="mine.py:Mine").criterion.name == "mine.py:Mine"
    Path("mine.py").write_text(MINE.replace("self.slope *", "3 *"))
    assert score(model, [], "mine.py:Mine", groups=groups)["0"][1] == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("yours.py:Mine", "there is no file 'yours.py'; name a registered criterion, or a class in a file"),
        ("mine.py:Min", "'mine.py' defines no 'Min'; did you mean 'Mine'"),
        ("mine.py:Unrelated", r"'Unrelated' is no scap_hub.Criterion; derive it"),
        ("mine.py:limit", "'limit' is no scap_hub.Criterion"),
        ("mine.py:", "'mine.py' defines no ''"),
        ("broken.py:Mine", r"broken.py' fails with NameError: name 'nothing' is not defined"),
        ("second.py:L1", "two criteria are named 'l1'"),
    ],
)
def test_files_without_the_criterion(name, message, tmp_path, monkeypatch, registry):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MINE)
    Path("broken.py").write_text("nothing + 1")
    Path("second.py").write_text(MINE.replace("mine-from-a-file", "l1"))
    with pytest.raises(RecipeError, match=message):
        criterion(name)


def test_watching_sees_the_layer_s_input_and_the_next_layer_s_view():
    model, groups = plain()
    model[1].running_mean.normal_()
    x = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        hidden = model[:3](x)
        expected = [(x, hidden), (hidden, model(x))]
    taps = [group.taps[0] for group in groups]
    for batch in (x, (x, torch.zeros(5)), [x], {"pixel_values": x, "labels": torch.zeros(5)}):
        (seen,) = pairs(model, taps, [batch])
        torch.testing.assert_close(seen, expected)


def test_post_functions_and_channels_last():
    layer = nn.Linear(3, 5)
    x = torch.randn(4, 6, 7, 3)
    (((seen_x, seen_y),),) = pairs(layer, [tap(layer, "", dim=-1, post=(nn.ReLU(inplace=True), torch.neg))], [x])
    torch.testing.assert_close(seen_x, x.movedim(-1, 1))
    torch.testing.assert_close(seen_y, -layer(x).relu().movedim(-1, 1).detach())


def test_the_last_run_of_a_layer_and_the_first_run_of_its_activation_count():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.other, self.act = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.ReLU()

        def forward(self, x):
            return self.act(self.other(self.act(self.conv(self.act(self.conv(x))))))

    model = Shared()
    x = torch.randn(4, 3, 5, 5)
    with torch.no_grad():
        hidden = model.conv(x).relu()
        expected = hidden, model.conv(hidden).relu()
    (((seen_x, seen_y),),) = pairs(model, [tap(model, "conv", "act")], [x])
    torch.testing.assert_close((seen_x, seen_y), expected)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model, groups = plain()
    model.train()
    model[1].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    batches = [torch.randn(4, 3, 8, 8), torch.full((4, 3, 8, 8), float("nan") if fails else 1.0)]
    try:
        score(model, batches, "scap", groups=groups)
    except CalibrationError:
        assert fails
    assert modes == [module.training for module in model.modules()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_activations_name_layer_and_batch(value):
    model, groups = plain()
    bad = torch.randn(4, 3, 8, 8)
    bad[2, 1, 3, 4] = value
    with pytest.raises(CalibrationError, match="NaN or Inf in the input of layer '0', batch 1"):
        score(model, [torch.randn(4, 3, 8, 8), bad], "scap", groups=groups)
    with torch.no_grad():
        model[1].weight[0] = value
    with pytest.raises(CalibrationError, match="NaN or Inf in the output of layer '0', batch 0"):
        score(model, [torch.randn(4, 3, 8, 8)], "scap", groups=groups)


def test_layers_that_cannot_be_watched():
    model, _ = plain()
    images = [torch.randn(4, 3, 8, 8)]
    with pytest.raises(ModelError, match="gives 8 channels, but layer '0' has 6"):
        pairs(model, [tap(model, "0", "5")], images)
    model.unused = nn.Conv2d(3, 3, 1)
    model.forward = lambda x: model[0](x)
    with pytest.raises(ModelError, match="layer 'unused' or its output 'unused' does not run"):
        pairs(model, [tap(model, "unused")], images)
    with pytest.raises(CalibrationError, match="no images in a calibration batch of type dict"):
        pairs(model, [tap(model, "0")], [{"label": 1}])
    with pytest.raises(CalibrationError, match=r"batch of shape \(0, 3, 8, 8\) holds no image"):
        pairs(model, [tap(model, "0")], [*images, torch.zeros(0, 3, 8, 8)])
    with pytest.raises(ModelError, match="sees 4 items for 6 images"):
        model.forward = lambda x: model[0](x[:4])
        pairs(model, [tap(model, "0")], [torch.randn(6, 3, 8, 8)])
    assert np.all(tap(model, "0").channel_of_row == range(6))
