import numpy as np
import pytest
import torch
from torch import nn

from scap_hub.channels import channel_groups
from scap_hub.channels.oracle import randomize, verify
from scap_hub.errors import TargetError
from scap_hub.selection.select import kept_importance, select
from scap_hub.surgery import apply_plan
from tests.nets import Residual

X = torch.randn(1, 3, 16, 16)


@pytest.fixture(scope="module")
def net():
    return randomize(Residual(width=64)).eval()


@pytest.fixture(scope="module")
def groups(net):
    return channel_groups(net, X)


@pytest.fixture(scope="module")
def scores(groups):
    generator = torch.Generator().manual_seed(0)
    return {group.name: torch.rand(group.size, generator=generator) for group in groups if group.prunable}


def macs(model):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(X)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("scope", ["global", "cost-aware", "uniform"])
@pytest.mark.parametrize("budget", [0.3, 0.5, 0.8])
def test_macs_budget_is_met_on_the_pruned_model(net, groups, scores, budget, scope):
    plan = select(groups, scores, f"macs={budget}", round_to=1, scope=scope)
    assert budget - 0.02 < macs(apply_plan(net, plan)) / macs(net) <= budget


@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize("budget", [0.3, 0.5, 0.7])
def test_a_rounded_budget_is_met_within_a_hundredth_or_one_step(groups, scores, kind, budget):
    plan = select(groups, scores, f"{kind}={budget}")
    space = groups[0].space
    cost = {"macs": space.macs, "params": space.params}[kind]

    def stays(keep):
        kept = np.ones(space.count, dtype=bool)
        for group in groups:
            if group.name in keep:
                kept[np.delete(group.channels, keep[group.name])] = False
        return kept

    keep = {name: plan.kept(name) for name in plan.groups}
    whole, spent = cost(stays({})), cost(stays(keep))
    assert spent <= budget * whole
    if spent < 0.99 * budget * whole:
        for name in keep:
            size = next(group.size for group in groups if group.name == name)
            more = keep | {name: sorted({*keep[name], *[c for c in range(size) if c not in keep[name]][:8]})}
            assert cost(stays(more)) > budget * whole, name


def test_params_budget_is_met(net, groups, scores):
    small = apply_plan(net, select(groups, scores, "params=0.4", round_to=1))
    share = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in net.parameters())
    assert 0.38 < share <= 0.4


def test_cost_aware_takes_the_channels_that_cost_most():
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.MaxPool2d(8), nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 4, 1)
    )
    groups = channel_groups(net, X)
    scores = {name: 1 + torch.arange(32.0) for name in ("0", "2")}
    plans = {scope: select(groups, scores, "macs=0.6", round_to=1, scope=scope) for scope in ("global", "cost-aware")}
    assert len(plans["cost-aware"].kept("0")) < len(plans["global"].kept("0"))
    kept = {scope: len(plan.kept("2")) if "2" in plan.groups else 32 for scope, plan in plans.items()}
    assert kept["cost-aware"] > kept["global"]
    assert plans["cost-aware"].kept("0") == list(range(32 - len(plans["cost-aware"].kept("0")), 32)), "the best stay"


def test_kept_importance():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1))
    groups = channel_groups(net, X)
    scores = {"0": torch.tensor([4.0, 3, 2, 1, 0, 0, 0, 0]), "1": torch.ones(8)}
    assert kept_importance(select(groups, scores, {"0": 0.5}, round_to=1), scores) == 1
    assert kept_importance(select(groups, scores, {"1": 0.5}, round_to=1), scores) == pytest.approx(14 / 18)


def test_ratio_keeps_the_best_half(groups, scores):
    plan = select(groups, scores, "ratio=0.5")
    for group in groups:
        if group.prunable:
            best = torch.sort(torch.topk(scores[group.name], group.size // 2).indices).values
            assert plan.kept(group.name) == best.tolist()


def test_fractions_touch_only_the_named_groups(groups, scores):
    plan = select(groups, scores, {"expand": 0.25})
    assert list(plan.groups) == ["expand"] and len(plan.kept("expand")) == 32


def test_threshold_keeps_what_reaches_it_down_to_the_floor(groups, scores):
    plan = select(groups, scores, "threshold=0.6", round_to=1)
    for name, values in scores.items():
        assert set(plan.kept(name)) == set(torch.nonzero(values >= 0.6).flatten().tolist())
    nearly_nothing = select(groups, scores, "threshold=2", round_to=1)
    assert all(len(nearly_nothing.kept(name)) == max(4, int(np.ceil(0.05 * v.numel()))) for name, v in scores.items())


@pytest.mark.parametrize("round_to", [1, 4, 8, 16])
def test_counts_are_rounded(groups, scores, round_to):
    plan = select(groups, scores, "macs=0.5", round_to=round_to)
    assert all(len(plan.kept(name)) % round_to == 0 for name in plan.groups)


class TwoGroupings(nn.Module):
    """One set of channels read in 2 groups and in 4 groups: two balances on the same channels, and across convs."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(3, 16, 1)
        self.two, self.four = nn.Conv2d(32, 32, 1, groups=2), nn.Conv2d(32, 32, 1, groups=4)
        self.end = nn.Conv2d(32, 4, 1)

    def forward(self, x):
        y = torch.cat([self.a(x), self.b(x)], 1)
        return self.end(self.two(y) + self.four(y))


@pytest.mark.parametrize("seed", range(5))
def test_groups_that_share_a_balance_are_chosen_together(seed):
    net = randomize(TwoGroupings()).eval()
    groups = channel_groups(net, X)
    rng = np.random.default_rng(seed)
    scores = {group.name: torch.from_numpy(rng.random(group.size)) for group in groups if group.prunable}
    plan = select(groups, scores, {name: float(rng.uniform(0.3, 0.8)) for name in scores}, round_to=1, floor=0.0)
    assert set(plan.groups) == set(scores), "no group is dropped"
    assert len(plan.kept("a")) == len(plan.kept("b"))
    assert verify(net, plan, X) < 1e-12


def test_balanced_choice_takes_the_best_of_each_block():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 2, 1))
    groups = channel_groups(net, X)
    scores = {"0": torch.tensor([8.0, 7, 6, 5, 1, 2, 3, 4]), "1": torch.arange(8.0)}
    plan = select(groups, scores, "ratio=0.5", round_to=1, floor=0.0)
    assert plan.kept("0") == [0, 1, 6, 7] and plan.kept("1") == [2, 3, 6, 7]


@pytest.mark.parametrize(
    "target, message",
    [
        ("macs=0.001", r"cannot be reached: .* 0\.\d+ of the macs stay"),
        ("macs=1.5", "above 0 and at most 1"),
        ("speed=0.5", "write one of macs=0.5"),
        ("half", "is not understood"),
        ({"expnd": 0.5}, "did you mean 'expand'"),
        ({"expand": 0.0}, "above 0"),
    ],
)
def test_impossible_targets_say_what_is_possible(groups, scores, target, message):
    with pytest.raises(TargetError, match=message):
        select(groups, scores, target)


def test_nothing_prunable_is_an_error():
    net = nn.Sequential(nn.Conv2d(3, 4, 1))
    groups = channel_groups(net, X)
    with pytest.raises(TargetError, match="nothing can be pruned"):
        select(groups, {}, "macs=0.5")
