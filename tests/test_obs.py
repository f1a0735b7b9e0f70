"""Elimination against plain least squares, and set criteria through every way that channels are read."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from scap_hub import refine
from scap_hub.channels import channel_groups
from scap_hub.channels.decoding import staying
from scap_hub.channels.oracle import randomize
from scap_hub.criteria import OBS, ScapSet, base, score
from scap_hub.criteria.obs import blocks, elimination
from scap_hub.criteria.obs.elimination import CompensatedWeight, eliminate
from scap_hub.criteria.patches import patches, views
from scap_hub.criteria.scap import outputs as outputs_of_a_model
from scap_hub.criteria.scap.outputs import marginal
from scap_hub.errors import CalibrationError, RecipeError
from scap_hub.selection.select import select
from tests import scap_set_reference as reference
from tests.nets import Residual
from tests.scap_set_reference import least_squares

torch.set_num_threads(1)
IMAGES = [torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(2)]


@settings(deadline=None, max_examples=25, derandomize=True)
@given(seed=st.integers(0, 99), rows=st.integers(1, 4), widths=st.lists(st.integers(0, 3), min_size=2, max_size=6))
def test_eliminating_costs_what_least_squares_says(seed, rows, widths):
    generator = torch.Generator().manual_seed(seed)
    owner = torch.tensor([-1] + [k for k, width in enumerate(widths) for _ in range(width)])
    owner = owner[torch.randperm(len(owner), generator=generator)]
    n = len(owner)
    p = (
        torch.randn(3 * n, n, generator=generator, dtype=torch.float64)
        @ torch.randn(n, n, generator=generator).double()
    )
    gram, weight = p.T @ p, torch.randn(rows, n, generator=generator, dtype=torch.float64)
    compensated = CompensatedWeight(weight, gram, owner, ridge=1e-2)
    energy, total, gone = ((weight @ gram) * weight).sum(), 0.0, []
    while len(gone) < len(widths):
        costs = compensated.costs(len(widths))
        for k in set(range(len(widths))) - set(gone):
            keep = [c for c in range(n) if int(owner[c]) not in (*gone, k)]
            expected, _ = least_squares(weight, gram, keep, 1e-2)
            assert float(total + costs[k]) == pytest.approx(float(expected / energy), rel=1e-6, abs=1e-9)
        best = min(set(range(len(widths))) - set(gone), key=lambda k: float(costs[k]))
        total += costs[best]
        gone.append(best)
        compensated.remove([best])
        keep = [c for c in range(n) if int(owner[c]) not in gone]
        compensated.compact()
        torch.testing.assert_close(
            compensated.weight, least_squares(weight, gram, keep, 1e-2)[1][:, keep], rtol=1e-6, atol=1e-8
        )
        assert compensated.columns.tolist() == keep


@pytest.mark.parametrize("seed", range(6))
def test_rounds_eliminate_the_channels_that_go_one_at_a_time(seed, monkeypatch):
    generator = torch.Generator().manual_seed(seed)
    owners = [torch.arange(30).repeat_interleave(3), torch.cat([torch.arange(-1, 25), torch.arange(5).repeat(2)])]

    def weights():
        generator.manual_seed(seed)
        for owner in owners:
            few = torch.randn(200, 12, generator=generator, dtype=torch.float64)  # so columns say much the same
            rows = few @ torch.randn(12, len(owner), generator=generator, dtype=torch.float64)
            rows = rows + 0.1 * torch.randn(rows.shape, generator=generator, dtype=torch.float64)
            weight = torch.randn(7, len(owner), generator=generator, dtype=torch.float64)
            yield CompensatedWeight(weight, rows.T @ rows, owner, ridge=1e-3)

    slow, expected = list(weights()), []
    while len(expected) < 28:
        costs = sum(weight.costs(30) for weight in slow)
        expected.append(min(set(range(30)) - set(expected), key=lambda k: float(costs[k])))
        for weight in slow:
            weight.remove(expected[-1:])
    monkeypatch.setattr(elimination, "_COLUMNS", 20)
    fast, rounds = list(weights()), []
    whole = elimination._leaving
    monkeypatch.setattr(elimination, "_leaving", lambda *args: rounds.append(1) or whole(*args))
    assert eliminate(fast, torch.zeros(30, dtype=torch.long), [2]) == expected
    assert 5 < len(rounds) < 28
    for one, other in zip(fast, slow, strict=True):
        one.compact(), other.compact()
        torch.testing.assert_close(one.weight, other.weight, rtol=1e-6, atol=1e-8)


def test_kinds_keep_their_numbers():
    gram, weight = torch.eye(6, dtype=torch.float64), torch.arange(6, dtype=torch.float64)[None] + 1
    compensated = CompensatedWeight(weight, gram, torch.arange(6), ridge=1e-2)
    assert eliminate([compensated], torch.tensor([0, 0, 0, 1, 1, 1]), [2, 1]) == [0, 3, 4]


class Waits(TorchDispatchMode):
    """Counts the operators after which Python waits for a device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masks = func is torch.ops.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        names = ("nonzero", "_local_scalar_dense", "is_nonzero", "equal", "linalg_inv", "linalg_solve")
        self.count += masks or func.overloadpacket.__name__ in names
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("width", [1, 4])
def test_an_elimination_does_not_wait_for_a_device_at_every_step(width):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(400, 40 * width, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, 40 * width, generator=generator, dtype=torch.float64)
    compensated = CompensatedWeight(weight, rows.T @ rows, torch.arange(40).repeat_interleave(width), ridge=1e-2)
    with Waits() as waits:
        assert len(eliminate([compensated], torch.zeros(40, dtype=torch.long), [0])) == 40
    assert waits.count < 10, "the one that reads which channel leaves is a copy to the host"


def test_costs_that_are_no_numbers_end_the_elimination():
    compensated = CompensatedWeight(torch.ones(1, 3).double(), torch.eye(3).double(), torch.arange(3), ridge=1e-2)
    compensated.weight.fill_(torch.nan)
    with pytest.raises(CalibrationError, match="NaN or Inf in what channels cost"):
        eliminate([compensated], torch.zeros(3, dtype=torch.long), [1])


def test_a_duplicate_leaves_and_its_twin_stays():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)).double().eval()
    with torch.no_grad():
        net[0].weight[4], net[0].bias[4] = 2 * net[0].weight[1], 2 * net[0].bias[1]
    scores = score(net, IMAGES, "obs", groups=channel_groups(net, IMAGES[0]))["0"]
    low, high = sorted(scores[[1, 4]].tolist())
    assert low == scores.min() and high > 0.3


@pytest.mark.parametrize(
    "layer, x",
    [
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), torch.randn(5, 4, 9, 8)),
        (nn.Conv2d(4, 6, (1, 3), dilation=(1, 2), groups=2, padding="same", bias=False), torch.randn(5, 4, 9, 8)),
        (nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect", bias=False), torch.randn(5, 4, 9, 8)),
        (nn.Conv1d(4, 6, 3, bias=False), torch.randn(5, 4, 9)),
        (nn.Linear(4, 6, bias=False), torch.randn(5, 9, 8, 4)),
    ],
)
def test_patches_times_weight_is_the_layer(layer, x):
    parts = patches(layer, x, len(x))
    weight = layer.weight.flatten(1).unflatten(0, (len(parts), -1))
    y = (parts @ weight.mT).transpose(0, 1).flatten(1)  # (rows, O)
    expected = layer(x).movedim(-1 if x.shape[-1] == 4 else 1, -1)
    torch.testing.assert_close(y, expected.reshape(y.shape))
    seen = torch.stack([view.flatten(2) for view in views(layer, x)], -1)  # (N, C, places, window)
    columns = seen.unflatten(1, (len(parts), -1)).movedim(1, 0).transpose(2, 3).flatten(3)
    torch.testing.assert_close(columns.flatten(1, 2), parts)
    some = patches(layer, x, len(x), 7)
    assert some.shape == (len(parts), 35, parts.shape[2])
    halves = torch.cat([patches(layer, half, len(half), 7) for half in (x[:2], x[2:])], 1)
    torch.testing.assert_close(some, halves)


class Wired(nn.Module):
    """Everything at once: cat, add, several producers and readers, a grouped and a depthwise reader, flatten."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.depthwise = nn.Conv2d(20, 20, 3, padding=1, groups=20)
        self.grouped, self.pointwise = nn.Conv2d(20, 12, 3, groups=2), nn.Conv2d(20, 6, 1)
        self.head, self.side = nn.Linear(6 * 16, 5), nn.Linear(12, 5)

    def forward(self, x):
        joined = torch.cat([torch.relu(self.a(x) + self.c(x)), torch.relu(self.b(x))], 1)
        y = self.depthwise(joined)
        pooled = nn.functional.adaptive_avg_pool2d(torch.relu(self.pointwise(y)), 4)
        return self.head(pooled.flatten(1)) + self.side(torch.relu(self.grouped(y)).mean((2, 3)))


@pytest.mark.parametrize("make", [Wired, lambda: Residual(width=16)])
@pytest.mark.parametrize("name", ["obs", "scap-set"])
def test_set_criteria_keep_numbers_and_balance_and_repeat(make, name):
    torch.manual_seed(0)
    net = randomize(make()).double().eval()
    groups = channel_groups(net, IMAGES[0])
    before = {key: value.clone() for key, value in net.state_dict().items()}
    scores = score(net, IMAGES, name, groups=groups)
    for group in groups:
        if group.prunable:
            ranks = (torch.arange(group.size).double() + 0.5) / group.size
            if name == "obs":
                torch.testing.assert_close(scores[group.name].sort().values, ranks)
            else:
                assert (scores[group.name] > 0).all() and len(scores[group.name].unique()) == group.size
    plan = select(groups, scores, "ratio=0.5", round_to=1)
    criterion = {"obs": OBS, "scap-set": ScapSet}[name](sequential=True)
    refined = criterion.refine(net, groups, IMAGES, plan)
    assert {g: len(refined.kept(g)) for g in refined.groups} == {g: len(plan.kept(g)) for g in plan.groups}
    again = criterion.refine(net, groups, torch.cat(IMAGES).split(5), plan)
    assert again == refined
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert type(criterion)().refine(net, groups, IMAGES, plan) is plan


@pytest.mark.parametrize(("blend", "frequency_weights"), [(0.0, False), (0.5, False), (0.9, True), (0.0, True)])
@pytest.mark.parametrize("seed", range(3))
def test_scap_set_is_the_materialised_one(seed, blend, frequency_weights):
    torch.manual_seed(seed)
    # One number an image, linear in what the second convolution gives: nothing is left to the draw or to first order.
    head = nn.Linear(64, 1).requires_grad_(False)
    parts = (nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1), nn.Flatten(1), head)
    net = nn.Sequential(*parts).double()
    x = torch.cat(IMAGES)[:, :, :4, :4]  # of 16 places, all are read
    options = {"bins": 3, "latent": 2, "blend": blend}
    groups = [group for group in channel_groups(net, x) if group.name == "0"]
    criterion = ScapSet(ridge=1e-2, frequency_weights=frequency_weights, **options)
    scores = score(net, x.split(6), criterion, groups=groups)

    conv, y = net[2], net[:2](x).detach()
    gradient = head.weight.detach().reshape(4, 4, 4) if frequency_weights else None  # for every image, but for its sign
    moment, weight = reference.blended_moment(conv, x, y, **options, gradient=gradient), reference.with_bias(conv)
    channel_of_column = torch.cat([torch.arange(6).repeat_interleave(9), torch.tensor([-1])])
    order = reference.order(weight, moment, channel_of_column, 1e-2)

    def outputs(weight):
        maps = (reference.patches(conv, y) @ weight.T).unflatten(0, (16, 16)).mT
        return maps.flatten(1) @ head.weight[0].detach()

    dense = outputs(weight)
    errors = [(0, 0.0)]
    for gone in (1, 2, 3, 4, 5):  # of 6 channels
        keep = reference.remaining(channel_of_column, order[:gone])
        small = outputs(least_squares(weight, moment, keep, 1e-2)[1])
        errors.append((gone, float((small - dense).square().sum() / (dense - dense.mean()).square().sum())))
    torch.testing.assert_close(scores["0"], marginal(order, errors), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("seed", range(4))
def test_refinement_goes_on_with_the_compensated_weights(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(*(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 10, 3), nn.ReLU(), nn.Conv2d(10, 2, 3))).double()
    x = torch.cat(IMAGES)[:, :, :8, :8]
    groups = [group for group in channel_groups(net, x) if group.prunable]
    plan = select(groups, score(net, [], "random", groups=groups), "ratio=0.5", round_to=1)
    refined = refine(net, groups, [x], plan, "obs", sequential=True)
    assert refine(net, groups, [x], plan, "obs") is plan

    compensated = copy.deepcopy(net)
    for name, conv in (("0", compensated[2]), ("2", compensated[4])):
        size = conv.in_channels
        channel_of_column = torch.cat([torch.arange(size).repeat_interleave(9), torch.tensor([-1])])
        with torch.no_grad():
            moment = reference.patch_moment(conv, compensated[: int(name) + 2](x))
        weight = reference.with_bias(conv)
        gone = reference.order(weight, moment, channel_of_column, 1e-2)[: size - len(plan.kept(name))]
        assert refined.kept(name) == sorted(set(range(size)) - set(gone))
        solved = least_squares(weight, moment, reference.remaining(channel_of_column, gone), 1e-2)[1]
        with torch.no_grad():
            conv.weight.copy_(solved[:, :-1].reshape(conv.weight.shape))
            conv.bias.copy_(solved[:, -1])


def test_outputs_tell_which_group_can_be_narrow():
    """Two equal branches, of which one hardly reaches the output: ranks cut both alike, output errors only that one."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.loud, self.faint = (nn.Conv2d(3, 16, 3, padding=1) for _ in range(2))
            self.a, self.b = (nn.Conv2d(16, 8, 3, padding=1) for _ in range(2))
            self.head = nn.Linear(8, 5)

        def forward(self, x):
            return self.head((self.a(self.loud(x).relu()) + 1e-3 * self.b(self.faint(x).relu())).mean((2, 3)))

    torch.manual_seed(0)
    net = Branches().eval()
    groups = [group for group in channel_groups(net, IMAGES[0].float()) if group.name in ("loud", "faint")]
    images = [images.float() for images in IMAGES]
    kept = {}
    for name, scope in (("obs", OBS.scope), ("scap-set", ScapSet.scope)):
        plan = select(groups, score(net, images, name, groups=groups), "macs=0.6", round_to=1, scope=scope)
        kept[name] = [len(plan.kept(group)) if group in plan.groups else 16 for group in ("loud", "faint")]
    assert abs(kept["obs"][0] - kept["obs"][1]) <= 1
    assert kept["scap-set"][0] > 10 and kept["scap-set"][1] <= 4


def test_scoring_runs_the_model_a_fixed_number_of_times_for_each_probe():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3), nn.Flatten(), nn.Linear(320, 4)).eval()
    images = [images.float() for images in IMAGES]
    groups = channel_groups(net, images[0])
    sizes: list[int] = []
    net.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    seen = []
    for probes in (2, 8):
        sizes.clear()
        score(net, images, ScapSet(probes=probes), groups=groups)
        seen.append(sum(sizes))
    # For the variance of the outputs twice, for the gradients' spectra, and for the gradients.
    assert seen[1] - seen[0] == (8 - 2) * 4, "whatever the number of groups and widths"


@pytest.mark.parametrize("portion", [2**31, 1], ids=["at once", "one by one"])
def test_random_vectors_say_what_the_outputs_lose(portion, monkeypatch):
    """Behind the layers all is linear: the draw alone stands between the estimate and whole passes of the model."""
    monkeypatch.setattr(outputs_of_a_model, "VECTORS", 400)
    monkeypatch.setattr(outputs_of_a_model, "BYTES", portion)
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 7, bias=False), nn.Linear(7, 5)
            self.c = nn.Linear(8, 7, bias=False)

        def forward(self, x):
            y = self.a(x).relu()
            return self.head(self.b(y) - 0.5 * self.c(y))

    net, x = Two().double().eval(), torch.randn(12, 6, dtype=torch.float64)
    (group,) = (group for group in channel_groups(net, x) if group.name == "a")
    found = blocks.consumer_blocks(net, group, staying([group], {}))
    change = {block.path: torch.randn(2, 7, 8, dtype=torch.float64) * 0.1 for block in found}
    assert sorted(change) == ["b", "c"]
    elimination = outputs_of_a_model.Elimination(group, range(8), [3, 5], [(b, change[b.path]) for b in found])
    model = outputs_of_a_model.Outputs(net, [x[:5], x[5:]], 7, 12)
    (errors,) = model.errors([elimination])
    both = copy.deepcopy(net)
    for width in range(2):
        both.load_state_dict(net.state_dict())
        with torch.no_grad():
            both.b.weight += change["b"][width]
            both.c.weight += change["c"][width]
            dense, lost = net(x), both(x) - net(x)
        exact = float(lost.square().sum() / (dense - dense.mean(0)).square().sum())
        assert errors[width + 1][1] == pytest.approx(exact, rel=0.1)


def test_a_group_that_no_gradient_reaches_is_said_so():
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(6, 5)

        def forward(self, x):
            with torch.no_grad():
                hidden = self.b(self.a(x).relu())
            return hidden + self.c(x)

    net, x = Cut().eval(), torch.randn(12, 6)
    groups = [group for group in channel_groups(net, x) if group.name == "a"]
    with pytest.warns(UserWarning, match="no gradient of the outputs reaches b, which read channel group 'a'"):
        scores = score(net, [x], "scap-set", groups=groups)
    assert scores["a"].isfinite().all() and len(set(scores["a"].tolist())) == 8


@pytest.mark.parametrize(
    "options",
    [
        *({"probes": 1}, {"probes": 8.5}, {"blend": 1.5}, {"blend": -0.1}, {"blend": float("nan")}),
        *({"ridge": -1.0}, {"ridge": float("nan")}, {"ridge": float("inf")}, {"bins": 7.0}, {"latent": 0}),
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(RecipeError, match=f"{next(iter(options))} = "):
        ScapSet(**options)


@given(st.lists(st.floats(0, 4), min_size=1, max_size=8), st.randoms())
def test_marginal_errors_grow_in_the_order_in_which_channels_leave(errors, random):
    order = list(range(2 * len(errors) + 1))
    random.shuffle(order)
    curve = [(0, 0.0), *((2 * i + 2, error) for i, error in enumerate(errors))]
    values = marginal(order, curve)
    assert (values > 0).all() and (values[order].diff() > 0).all()
    # The hull lies below the curve, and meets it at its ends.
    total = values[order].cumsum(0)
    assert all(total[gone - 1] <= error * (1 + 1e-4) + 1e-9 for gone, error in curve[1:])
    assert float(total[-1]) == pytest.approx(max(1, 2 * errors[-1]), rel=1e-3)


def test_every_reader_counts_once():
    net = Wired().double().eval()
    groups = {group.name: group for group in channel_groups(net, IMAGES[0])}
    everything = staying(list(groups.values()), {})
    found = {
        name: [block.key for block in blocks.consumer_blocks(net, group, everything)] for name, group in groups.items()
    }
    assert sorted(found["a"]) == [("grouped", 0), ("pointwise", 0)]
    assert sorted(found["b"]) == [("grouped", 0), ("grouped", 1), ("pointwise", 0)]
    assert found["pointwise"] == [("head", 0)]
    head = blocks.consumer_blocks(net, groups["pointwise"], everything)[0]
    assert [int((head.channel == channel).sum()) for channel in groups["pointwise"].channels] == [16] * 6
    assert head.channel[-1] == -1 and head.columns.size == 97


def test_refinement_leaves_a_smaller_error_than_the_plan():
    torch.manual_seed(0)
    net = randomize(Residual(width=16)).double().eval()
    groups = channel_groups(net, IMAGES[0])
    plan = select(groups, score(net, [], "random", groups=groups), "ratio=0.5", round_to=1)
    from scap_hub.compensation import compensate
    from scap_hub.surgery import apply_plan

    errors = []
    for chosen in (plan, OBS(sequential=True).refine(net, groups, IMAGES, plan)):
        small = apply_plan(net, chosen)
        errors.append(sum(after for _, after in compensate(net, small, chosen, IMAGES).values()))
    assert errors[1] < errors[0]


def test_very_wide_layers_are_judged_by_their_heaviest_columns(monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveMaxPool2d(3), nn.Flatten(), nn.Linear(54, 4)).double()
    groups = channel_groups(net, IMAGES[0])
    full = score(net, IMAGES, "obs", groups=groups)["0"]
    monkeypatch.setattr(blocks, "COLUMNS", 24)
    (block,) = blocks.consumer_blocks(net, groups[0], staying(groups, {}))
    assert block.columns.size == 25
    some = score(net, IMAGES, "obs", groups=groups)["0"]
    assert torch.corrcoef(torch.stack([full, some]))[0, 1] > 0
    plan = select(groups, {"0": full}, "ratio=0.5", round_to=1)
    assert len(OBS(sequential=True).refine(net, groups, IMAGES, plan).kept("0")) == len(plan.kept("0"))


def test_bad_input():
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)).eval()
    groups = channel_groups(net, torch.randn(1, 3, 8, 8))
    with pytest.raises(CalibrationError, match="1 calibration image"):
        score(net, [torch.randn(1, 3, 8, 8)], "obs", groups=groups)
    bad = torch.full((2, 3, 8, 8), float("nan"))
    with pytest.raises(CalibrationError, match="NaN or Inf in the input of layer '2', batch 1"):
        score(net, [torch.randn(2, 3, 8, 8), bad], "obs", groups=groups)
    with pytest.raises(RecipeError, match="ridge = 0: give a positive number"):
        OBS(ridge=0)
    with pytest.raises(RecipeError, match=r"ridge = 1e-300 leaves the second moment .* singular; raise it"):
        score(net, [torch.ones(2, 3, 8, 8)], "obs", groups=groups, ridge=1e-300)
    for name in ("obs", "scap-set"):
        for batches in ([], iter([])):
            with pytest.raises(CalibrationError, match=r"0 calibration image\(s\); at least 2"):
                score(net, batches, name, groups=groups)
        with pytest.raises(CalibrationError, match="no images in a calibration batch of type str"):
            score(net, ["images"], name, groups=groups)
    flat = score(net, [torch.zeros(4, 3, 8, 8)], "obs", groups=groups)["0"]
    assert flat.isfinite().all()


def test_layers_whose_inputs_are_next_to_nothing_cost_no_more_than_others():
    # As after many untrained layers: squares that float32 hardly holds, so their second moment is mostly rounding.
    x = 3e-23 * torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    weight = torch.ones(2, 16, dtype=torch.float64)
    costs = CompensatedWeight(weight, (x.T @ x).double(), torch.arange(16), ridge=1e-2).costs(16)
    assert (costs < 10).all()


@pytest.mark.parametrize("ridge", [1e-15, 1e-300], ids=["rounding", "nothing"])
def test_a_ridge_that_leaves_the_moment_singular_is_refused(ridge):
    rows = torch.randn(3, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[:, 8:] = rows[:, :8]
    weight, channel_of_column = torch.ones(2, 16, dtype=torch.float64), torch.arange(16)
    CompensatedWeight(weight, rows.T @ rows, channel_of_column, 1e-2)
    with pytest.raises(RecipeError, match=r"ridge = .* leaves .* singular"):
        CompensatedWeight(weight, rows.T @ rows, channel_of_column, ridge)
    with pytest.raises(CalibrationError, match="NaN or Inf in the second moment"):
        CompensatedWeight(weight, torch.full((16, 16), torch.inf, dtype=torch.float64), channel_of_column, 1e-2)


def decided(*shards):
    """Scores and refined plans of each criterion, on this process's share of the same 23 images."""
    torch.manual_seed(0)
    net = Residual(width=16).eval()
    images = torch.randn(23, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    batches = [images[shard] for shard in shards]
    groups = channel_groups(net, images[:1])
    saved = {}
    for name in ("activation", "taylor", "hrank", "obs", "scap-set"):
        criterion = base.criterion(name, {"sequential": True} if name in ("obs", "scap-set") else {})
        scores = score(net, batches, criterion, groups=groups)
        saved[name] = dict(scores)
        plan = select(groups, scores, "ratio=0.5", round_to=1)
        saved[name, "plan"] = criterion.refine(net, groups, batches, plan).to_json()
    return saved


SCRIPT = """
import sys, torch
from accelerate import PartialState
from tests.test_obs import decided
state = PartialState(cpu=True)
assert state.num_processes == 2
shards = [(slice(0, 8), slice(8, 15)), (slice(15, 23),)][state.process_index]
torch.save(decided(*shards), f"{sys.argv[1]}/{state.process_index}.pt")
state.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_give_the_scores_and_the_plan_of_one(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    root = Path(__file__).parents[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*launch, tmp_path / "script.py", tmp_path], check=True, env=environment, timeout=120, cwd=root)
    one = decided(slice(0, 12), slice(12, 23))
    for process in range(2):
        two = torch.load(tmp_path / f"{process}.pt")
        for key, values in one.items():
            if isinstance(key, tuple):
                assert two[key] == values
            else:
                # Output errors are squares of what a float32 model gives for batches of other sizes.
                torch.testing.assert_close(two[key], values, rtol=1e-5 if key == "scap-set" else 0, atol=1e-6)


@pytest.mark.parametrize("criterion", [OBS(), ScapSet()])
def test_the_ranking_orders_channels_as_the_scores_do(criterion):
    model = randomize(Residual(width=16)).double().eval()
    groups = [group for group in channel_groups(model, IMAGES[0]) if group.prunable]
    scores, ranks = criterion.score(model, groups, IMAGES), criterion.ranking(model, groups, IMAGES)
    for group in groups:
        assert scores[group.name].argsort().tolist() == ranks[group.name].argsort().tolist()
