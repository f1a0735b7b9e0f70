import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from scap_hub.channels import channel_groups, verify
from scap_hub.errors import PlanError
from scap_hub.plan import CallNumber, PruningPlan, _ranges, _span, ranges
from scap_hub.surgery import apply_plan
from scap_hub.zoo import modeling_scap
from tests.nets import Residual, random_plan

X = torch.randn(1, 3, 8, 8)


@pytest.fixture
def groups():
    return channel_groups(Residual(), X)


@given(st.sets(st.integers(0, 300), min_size=1))
def test_ranges_hold_any_ascending_indices(indices):
    text = ranges(sorted(indices))
    assert [i for first, last in _ranges(text) for i in range(first, last + 1)] == sorted(indices)
    assert _span("it", text) == (max(indices), len(indices))


def test_json_round_trip_is_the_same_plan(groups):
    plan = random_plan(groups, 0)
    again = PruningPlan.from_json(plan.to_json())
    assert again == plan
    for name in plan.groups:
        assert again.kept(name) == plan.kept(name)


def test_apply_leaves_the_model_untouched_and_sets_the_integers(groups):
    model = Residual()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    keep = {group.name: range(0, group.size, 2) for group in groups if group.prunable}
    small = apply_plan(model, PruningPlan.from_keep(groups, keep))
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == {
        n: tuple(t.shape) for n, t in before.items()
    }
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert small.depthwise.groups == small.depthwise.in_channels == small.depthwise.out_channels == 8
    assert small.bn.num_features == 4 and small.head.in_features == 4
    assert torch.equal(small.expand.weight, model.expand.weight[::2, ::2])
    assert small.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    "keep, message",
    [
        ({"stm": [0]}, "did you mean 'stem'"),
        ({"stem": []}, "would keep no channel"),
        ({"stem": [0, 99]}, "goes beyond"),
        ({"stem": [1, 1]}, "repeats one"),
        ({"head": [0]}, "is an output of the model"),
    ],
)
def test_wrong_keeps_are_refused(groups, keep, message):
    with pytest.raises(PlanError, match=message):
        PruningPlan.from_keep(groups, keep)


def test_unbalanced_keep_is_refused():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(8, 8, 1, groups=2), torch.nn.Conv2d(8, 2, 1))
    groups = channel_groups(net, X)
    assert groups[0].constraint
    with pytest.raises(PlanError, match="unbalanced keep: 2 groups of conv2d in '1'"):
        PruningPlan.from_keep(groups, {"0": [0, 1, 2]})
    assert PruningPlan.from_keep(groups, {"0": [0, 2, 5, 7]}).kept("0") == [0, 2, 5, 7]


def edited(plan, change):
    document = json.loads(plan.to_json())
    change(document)
    return json.dumps(document)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d.update(version=9), "upgrade scap_hub"),
        (lambda d: d.update(code="import os"), "code"),
        (lambda d: d["keeps"].__setitem__(0, "0-99999999999999"), "not ascending within"),
        (lambda d: d["keeps"].__setitem__(0, "3,1"), "not ascending within"),
        (lambda d: d["keeps"].__setitem__(0, "__import__"), "not a list of ranges"),
        (lambda d: d["tensors"]["stem.weight"]["keep"].update({"7": 0}), "no dimension 7"),
        (lambda d: d["tensors"]["stem.weight"]["keep"].update({"0": 999}), "is missing"),
        (lambda d: d["attributes"]["stem"].update(out_channels="8; import os"), "attributes.stem.out_channels"),
    ],
)
def test_malformed_plans_are_refused(groups, change, message):
    with pytest.raises(PlanError, match=message):
        PruningPlan.from_json(edited(random_plan(groups, 0, 0.5), change))


def test_not_json_is_refused():
    with pytest.raises(PlanError, match="not JSON"):
        PruningPlan.from_json("{")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d["attributes"]["stem"].update(forward=8), "no integer attribute 'forward'"),
        (lambda d: d["attributes"].update(nowhere={"out_channels": 8}), "no module 'nowhere'"),
        (lambda d: d["tensors"].update({"nowhere.weight": {"shape": [1], "keep": {}}}), "no tensor 'nowhere.weight'"),
    ],
)
def test_plans_for_another_model_are_refused(groups, change, message):
    plan = PruningPlan.from_json(edited(random_plan(groups, 0, 0.5), change))
    with pytest.raises(PlanError, match=message):
        apply_plan(Residual(), plan)


@pytest.mark.parametrize(
    "path, name, value",
    [
        ("depthwise", "stride", [1, 1]), ("depthwise", "padding", [1, 1]), ("depthwise", "dilation", [1, 1]),
        ("depthwise", "kernel_size", [1, 1]), ("stem", "out_channels", 99), ("act", "inplace", 1),
        ("stem", "training", 1),
        ("bn", "__class__", 1), ("stem", "_version", 1), ("stem", "in_channels", 1), ("head", "out_features", 2),
    ],
)  # fmt: skip
def test_a_plan_and_a_config_change_only_what_pruning_changes(groups, path, name, value):
    plan = random_plan(groups, 0, 0.5)
    bad = PruningPlan.from_json(edited(plan, lambda d: d["attributes"].setdefault(path, {}).update({name: value})))
    with pytest.raises(PlanError):
        apply_plan(Residual(), bad)
    dense = Residual()
    cut = {"version": modeling_scap.VERSION, "shapes": {}, "attributes": {path: {name: value}}}
    if name in vars(dense.get_submodule(path)):  # others are left as they are
        with pytest.raises(ValueError, match=r"config\.json sets"):
            modeling_scap.shrink(dense, cut)
    modeling_scap.shrink(dense, {**cut, "attributes": {path: {"no_such_name": 1}}})
    assert repr(dense) == repr(Residual())


def test_integers_change_only_where_tensors_shrink(groups):
    plan = random_plan(groups, 0, 0.5)
    model = torch.nn.Sequential(Residual(), torch.nn.Conv2d(8, 8, 1))
    moved = {f"0.{name}": cut for name, cut in plan.tensors.items()}
    own = {f"0.{path}": values for path, values in plan.attributes.items()}
    fits = plan.model_copy(update={"groups": {}, "tensors": moved, "attributes": own})
    apply_plan(model, fits)
    with pytest.raises(PlanError, match="no tensor shrinks"):
        apply_plan(model, fits.model_copy(update={"attributes": {**own, "1": {"groups": 1, "out_channels": 4}}}))
    shapes = {"0.bn.weight": "4"}
    with pytest.raises(ValueError, match="pruning does not change"):
        cut = {"version": modeling_scap.VERSION, "shapes": shapes, "attributes": {"1": {"out_channels": 4}}}
        modeling_scap.shrink(model, cut)


@pytest.mark.parametrize("name", ["stem.weight", "stem.bias", "bn.running_mean", "expand.weight", "head.weight"])
def test_a_plan_that_leaves_a_layer_half_cut_is_refused(groups, name):
    plan = random_plan(groups, 0, 0.5)
    tensors = {own: cut for own, cut in plan.tensors.items() if own != name}
    with pytest.raises(PlanError, match=r"incomplete|no tensor shrinks"):
        apply_plan(Residual(), plan.model_copy(update={"tensors": tensors}))


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000, '{"version": ' + "9" * 5000 + "}", '{"version": 2, "version": 2}', '{"version": NaN}',
        '{"version": 2, "keeps": [], "groups": {}, "tensors": ' + '{"a": ' * 80 + "1" + "}" * 81,
        b"\xff\xfe{", '{"version": true}', '{"version": 2, "keeps": [], "groups": {"stem": {"size": true, "keep": 0}}}',
    ],
)  # fmt: skip
def test_hostile_json_is_one_line(text):
    with pytest.raises(PlanError) as caught:
        PruningPlan.from_json(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", ["0-700000000", "0-3,3-5", "5-2", "-1", "9" * 5000, "", "a", "0-1-2"])
def test_buffers_keep_what_there_is(kept):
    model = torch.nn.Module()
    model.register_buffer("scale", torch.arange(8.0), persistent=False)
    cut = {
        "version": modeling_scap.VERSION,
        "shapes": {"scale": "4"},
        "attributes": {},
        "buffers": {"scale": {"0": kept}},
    }
    with pytest.raises(ValueError):
        modeling_scap.shrink(model, cut)
    assert model.scale.shape == (8,)


ATTENTION = "scaled_dot_product_attention"


@pytest.mark.parametrize(
    ("function", "old", "new"),
    [
        ("mul", 2, 3),
        ("mul", 0.5, 0.3),  # no root of a width
        ("div", 2.0, -3.0),
        ("add", 2.0, 3.0),
        ("view", None, 4),
        ("dropout", 0.5, 0.1),
        (ATTENTION, 0.5, 0.25),  # only a scale that is left out, no number of its code's
        (ATTENTION, None, 2.0),  # one over the root of a width
        (ATTENTION, None, -0.5),
    ],
)
def test_a_plan_changes_only_sizes_and_the_scale_of_an_attention(function, old, new):
    dense = Residual()
    keep = {group.name: [0] for group in channel_groups(dense, X) if group.prunable}
    plan = PruningPlan.from_keep(channel_groups(dense, X), keep)
    number = CallNumber(function=function, call=1, position=0, old=old, new=new)
    with pytest.raises(PlanError, match=function):
        apply_plan(dense, plan.model_copy(update={"calls": {"": (number,)}}))
    cut = {"version": modeling_scap.VERSION, "shapes": {}, "attributes": {}}
    with pytest.raises(ValueError, match=function):
        modeling_scap.shrink(dense, {**cut, "calls": {"": [[function, 1, 0, old, new]]}})
    assert "forward" not in vars(dense)


def test_a_plan_does_not_fit_another_width(groups):
    with pytest.raises(PlanError, match="was made for"):
        apply_plan(Residual(width=16), random_plan(groups, 0, 0.5))


def test_tied_weights_stay_tied():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (torch.nn.Linear(4, 4, bias=False) for _ in range(3))
            self.first, self.out = torch.nn.Conv2d(3, 4, 1), torch.nn.Linear(4, 2)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.out(self.b(torch.relu(self.a(self.first(x).mean((2, 3))))))

    from scap_hub.channels.oracle import randomize, verify

    net = randomize(Tied())
    groups = channel_groups(net, X)
    plan = random_plan(groups, 0, 0.5)
    small = apply_plan(net, plan)
    assert small.a.weight is small.b.weight and small.a.weight.shape == (2, 2)
    assert verify(net, plan, X) < 1e-12


class HalfAnOutput(torch.nn.Module):
    """One half of a layer's channels is an output, so that the other half, which must stay as wide, stays too."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.free = (torch.nn.Conv2d(width, 8, 1) for width in (3, 4, 8))
        self.last = torch.nn.Conv2d(8, 2, 1)

    def forward(self, x):
        left, right = self.a(x).chunk(2, 1)
        return left, self.last(self.free(self.b(right)))


def test_what_is_held_holds_what_is_balanced_with_it():
    groups = channel_groups(HalfAnOutput(), X)
    pinned = {g.pinned_because.partition(" (")[0] for g in groups if g.producers == ("a",)}
    assert pinned == {"is an output of the model", "must stay balanced with channels that stay"}
    assert [g.name for g in groups.prunable] == ["b", "free"]


def test_a_plan_changes_nothing_where_nothing_is_cut():
    """A plan of one layer has no numbers of modules whose tensors stay whole, whatever other plans were made before."""

    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(8, 6, 1)
            self.shuffle, self.head = Shuffle(), torch.nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.b(self.shuffle(self.a(x))).mean((2, 3)))

    class Shuffle(torch.nn.Module):
        def forward(self, x):
            return x.view(len(x), 2, 4, 8, 8).transpose(1, 2).reshape(len(x), 8, 8, 8)

    groups = channel_groups(Two(), X)
    first = PruningPlan.from_keep(groups, {"b": [0, 2]})
    both = PruningPlan.from_keep(groups, {"a": [0, 2], "b": [0, 2]})
    assert both.calls["shuffle"] and first.calls == {} and set(first.attributes) == {"b", "head"}
    assert PruningPlan.from_keep(groups, {"b": [0, 2]}) == first


class Sizes(nn.Module):
    """A list of sizes, of which some are none of a width that shrinks."""

    def __init__(self, sizes: list[int], joined: Any) -> None:
        super().__init__()
        self.sizes, self.joined = sizes, joined
        self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(sizes[-1] if sizes[0] >= 0 else 8, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.joined(self.stem(x), self.sizes))


@pytest.mark.parametrize(
    ("sizes", "joined"),
    [
        ([4, 0, 4], lambda x, sizes: (parts := x.split(sizes, 1), parts[0].relu() * torch.cat(parts[1:], 1))[1]),
        ([-1, 8, 4, 4], lambda x, sizes: x.contiguous().view(sizes)),
    ],
)
def test_sizes_beside_those_that_change_may_be_none_or_left_open(sizes, joined):
    model, x = Sizes(sizes, joined).eval(), torch.randn(1, 3, 4, 4)
    groups = channel_groups(model, x)
    plan = PruningPlan.from_keep(groups, {groups.prunable[0].name: [0, 2, 3]})
    plan = PruningPlan.from_json(plan.to_json())
    left = plan.attributes[""]["sizes"]
    assert left == [3 if size == groups.prunable[0].size else size for size in sizes]
    assert verify(model, plan, x) < 1e-9
    changed = plan.model_copy(update={"attributes": {**plan.attributes, "": {"sizes": [*left[:-1], -1]}}})
    with pytest.raises(PlanError, match="no integer attribute 'sizes'"):
        apply_plan(model, changed)


def test_nothing_may_be_left_of_a_part():
    model = Sizes([8, 5, 3], lambda x, sizes: (parts := x.split(sizes, 1), parts[0] * torch.cat(parts[1:], 1))[1])
    model.stem, model.head = nn.Conv2d(3, 16, 1), nn.Conv2d(8, 5, 1)
    plan = PruningPlan.from_keep(channel_groups(model.eval(), X), {"stem": [0, 1]})
    plan = PruningPlan.from_json(plan.to_json())
    assert plan.attributes[""]["sizes"] == [2, 2, 0]
    assert verify(model, plan, X) < 1e-9
