"""The oracle must see a fault of every rule family, and of the surgery."""

import contextlib
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from scap_hub import errors
from scap_hub.channels import channel_groups, memory
from scap_hub.channels.labels import Labels
from scap_hub.channels.operators import table as registry
from scap_hub.channels.oracle import compare, randomize, verify
from scap_hub.plan import PruningPlan
from tests.nets import Residual, random_plan
from tests.test_channel_algebra import Net


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def precision(request, monkeypatch):
    """What models are compared in: float32 where there is no memory for more."""
    if request.param == torch.float32:
        monkeypatch.setattr(memory, "free", lambda device: 0)
    return request.param


def rolled(array, axis):
    """Every label one channel further; the proof of a plan sees that, as pruning changes which the last one is."""
    return np.roll(array, 1, axis)


def reversed_(array, axis):
    """The labels in the opposite order; pruning keeps that, so it takes values to see it."""
    return np.flip(array, axis)


def mislabelled(rule, fault):
    """The rule with its output's labels moved along their longest dimension."""

    def moved(labels):
        return Labels(labels.shape, tuple(fault(array, int(np.argmax(array.shape))) for array in labels.arrays))

    def faulty(call):
        labels = rule(call)
        return moved(labels) if isinstance(labels, Labels) else [moved(part) for part in labels]

    return faulty


def is_seen(net, x, planted):
    """Whether a fault costs groups, or makes plans that are refused or that `verify` calls wrong."""
    free = {group.name for group in channel_groups(net, x).prunable}
    with planted:
        groups = channel_groups(net, x)
        if {group.name for group in groups.prunable} != free:
            return True
        try:
            plan = random_plan(groups, 1, ratio=0.5)
        except errors.PlanError:
            return True
    try:
        verify(net, plan, x)
    except errors.VerificationError:
        return True
    return False


@pytest.mark.parametrize("fault", [rolled, reversed_])
@pytest.mark.parametrize(
    "op, blocks",
    [
        ("relu", ["conv"]),
        ("conv2d", ["conv"]),
        ("linear", ["channels_last"]),
        ("batch_norm", ["conv"]),
        ("layer_norm", ["channels_last"]),
        ("group_norm", ["group_norm"]),
        ("mean", ["conv"]),
        ("avg_pool2d", ["pool"]),
        ("permute", ["channels_last"]),
        ("view", ["shuffle"]),
        ("chunk", ["halves"]),
        ("cat", ["dense"]),
        ("add", ["residual"]),
        ("im2col", ["windows"]),
        ("col2im", ["windows"]),
    ],
)
def test_a_shifted_channel_in_any_rule_is_seen(op, blocks, fault, precision):
    net = randomize(Net([*blocks, "conv"], flatten=False)).eval()
    known, x = registry._OPERATORS[op], torch.randn(1, 3, 6, 6)
    faulty = replace(known, rule=mislabelled(known.rule, fault))
    assert not is_seen(net, x, contextlib.nullcontext())
    assert is_seen(net, x, mock.patch.dict(registry._OPERATORS, {op: faulty}))


def test_uncoupled_channel_shuffle_is_seen():
    from scap_hub.channels.operators import view

    def balanced_only(call, array, runs):
        call.ledger.balance(list(array.reshape(2, -1)), "equal counts, which a permutation makes wrong")
        return array

    net = randomize(Net(["shuffle", "conv"], flatten=False)).eval()
    assert is_seen(net, torch.randn(1, 3, 6, 6), mock.patch.object(view, "_couple_rows", balanced_only))


def test_swapped_index_in_the_surgery_is_seen(precision):
    net = randomize(Residual()).eval()
    x = torch.randn(1, 3, 8, 8)
    plan = random_plan(channel_groups(net, x), 0, ratio=0.5)
    document = plan.model_dump()
    cut = document["tensors"]["project.weight"]
    kept = plan.indices(cut["keep"][1])
    other = next(i for i in range(16) if i not in kept)
    shifted = sorted([other, *kept[1:]])
    document["keeps"] = (*document["keeps"], ",".join(map(str, shifted)))
    cut["keep"][1] = len(document["keeps"]) - 1
    with pytest.raises(errors.VerificationError, match="the plan is wrong"):
        verify(net, PruningPlan.model_validate(document), x)


def test_verify_returns_rounding_only_and_leaves_the_model_alone():
    net = randomize(Residual()).train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    plan = random_plan(channel_groups(net, torch.randn(1, 3, 8, 8)), 0)
    assert verify(net, plan, (torch.randn(2, 3, 8, 8),)) < 1e-12
    assert net.training and next(net.parameters()).dtype == torch.float32
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("seed", range(4))
def test_what_does_not_fit_into_memory_is_compared_in_float32_by_what_rounding_does(seed, precision):
    net, x = randomize(Residual(), seed).eval(), torch.randn(2, 3, 8, 8)
    found = compare(net, random_plan(channel_groups(net, x), seed), x)
    assert found.dtype == precision and found.difference <= found.allowed
    assert found.allowed < (1e-8 if precision == torch.float64 else 1e-5)


def test_a_model_that_blows_up_rounding_is_not_compared_in_float32(monkeypatch):
    class Chaotic(nn.Module):
        def __init__(self):
            super().__init__()
            # So wide that sums without the removed channels are made in another order on every machine.
            self.a, self.b = nn.Conv2d(3, 256, 1), nn.Conv2d(256, 8, 1)

        def forward(self, x):
            return torch.sin(1e7 * self.b(self.a(x)))

    net, x = randomize(Chaotic()).eval(), torch.randn(2, 3, 8, 8)
    plan = random_plan(channel_groups(net, x), 0)
    monkeypatch.setattr(memory, "free", lambda device: 0)
    with pytest.raises(errors.UnverifiableError, match="rounding alone"):
        verify(net, plan, x)


def test_memory_is_asked_for_by_the_size_of_the_model_and_its_activations(monkeypatch):
    net, small, large = Residual().eval(), torch.randn(1, 3, 8, 8), torch.randn(1, 3, 32, 32)
    asked = [memory.needed(net, (x,), torch.float64) for x in (small, large)]
    weights = 8 * sum(tensor.numel() for tensor in (*net.parameters(), *net.buffers()))
    assert 3 * weights < asked[0] < asked[1] and asked[1] == 2 * memory.needed(net, (large,), torch.float32)
    plan = random_plan(channel_groups(net, large), 0)
    monkeypatch.setattr(memory, "free", lambda device: (asked[0] + asked[1]) / 2)
    assert [compare(net, plan, x).dtype for x in (small, large)] == [torch.float64, torch.float32]


def test_unknown_operator_pins_and_says_so():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 2)

        def forward(self, x):
            y = torch.fft.fft(self.a(x), dim=1).real
            return self.c(self.b(y).mean((2, 3)))

    groups = {group.name: group for group in channel_groups(Odd(), torch.randn(1, 3, 4, 4))}
    assert not groups["a"].prunable and "fft" in groups["a"].pinned_because
    assert groups["b"].prunable
    assert not groups["c"].prunable and "output of the model" in groups["c"].pinned_because


def test_a_model_that_cannot_be_captured_names_its_module():
    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    net = nn.Sequential(nn.Conv2d(3, 4, 1), Branch())
    with pytest.raises(
        errors.ModelError, match=r"module '1' at aten.is_nonzero.default: it looks at the value .* prune"
    ):
        channel_groups(net, torch.randn(1, 3, 4, 4))


def test_values_of_the_model_itself_may_be_looked_at():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.scale = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Parameter(torch.ones(1))

        def forward(self, x):
            return self.b(self.a(x) * self.scale.item()).mean((2, 3)) * torch.linspace(0, 1, 4)

    model, x = Scaled(), torch.randn(1, 3, 4, 4)
    groups = channel_groups(model, x)
    assert [group.name for group in groups if group.prunable] == ["a"]
    assert verify(model, random_plan(groups, seed=0, ratio=0.5), x) < 1e-9
