import pytest
import torch
from torch import nn

from scap_hub.channels.groups import channel_groups
from scap_hub.channels.oracle import randomize
from scap_hub.plan import PruningPlan
from scap_hub.repair import compensate, recalibrate
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


@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 10.0])
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
    assert net[1].momentum == 0.3 and net.training
