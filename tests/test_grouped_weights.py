"""Grouped convolutions with a weight that is computed from their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import scap_hub
from tests.independent import TOLERANCE, difference, random_values, reference


class Computed(nn.Conv2d):
    """A grouped convolution that reads what `made` makes of its weight."""

    made: Any = staticmethod(lambda weight: weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.made(self.weight), self.bias, padding=1, groups=self.groups)


def standardised(weight: Tensor) -> Tensor:
    return F.batch_norm(weight.reshape(1, weight.shape[0], -1), None, None, training=True).reshape_as(weight)


IN_PLACE = {"standardised": standardised, "scaled": lambda weight: weight * 2, "clipped": lambda w: w.clamp(-0.1, 0.1)}
MOVED = {
    "rows": lambda weight: weight.flip(0),
    "columns": lambda weight: weight.flip(1),
    "blocks": lambda weight: torch.cat(weight.chunk(2)[::-1]),
    "every other": lambda weight: weight.view(6, 2, *weight.shape[1:]).transpose(0, 1).reshape(weight.shape),
    "interleaved": lambda weight: weight.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1),
    "strided": lambda weight: torch.cat([weight[::2], weight[1::2]]),
    "fixed order": lambda weight: weight[[0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11]],
    "mixed": lambda weight: weight + weight.flip(0),
}


def network(made: Any) -> tuple[nn.Module, scap_hub.channels.groups.ChannelGroups, Tensor]:
    layer = Computed(12, 12, 3, groups=2)
    layer.made = made
    net, x = nn.Sequential(nn.Conv2d(3, 12, 1), layer, nn.Conv2d(12, 5, 1)), torch.randn(1, 3, 8, 8)
    net = random_values(net).eval()
    return net, scap_hub.channel_groups(net, x), x


def check(net: nn.Module, groups: Any, x: Tensor) -> None:
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        scores = {group.name: torch.rand(group.size, generator=generator) for group in groups.prunable}
        plan = scap_hub.select(groups, scores, "ratio=0.5", round_to=1)
        assert scap_hub.verify(net, plan, x) < TOLERANCE
        if net[1].made is not standardised:  # which is defined over the columns that stay
            small, x64 = scap_hub.apply_plan(net, plan).double(), x.double()
            assert difference(small(x64), reference(net, plan, "all")(x64)) < TOLERANCE


@pytest.mark.parametrize("name", IN_PLACE)
def test_columns_that_stay_in_place_can_go(name):
    net, groups, x = network(IN_PLACE[name])
    assert len(groups.prunable) == len(groups) - 1
    check(net, groups, x)


@pytest.mark.parametrize("name", MOVED)
def test_columns_that_move_are_exact_or_held(name):
    net, groups, x = network(MOVED[name])
    if groups.prunable:
        check(net, groups, x)
