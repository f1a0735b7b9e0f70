import copy

import pytest
import torch
from torch import nn

import scap_hub
from scap_hub import score, tune
from scap_hub.channels import channel_groups
from scap_hub.channels.oracle import randomize
from scap_hub.compensation import compensate, least_squares, recalibrate, repair
from scap_hub.criteria import OBS
from scap_hub.errors import CalibrationError, RecipeError
from scap_hub.plan import PruningPlan
from scap_hub.surgery import apply_plan
from tests.nets import Residual, random_plan

IMAGES = [torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(i)) for i in range(3)]


class Copied(nn.Module):
    """Channels 4..7 are twice channels 0..3: everything can be said with half of them."""

    def __init__(self, reader: nn.Module, flatten: bool = False) -> None:
        super().__init__()
        self.first, self.reader, self.flatten = nn.Conv2d(3, 8, 3), reader, flatten
        with torch.no_grad():
            self.first.weight[4:] = 2 * self.first.weight[:4]
            self.first.bias[4:] = 2 * self.first.bias[:4]

    def forward(self, x):
        y = torch.relu(self.first(x))
        return self.reader(nn.functional.max_pool2d(y, 5).flatten(1) if self.flatten else y)


@pytest.mark.parametrize(
    "reader, flatten",
    [
        (nn.Conv2d(8, 5, 1), False),
        (nn.Conv2d(8, 5, 3, stride=2, padding=1), False),
        (nn.Conv2d(8, 5, 3, dilation=2, padding=2, bias=False), False),
        (nn.Conv2d(8, 5, (1, 3), padding="same", padding_mode="reflect"), False),
        (nn.Linear(32, 5), True),
    ],
)
def test_channels_that_others_express_leave_no_trace(reader, flatten):
    net = Copied(reader, flatten).double().eval()
    images = [batch.double() for batch in IMAGES]
    groups = channel_groups(net, images[0])
    plan = PruningPlan.from_keep(groups, {"first": range(4)})
    small = apply_plan(net, plan)
    before = (small(images[0]) - net(images[0])).norm()
    compensate(net, small, plan, images, ridge=1e-9)
    after = (small(images[0]) - net(images[0])).norm()
    assert before > 0.1 and after < 1e-5 * before


def test_grouped_readers_are_solved_block_by_block():
    net = Copied(nn.Conv2d(8, 6, 3, groups=2, padding=1)).double().eval()
    with torch.no_grad():
        for low, high in ((0, 1), (2, 3), (4, 5), (6, 7)):
            net.first.weight[high], net.first.bias[high] = -0.5 * net.first.weight[low].abs(), 0.0
            net.first.weight[low], net.first.bias[low] = net.first.weight[high] * 2, 0.0
    images = [batch.double() for batch in IMAGES]
    groups = channel_groups(net, images[0])
    plan = PruningPlan.from_keep(groups, {"first": [0, 3, 4, 7]})
    small = apply_plan(net, plan)
    before = (small(images[0]) - net(images[0])).norm()
    compensate(net, small, plan, images, ridge=1e-9)
    assert (small(images[0]) - net(images[0])).norm() < 1e-5 * before


@pytest.mark.parametrize("ridge", [0.0, 1e-6, 1e-2, 10.0])
@pytest.mark.parametrize("images", [IMAGES, [IMAGES[0][:2]]], ids=["primal", "dual"])
def test_repair_never_increases_a_layers_error(ridge, images):
    net = randomize(Residual(width=16)).eval()
    groups = channel_groups(net, images[0])
    for seed in range(3):
        plan = random_plan(groups, seed, 0.5)
        small = apply_plan(net, plan)
        errors = compensate(net, small, plan, images, ridge)
        assert set(errors) == {"expand", "gate", "project", "skip", "head"}
        assert all(after <= before * (1 + 1e-5) + 1e-9 for before, after in errors.values())


def test_reported_error_is_the_layers_real_error():
    net = Copied(nn.Conv2d(8, 5, 1)).eval()
    randomize(net)
    groups = channel_groups(net, IMAGES[0])
    plan = PruningPlan.from_keep(groups, {"first": [0, 2, 3, 6]})
    small = apply_plan(net, plan)
    before, after = compensate(net, small, plan, IMAGES)["reader"]
    with torch.no_grad():
        dense = torch.cat([torch.relu(net.first(batch)) for batch in IMAGES])
        kept = torch.cat([torch.relu(small.first(batch)) for batch in IMAGES])
        wanted = net.reader(dense)
        error = (small.reader(kept) - wanted).square().sum() / wanted.square().sum()
    assert after < before
    assert after == pytest.approx(float(error), rel=0.2)


def test_layers_that_apply_another_weight_than_they_hold_are_left_alone():
    from timm.layers import ScaledStdConv2d

    net = nn.Sequential(nn.Conv2d(3, 8, 3), ScaledStdConv2d(8, 6, 3), nn.Conv2d(6, 2, 1)).eval()
    groups = channel_groups(net, IMAGES[0])
    plan = random_plan(groups, 0, 0.5)
    assert set(plan.groups) == {"0", "1"}
    small = apply_plan(net, plan)
    before = small[1].weight.clone()
    assert set(compensate(net, small, plan, IMAGES)) == {"2"}
    assert torch.equal(small[1].weight, before)


def test_recalibration_takes_the_batches_own_statistics():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    net[1].momentum = 0.3
    recalibrate(net, IMAGES)
    with torch.no_grad():
        features = [net[0](batch) for batch in IMAGES]
    mean = torch.stack([f.mean((0, 2, 3)) for f in features]).mean(0)
    assert torch.allclose(net[1].running_mean, mean, atol=1e-5)
    assert net[1].momentum == 0.3 and net.training and net[1].training
    recalibrate(net.eval(), IMAGES)
    assert not net[1].training


def test_a_remainder_is_no_batch_of_its_own():
    net = nn.Sequential(nn.Flatten(), nn.Linear(144, 4), nn.BatchNorm1d(4))
    images = torch.cat(IMAGES)[:33, :1]
    recalibrate(net, images.split(16))
    one, other = (net[:2](part).var(0) for part in images.tensor_split(2))
    assert torch.allclose(net[2].running_var, (one + other) / 2, rtol=1e-4)
    recalibrate(net, images[:4].split(1))
    with pytest.raises(CalibrationError, match=r"1 calibration image\(s\); at least 2"):
        recalibrate(net, images[:1])


class Chain(nn.Module):
    """Layer after layer, with batch norms, so that errors travel."""

    def __init__(self, depth=6, width=12):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
                for _ in range(depth)
            )
        )
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        return self.head(self.body(torch.relu(self.stem(x))).mean((2, 3)))


def relative(small, net):
    with torch.no_grad():
        wanted = torch.cat([net(batch) for batch in IMAGES])
        return float((torch.cat([small(batch) for batch in IMAGES]) - wanted).square().sum() / wanted.square().sum())


def halved(seed=0):
    torch.manual_seed(seed)
    net = randomize(Chain()).eval()
    recalibrate(net, IMAGES)
    plan = random_plan(channel_groups(net, IMAGES[0]), seed, 0.5)
    return net, plan, apply_plan(net, plan)


def test_later_layers_make_good_what_earlier_ones_got_wrong():
    net, plan, small = halved()
    before = relative(small, net)
    errors = compensate(net, small, plan, IMAGES)
    after = relative(small, net)
    assert after == pytest.approx(errors["head"][1], rel=1e-3), "the error is that of the model's own outputs"
    # Each layer by itself, reading what it reads in the dense model.
    alone = apply_plan(net, plan)
    for path in errors:
        layer, reader, inputs = net.get_submodule(path), alone.get_submodule(path), []
        handle = layer.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))
        for batch in IMAGES:
            net(batch)
        handle.remove()
        cut = plan.tensors[f"{path}.weight"].keep
        x = torch.cat(inputs)
        columns = torch.tensor(plan.indices(cut[1]))
        y = layer(x).movedim(1, -1).flatten(0, -2)
        if path != "head":
            x = nn.functional.unfold(x, 3, padding=1).unflatten(1, (-1, 9))[:, columns].flatten(1, 2)
            x = x.movedim(1, -1).flatten(0, -2)
            y = y[:, plan.indices(cut[0])]
        else:
            x = torch.cat([x[:, columns], x.new_ones(len(x), 1)], 1)
        solution = torch.linalg.lstsq(x, y).solution.T.detach()
        with torch.no_grad():
            if path == "head":
                reader.bias.copy_(solution[:, -1])
                solution = solution[:, :-1]
            reader.weight.copy_(solution.reshape(reader.weight.shape))
    assert after < 0.8 * relative(alone, net) and after < 0.5 * before


@pytest.mark.parametrize("seed", range(3))
def test_batch_norms_are_taken_anew_on_the_way(seed):
    net, plan, small = halved(seed)
    compensate(net, small, plan, IMAGES, batch_norm=True)
    assert not any(module.training for module in small.modules())
    again = copy.deepcopy(small)
    recalibrate(again, [torch.cat(IMAGES)])
    for one, other in zip(small.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.allclose(one, other, rtol=1e-5), "they fit the weights that the repair leaves"
    late = apply_plan(net, plan)
    compensate(net, late, plan, IMAGES)
    assert all(
        torch.equal(a[1].running_mean, b[1].running_mean)
        for a, b in zip(late.body, apply_plan(net, plan).body, strict=True)
    ), "and are left alone otherwise"
    recalibrate(late, IMAGES)
    assert relative(small, net) < relative(late, net)


def test_repair_is_both_steps_or_either():
    net, plan, small = halved()
    expected = apply_plan(net, plan)
    errors = compensate(net, expected, plan, IMAGES, 0.1, batch_norm=True)
    assert repair(net, small, plan, IMAGES, ridge=0.1) == errors
    assert_same_state(small, expected)
    norms, recalibrated = apply_plan(net, plan), apply_plan(net, plan)
    assert repair(net, norms, plan, IMAGES, least_squares=False) == {}
    recalibrate(recalibrated, IMAGES)
    assert_same_state(norms, recalibrated)
    nothing = apply_plan(net, plan)
    assert repair(net, nothing, plan, IMAGES, least_squares=False, batch_norm=False) == {}
    assert_same_state(nothing, apply_plan(net, plan))


def assert_same_state(one, other):
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("least_squares", [True, False])
def test_images_that_repair_nothing_are_refused(least_squares):
    net, plan, small = halved()
    before = copy.deepcopy(small)
    bad = torch.full((4, 3, 12, 12), torch.nan)
    for batches, message in (
        ([], "0 calibration image"),
        ([IMAGES[0][:0]], "holds no image"),
        ([{"label": 1}], "no images in a calibration batch"),
        ([IMAGES[0], bad], "NaN or Inf in what (layer|batch norm) .* is given"),
    ):
        with pytest.raises(CalibrationError, match=message):
            repair(net, small, plan, batches, least_squares=least_squares)
        assert_same_state(small, before)
        assert not any(module.training for module in small.modules())


@pytest.mark.parametrize("ridge", [-1.0, float("nan"), float("inf")])
def test_a_ridge_out_of_range_is_refused(ridge):
    net, plan, small = halved()
    with pytest.raises(RecipeError, match=r"ridge = .*give a number that is not negative"):
        repair(net, small, plan, IMAGES, ridge=ridge)


def test_large_images_are_repaired_from_as_many_as_fit(monkeypatch):
    net, plan, small = halved()
    whole, few = apply_plan(net, plan), apply_plan(net, plan)
    compensate(net, whole, plan, IMAGES)
    monkeypatch.setattr("scap_hub.compensation.least_squares._BYTES", 10 * 12 * 12 * 12 * 4)
    compensate(net, few, plan, IMAGES)
    compensate(net, small, plan, [IMAGES[0][:10]])
    assert not torch.equal(few.head.weight, whole.head.weight)
    assert torch.equal(few.head.weight, small.head.weight)


def test_a_layer_that_runs_twice_is_solved_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.again, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

        def forward(self, x):
            return self.head(torch.relu(self.again(torch.relu(self.again(torch.relu(self.first(x)))))).mean((2, 3)))

    net = randomize(Twice()).eval()
    plan = random_plan(channel_groups(net, IMAGES[0]), 0, 0.5)
    small = apply_plan(net, plan)
    before = relative(small, net)
    assert set(compensate(net, small, plan, IMAGES)) == {"again", "head"} and relative(small, net) < before


def test_layers_that_read_no_images_are_repaired_too():
    class Table(nn.Module):
        """A small network of coordinates beside the images, as in Swin V2."""

        def __init__(self):
            super().__init__()
            self.coordinates = torch.linspace(-1, 1, 14).reshape(7, 2)
            self.wide, self.narrow = nn.Linear(2, 24), nn.Linear(24, 8)
            self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

        def forward(self, x):
            table = self.narrow(torch.relu(self.wide(self.coordinates)))
            return self.head(torch.relu(self.stem(x)).mean((2, 3)) * table.mean(0))

    net = randomize(Table()).eval()
    groups = channel_groups(net, IMAGES[0])
    plan = PruningPlan.from_keep(groups, {"wide": range(12)})
    small = apply_plan(net, plan)
    before = relative(small, net)
    assert before > 1e-3
    compensate(net, small, plan, IMAGES)
    assert relative(small, net) < 0.1 * before
    assert set(OBS().score(net, [g for g in groups if g.prunable], IMAGES)) == {g.name for g in groups if g.prunable}


@pytest.mark.parametrize("images", [4, 400], ids=["dual", "primal"])
def test_the_ridge_leaves_the_bias_free(images):
    """However strong the ridge, a bias takes up what the channels that left gave on average."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 60), nn.ReLU(), nn.Linear(60, 3)).double().eval()
    x = torch.randn(images, 5, dtype=torch.float64)
    plan = PruningPlan.from_keep(channel_groups(net, x), {"0": list(range(10))})
    small = apply_plan(net, plan)
    compensate(net, small, plan, [x], ridge=1e9)
    torch.testing.assert_close(small(x).mean(0), net(x).mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(small[2].weight, net[2].weight[:, :10], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ridge", [1e-8, 1e-6, 1e-4])
def test_a_small_ridge_is_safe_in_single_precision(ridge):
    """Inputs that are nearly the same, far from zero: in single precision the error came out negative."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 4)).eval()
    x = 30 + torch.randn(512, 8)
    plan = PruningPlan.from_keep(channel_groups(net, x), {"0": list(range(20))})
    small = apply_plan(net, plan)
    ((before, after),) = compensate(net, small, plan, [x], ridge=ridge).values()
    assert 0 <= after < min(before, 1e-5)
    torch.testing.assert_close(small(x), net(x), rtol=1e-3, atol=0.1)


def test_the_largest_map_bounds_how_many_images_pass_together(monkeypatch):
    """Also where it is no input of a re-solved layer."""
    monkeypatch.setattr(least_squares, "_BYTES", 64 * 32 * 32 * 4 * 5)
    net = nn.Sequential(nn.Conv2d(3, 64, 1), nn.MaxPool2d(8), nn.Conv2d(64, 8, 1), nn.Conv2d(8, 2, 1)).eval()
    images = [torch.randn(8, 3, 32, 32)]
    plan = PruningPlan.from_keep(channel_groups(net, images[0]), {"2": list(range(4))})
    small = apply_plan(net, plan)
    sizes = []
    small.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    compensate(net, small, plan, images)
    assert sizes == [5]


class Doubled(nn.Module):
    """A network for images twice as bright, which it may make in place."""

    def __init__(self, body: nn.Module, in_place: bool) -> None:
        super().__init__()
        self.body, self.in_place = body, in_place

    def forward(self, x):
        return self.body(x.mul_(2) if self.in_place else x * 2)


def test_a_model_that_writes_to_its_images_changes_nothing():
    def done(in_place: bool) -> list[torch.Tensor]:
        net = Doubled(randomize(Residual(width=16)), in_place).eval()
        images = [batch[:8].clone() for batch in IMAGES[:2]]
        groups = channel_groups(net, images[0])
        scores = [score(net, images, criterion, groups=groups) for criterion in ("scap-set", "taylor")]
        plan = random_plan(groups, seed=0)
        small = scap_hub.apply_plan(net, plan, inputs=images[0])
        repair(net, small, plan, images)
        tune(net, small, images, steps=2)
        assert all(torch.equal(batch, IMAGES[i][:8]) for i, batch in enumerate(images))
        return [*small.state_dict().values(), *(own[name] for own in scores for name in sorted(own))]

    for one, other in zip(done(True), done(False), strict=True):
        torch.testing.assert_close(one, other)
