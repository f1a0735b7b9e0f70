"""What the analysis runs: training mode only where it differs, and the same code with other calls in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import scap_hub
from scap_hub.channels.repeats import matched
from scap_hub.graph.record import capture
from tests.independent import TOLERANCE, difference, random_values, reference


class Branches(nn.Module):
    """Convolution, norm and dropout, and what `change` makes of a training step's features."""

    def __init__(self, change: Any = None) -> None:
        super().__init__()
        self.change = change
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.a(x)).relu()
        if self.training and self.change:
            y = self.change(y)
        return self.drop(self.b(y))


def recorded(net: nn.Module) -> tuple[Any, Any]:
    x = torch.zeros(2, 3, 4, 4)
    return capture(net, (x,), training=True), capture(net, (x,))


def test_norms_and_dropout_repeat_the_pass():
    training, evaluated = recorded(Branches())
    same = matched(training, evaluated)
    assert same is not None and len(training.called) > len(evaluated.called)
    assert [same[node] for node in training.outputs] == evaluated.outputs
    assert all(own.target is other.target for own, other in same.items())


CHANGES = {
    "another number": lambda y: y.roll(1, 2),
    "one operator more": lambda y: y * 1.0,
    "part": lambda y: torch.cat([y[:, :4], y[:, 4:]], 1),
    "a constant": lambda y: y + torch.ones(y.shape[1], 1, 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_other_step_does_not(change):
    assert matched(*recorded(Branches(CHANGES[change]))) is None


def test_the_same_operators_with_other_numbers_or_tensors_do_not():
    class Mode(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            y, z = self.a(x), self.b(x)
            if self.how == "order":
                return y - z if self.training else z - y
            if self.how == "number":
                return (y + z).softmax(2 if self.training else 3)
            return (y, z)[self.training]

    for how in ("order", "number", "output"):
        net = Mode()
        net.how = how
        assert matched(*recorded(net)) is None, how


class Views(nn.Module):
    """The same code calls `view` with five sizes or with two."""

    def __init__(self, folded: bool) -> None:
        super().__init__()
        self.folded, self.layer = folded, nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return x.view(1, 2, 8, 4, 4).transpose(1, 2).reshape(x.shape) if self.folded else x.view(1, -1)


def test_calls_with_fewer_numbers_elsewhere():
    net = nn.Sequential(nn.Conv2d(3, 16, 1), Views(True), Views(False), nn.Linear(256, 5))
    net, x = random_values(net).eval(), torch.randn(1, 3, 4, 4)
    groups = scap_hub.channel_groups(net, x)
    plan = scap_hub.select(groups, {group.name: torch.rand(group.size) for group in groups.prunable}, "ratio=0.5")
    assert "1" in plan.calls
    small = scap_hub.apply_plan(net, plan).double()
    assert difference(small(x.double()), reference(net, plan, "readers")(x.double())) < TOLERANCE


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, 1:3],
        lambda x: x.select(1, 2),
        lambda x: x.view(2, 4, 2, 3),
        lambda x: x.flatten(1).unsqueeze(0).expand(3, -1, -1),
        lambda x: x.transpose(1, 2).reshape(2, 6, 4),
        lambda x: x.as_strided((2, 2), (3, 1), 30),
        lambda x: x.contiguous(),
    ],
)
def test_a_view_that_was_made_before_shows_the_memory_of_its_own_tensor(view):
    class Twice(nn.Module):
        def forward(self, x):
            one, other = x[:, :4], x[:, 4:]
            return x, view(one), view(other), view(one.clone()), view(other)

    x = torch.zeros(2, 8, 6)
    recorded = capture(Twice(), (x.to("meta"),)).outputs
    for ours, theirs in zip(recorded, Twice()(x), strict=True):
        shows = ours.value.untyped_storage()._cdata == recorded[0].value.untyped_storage()._cdata
        assert shows == (theirs.untyped_storage().data_ptr() == x.untyped_storage().data_ptr())
        assert (ours.value.shape, ours.value.stride()) == (theirs.shape, theirs.stride())
        assert ours.value.storage_offset() == theirs.storage_offset()
