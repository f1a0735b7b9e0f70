"""What the tests of small hard cases share: a network with a forward pass of one's own, and what is right of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import scap_hub
from tests.independent import TOLERANCE, copied, difference, double, leaves, plans, random_values, reference

Forward = Callable[[Any, Tensor], Any]


def each(cases: Iterable[str]) -> pytest.MarkDecorator:
    """Parametrises a test with the names of cases."""
    return pytest.mark.parametrize("name", list(cases))


def image(size: int = 8, dims: int = 2) -> Tensor:
    return torch.randn(2, 3, *[size] * dims, generator=torch.Generator().manual_seed(0))


class Body(nn.Module):
    """Three layers; a forward pass of one's own may stand for the usual one."""

    def __init__(self, forward: Forward | None = None, **layers: nn.Module | nn.Parameter | Tensor) -> None:
        super().__init__()
        self.own = (forward,)  # in a tuple, so that it is no method
        self.a, self.b, self.h = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 12, 1), nn.Linear(12, 5)
        for name, layer in layers.items():
            self.register_buffer(name, layer) if type(layer) is Tensor else setattr(self, name, layer)

    def forward(self, x):
        return self.own[0](self, x) if self.own[0] else self.head(self.b(self.a(x).relu()))

    def head(self, x):
        return self.h(x.relu().flatten(2).mean(2))


def pruned_exactly(
    net: nn.Module,
    *inputs: Tensor,
    readers: Mapping[str, int] | None = None,
    checks: tuple[str, ...] = ("readers", "all"),
    seed: int = 0,
    trains: bool = True,
) -> Any:
    """Prunes a network by several plans and asserts that every one is exact; returns the groups.

    Args:
        net: The network; gets random values.
        inputs: Its arguments.
        readers: Dimensions along which parameters read that belong to no convolution or linear layer.
        checks: The independent checks that apply, of `tests.independent`; none where something counts channels.
        seed: Of the plans.
        trains: Whether the network can be trained before it is pruned: writes in place may forbid it.
    """
    random_values(net).eval()
    groups = scap_hub.channel_groups(net, inputs)
    for kind, plan in plans(groups, seed, singles=3) if any(group.prunable for group in groups) else ():
        assert isinstance(plan, scap_hub.PruningPlan), f"{kind}: {plan!r}"
        small = scap_hub.apply_plan(copied(net).double(), plan).eval()
        with torch.no_grad():
            ours = small(*double(inputs))
            for check in checks:
                theirs = reference(net, plan, check, readers)(*double(inputs))
                assert difference(ours, theirs) < TOLERANCE, f"{kind} plan, {check}"
        assert scap_hub.verify(net, plan, inputs) < TOLERANCE, kind
        if trains:
            sum(x.square().sum() for x in leaves(small.train()(*double(inputs)))).backward()
    return groups


def free(groups: Any) -> set[str]:
    """Layers of which some channels can go."""
    return {name for group in groups if group.prunable for name in group.producers}


def some_plan(groups: Any, seed: int = 0) -> scap_hub.PruningPlan:
    return next(plan for kind, plan in plans(groups, seed) if kind == "uneven")
