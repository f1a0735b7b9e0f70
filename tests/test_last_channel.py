"""Plans that leave a single channel of a group: no rule may lose sight of the last one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import scap_hub
from scap_hub.errors import PlanError
from tests.independent import TOLERANCE, difference, random_values, reference


class Parts(nn.Module):
    """Equal parts of a feature map, each with a layer of its own, joined again; `how` does so."""

    def __init__(self, how: Any) -> None:
        super().__init__()
        self.how, self.sizes = how, (4, 4, 4)
        self.stem, self.head = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 5, 1)
        self.first, self.second = (nn.Conv2d(4, 4, 3, padding=1, groups=4) for _ in range(2))
        self.third = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.how(self, self.stem(x).relu())).mean((2, 3))


def split_and_joined(net: Parts, x: Tensor) -> Tensor:
    a, b, c = x.split(net.sizes, 1)
    return torch.cat([net.first(a), b, net.second(c)], 1)


def chunked_and_swapped(net: Parts, x: Tensor) -> Tensor:
    a, b, c = x.chunk(3, 1)
    return torch.cat([net.second(c).relu(), a + net.first(b), net.third(b)], 1)


@pytest.mark.parametrize("how", [split_and_joined, chunked_and_swapped])
@pytest.mark.parametrize("last", [0, -1])
def test_one_channel_of_each_group_is_left(how, last):
    net, x = random_values(Parts(how)).eval(), torch.randn(1, 3, 8, 8)
    groups = scap_hub.channel_groups(net, x)
    assert all(group.prunable for group in groups if "head" not in group.producers)
    plan = scap_hub.PruningPlan.from_keep(groups, {group.name: [range(group.size)[last]] for group in groups.prunable})
    small = scap_hub.apply_plan(net, plan).double()
    assert small.stem.out_channels == 3
    x = x.double()
    assert difference(small(x), reference(net, plan, "readers")(x)) < TOLERANCE
    assert scap_hub.verify(net, plan, x.float()) < TOLERANCE


class Deviations(nn.Module):
    """Features divided by their deviation within groups of two, which is stretched to them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        grouped = x.view(x.shape[0], 6, -1, *x.shape[2:])
        scale = grouped.square().mean((2, 3, 4), keepdim=True).sqrt().expand(grouped.shape)
        return self.b(x / scale.reshape(x.shape))


def test_what_is_not_stretched_any_more():
    net, x = random_values(Deviations()).eval(), torch.randn(1, 3, 8, 8)
    groups = scap_hub.channel_groups(net, x)
    (group,) = groups.prunable
    assert group.size == 2
    plan = scap_hub.PruningPlan.from_keep(groups, {group.name: [1]})
    assert scap_hub.apply_plan(net, plan).a.out_channels == 6
    assert scap_hub.verify(net, plan, x) < TOLERANCE


class Contiguous(nn.Module):
    """Features as tokens, in memory in their own order: with a single channel they are so without a copy."""

    def __init__(self, written: bool) -> None:
        super().__init__()
        self.stem, self.head, self.written = nn.Conv2d(3, 8, 1), nn.Linear(8, 5), written

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        own = tokens.contiguous()
        if self.written:
            own.mul_(2)
        return self.head(own.relu() + tokens).mean(1)


def test_a_single_channel_is_contiguous_by_itself():
    net, x = random_values(Contiguous(written=False)).eval(), torch.randn(1, 3, 8, 8)
    plan = scap_hub.PruningPlan.from_keep(scap_hub.channel_groups(net, x), {"stem": [3]})
    small = scap_hub.apply_plan(net, plan).double()
    assert difference(small(x.double()), reference(net, plan, "readers")(x.double())) < TOLERANCE
    assert scap_hub.verify(net, plan, x) < TOLERANCE


def test_what_is_written_to_the_copy_of_a_single_channel_is_written_to_the_channel():
    groups = scap_hub.channel_groups(
        net := random_values(Contiguous(written=True)).eval(), x := torch.randn(1, 3, 8, 8)
    )
    assert scap_hub.verify(net, scap_hub.PruningPlan.from_keep(groups, {"stem": [3, 4]}), x) < TOLERANCE
    with pytest.raises(PlanError, match="would not compute the same"):
        scap_hub.PruningPlan.from_keep(groups, {"stem": [3]})
