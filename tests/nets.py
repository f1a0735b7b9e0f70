"""Small networks and plans that several tests share."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from scap_hub.channels.groups import ChannelGroup
from scap_hub.plan import PruningPlan
from scap_hub.selection.select import select


def random_plan(groups: list[ChannelGroup], seed: int, ratio: float | None = None) -> PruningPlan:
    """Random scores; `ratio` of each prunable group, or a random fraction of each."""
    rng = np.random.default_rng(seed)
    scores = {group.name: torch.from_numpy(rng.random(group.size)) for group in groups if group.prunable}
    fractions = {name: ratio or float(rng.uniform(0.2, 0.85)) for name in scores}
    return select(groups, scores, fractions, round_to=1, floor=0.0)


class Residual(nn.Module):
    """Two stages with a residual, squeeze and excitation, a depthwise convolution and a classifier."""

    def __init__(self, width: int = 8, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.expand = nn.Conv2d(width, 2 * width, 1)
        self.bn_expand = nn.BatchNorm2d(2 * width)
        self.depthwise = nn.Conv2d(2 * width, 2 * width, 3, padding=1, stride=2, groups=2 * width)
        self.gate = nn.Conv2d(2 * width, 2 * width, 1)
        self.project = nn.Conv2d(2 * width, width, 1, bias=False)
        self.skip = nn.Conv2d(width, width, 1, stride=2)
        self.act = nn.ReLU()
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        x = self.act(self.bn(self.stem(x)))
        y = self.act(self.bn_expand(self.expand(x)))
        y = self.act(self.depthwise(y))
        y = y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        y = self.project(y) + self.skip(x)
        return self.head(y.mean((2, 3)))


def tiny_net(seed: int = 0) -> nn.Sequential:
    """Reaches 95 % on the digits in a second."""
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.1), nn.Linear(128, 10)),
    )


class Clock:
    """A device that takes a millisecond for a million products, and `call` milliseconds for each call of a layer."""

    def __init__(self, call=0.0, rest=0.0, alone=1.0):
        self.call, self.rest, self.alone, self.asked = call, rest, alone, []

    def __call__(self, calls, **_):
        times = []
        for module, x in calls:
            self.asked.append((module, tuple(x.shape)))
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                module(x)
            leaves = [own for own in module.modules() if isinstance(own, nn.Conv2d | nn.Linear)]
            ms = counter.get_total_flops() / 2e6 + self.call * len(leaves)
            times.append(ms + self.rest if len(leaves) > 1 else ms * self.alone)
        return times
