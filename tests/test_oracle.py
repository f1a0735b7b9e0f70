"""The oracle must see a fault of every rule family, and of the surgery."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from scap_hub import errors
from scap_hub.channels import channel_groups
from scap_hub.channels.labels import Labels
from scap_hub.channels.operators import table as registry
from scap_hub.channels.oracle import randomize, verify
from scap_hub.plan import PruningPlan
from tests.nets import Residual, random_plan
from tests.test_channel_algebra import Net


def rolled(rule):
    """The rule with its output's ids shifted by one channel."""

    def shift(ids):
        return Labels(ids.shape, tuple(np.roll(array, 1, int(np.argmax(array.shape))) for array in ids.arrays))

    def faulty(call):
        ids = rule(call)
        return shift(ids) if isinstance(ids, Labels) else [shift(part) for part in ids]

    return faulty


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
def test_a_shifted_channel_in_any_rule_is_seen(op, blocks, monkeypatch):
    net = randomize(Net([*blocks, "conv"], flatten=False)).eval()
    x = torch.randn(1, 3, 6, 6)
    with monkeypatch.context() as patch:
        known = registry._OPERATORS[op]
        patch.setitem(registry._OPERATORS, op, replace(known, rule=rolled(known.rule)))
        groups = channel_groups(net, x)
        plan = random_plan(groups, 1, ratio=0.5)
    with pytest.raises(errors.VerificationError):
        verify(net, plan, x)


def test_uncoupled_channel_shuffle_is_seen(monkeypatch):
    from scap_hub.channels.operators import view

    def balanced_only(call, array, runs):
        call.ledger.balance(list(array.reshape(2, -1)), "equal counts, which a permutation makes wrong")
        return array

    net = randomize(Net(["shuffle", "conv"], flatten=False)).eval()
    x = torch.randn(1, 3, 6, 6)
    monkeypatch.setattr(view, "_couple_rows", balanced_only)
    with pytest.raises(errors.VerificationError):
        verify(net, random_plan(channel_groups(net, x), 0), x)


def test_swapped_index_in_the_surgery_is_seen():
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
    with pytest.raises(errors.VerificationError, match="differs from the masked one"):
        verify(net, PruningPlan.model_validate(document), x)


def test_verify_returns_rounding_only_and_leaves_the_model_alone():
    net = randomize(Residual()).train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    plan = random_plan(channel_groups(net, torch.randn(1, 3, 8, 8)), 0)
    assert verify(net, plan, (torch.randn(2, 3, 8, 8),)) < 1e-12
    assert net.training and next(net.parameters()).dtype == torch.float32
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


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
