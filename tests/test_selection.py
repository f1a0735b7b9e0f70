import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from scap_hub.channels import channel_groups
from scap_hub.channels.oracle import randomize, verify
from scap_hub.errors import TargetError
from scap_hub.scores import Scores
from scap_hub.selection.balanced import rows_to_lose
from scap_hub.selection.cluster import Cluster
from scap_hub.selection.select import kept_importance, select
from scap_hub.selection.target import Target
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
    partition = groups[0].whole.partition
    cost = {"macs": partition.macs, "params": partition.params}[kind]

    def stays(keep):
        kept = partition.everything()
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


class Branches(nn.Module):
    """Convolutions side by side on the same input; a channel costs the same in all of them."""

    def __init__(self, **widths):
        super().__init__()
        self.wide = nn.ModuleDict({name: nn.Conv2d(3, width, 1) for name, width in widths.items()})
        self.narrow = nn.ModuleDict({name: nn.Conv2d(width, 8, 1) for name, width in widths.items()})

    def forward(self, x):
        return sum(self.narrow[name](torch.relu(self.wide[name](x))) for name in self.wide)


def branches(**widths):
    groups = channel_groups(Branches(**widths), X)
    return [group for group in groups if group.prunable]


def numbers(plan, groups):
    """How many channels stay, by the last part of the group's name."""
    kept = {group.name: len(plan.kept(group.name)) if group.name in plan.groups else group.size for group in groups}
    return {name.rpartition(".")[2]: number for name, number in kept.items()}


def test_no_group_keeps_fewer_than_four_channels():
    groups = branches(a=16, b=32)
    scores = {group.name: torch.rand(group.size) for group in groups}
    assert numbers(select(groups, scores, "threshold=2", round_to=1), groups) == {"a": 4, "b": 4}
    assert numbers(select(groups, scores, "threshold=2", round_to=1, floor=0.0), groups) == {"a": 1, "b": 1}


def test_cost_aware_compares_what_one_channel_costs():
    groups = branches(a=16, b=128)
    # The same price a channel and the same scores: the same fraction stays, however many channels a group has.
    scores = {group.name: torch.linspace(1, 2, group.size) for group in groups}
    kept = numbers(select(groups, scores, "macs=0.5", round_to=1, scope="cost-aware"), groups)
    assert kept["a"] == pytest.approx(8, abs=1) and kept["b"] == pytest.approx(64, abs=2)


@pytest.mark.parametrize("better", ["a", "b"])
def test_what_is_left_of_a_budget_goes_to_the_best_channels_first(better):
    groups = branches(a=64, b=64)
    scores = {group.name: torch.rand(group.size) + (group.name.endswith(better)) for group in groups}
    # Two groups of 32 leave room for one more step of 8, not for two.
    kept = numbers(select(groups, scores, f"macs={72 / 128}", scope="uniform"), groups)
    assert kept == {**dict.fromkeys("ab", 32), better: 40}


@pytest.mark.parametrize("better", ["a", "b"])
def test_the_last_steps_go_to_the_best_channels_first(better):
    net = Branches(a=64, b=64, c=64)
    net.wide["c"] = nn.Conv2d(3, 64, 3, padding=1)
    groups = [group for group in channel_groups(net, X) if group.prunable]
    scores = {group.name: torch.ones(group.size) for group in groups}
    scores["wide.a"][:8] = scores["wide.b"][:8] = 2
    scores["wide.a"][8:] = scores["wide.b"][8:] = 0.5
    scores[f"wide.{better}"][8:] = 0.6
    # A channel costs 3 + 8 products, in c 27 + 8: after 8 channels of each, one step fits, but none of c.
    cheap, dear = 8 * (3 + 8), 8 * (27 + 8)
    budget = (3 * cheap + dear + 10) / (8 * (2 * cheap + dear))
    assert numbers(select(groups, scores, f"macs={budget}"), groups) == {"a": 8, "b": 8, "c": 8, better: 16}


@pytest.mark.parametrize("round_to", [1, 8, 16])
def test_rounding_never_drops_a_channel_that_reaches_the_threshold(groups, round_to):
    generator = torch.Generator().manual_seed(1)
    scores = {group.name: torch.rand(group.size, generator=generator) for group in groups if group.prunable}
    plan = select(groups, scores, "threshold=0.8", round_to)
    for name, values in scores.items():
        assert set(torch.nonzero(values >= 0.8).flatten().tolist()) <= set(plan.kept(name))
        assert len(plan.kept(name)) % round_to == 0 and len(plan.kept(name)) < (values >= 0.8).sum() + round_to


def test_no_balance_drops_a_channel_that_reaches_the_threshold():
    net = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1, groups=2), nn.Conv2d(16, 2, 1))
    groups = channel_groups(net, X)
    scores = {group.name: torch.rand(group.size) / 2 for group in groups if group.prunable}
    scores["0"][[0, 1, 2, 3, 4, 9]] += 0.5
    plan = select(groups, scores, "threshold=0.5", round_to=1)
    assert {0, 1, 2, 3, 4, 9} <= set(plan.kept("0")) and len(plan.kept("0")) == 10


def test_scores_carry_their_scope(groups, scores):
    carried = Scores(scores, scope="uniform")
    assert select(groups, carried) == select(groups, scores, scope="uniform") != select(groups, scores)
    assert select(groups, carried, scope="global") == select(groups, scores)


def test_equal_scores_keep_the_first_channels(groups, scores):
    equal = {name: torch.ones_like(values) for name, values in scores.items()}
    plan = select(groups, equal, "ratio=0.5", round_to=1)
    assert plan == select(groups, dict(reversed(equal.items())), "ratio=0.5", round_to=1)
    assert all(plan.kept(name) == list(range(values.numel() // 2)) for name, values in equal.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"expand": torch.rand(3)}, r"scores of 'expand' have shape \(3,\), its channels are 128"),
        (lambda s: s | {"expand": torch.rand(132)}, r"shape \(132,\), its channels are 128"),
        (lambda s: s | {"expand": torch.rand(2, 64)}, r"shape \(2, 64\)"),
        (lambda s: s | {"expand": torch.full((128,), torch.nan)}, "score 0 of 'expand' is nan: scores must be finite"),
        (lambda s: s | {"expand": -torch.log(torch.zeros(128))}, "score 0 of 'expand' is inf"),
        (lambda s: s | {"expand": "high"}, "scores of 'expand' are 'high'; give a tensor"),
        (lambda s: s | {"expnd": torch.rand(128)}, "scores name 'expnd', .* did you mean 'expand'"),
        (lambda s: {}, "no prunable channel group has scores"),
        (lambda s: torch.rand(8), "scores are Tensor; pass {group name: scores}"),
    ],
)
def test_scores_that_do_not_fit_are_refused(groups, scores, change, message):
    with pytest.raises(TargetError, match=message):
        select(groups, change(scores))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"round_to": 0}, "round_to is 0; give a whole number, 1 or more"),
        ({"round_to": 2.5}, "round_to is 2.5"),
        ({"round_to": True}, "round_to is True"),
        ({"floor": 1.5}, "floor is 1.5; give a fraction"),
        ({"floor": float("nan")}, "floor is nan"),
        ({"scope": "cost"}, "scope 'cost' is unknown.*; take one of global, cost-aware, uniform"),
        ({"scope": "globl"}, "did you mean 'global'"),
        ({"target": 0.5}, "target 0.5 is not understood; macs=0.5 keeps .*; write one of macs=0.5"),
        ({"target": None}, "target None is not understood; write one of"),
        ({"target": "macs=nan"}, "target macs is nan; give the fraction that stays"),
        ({"target": "threshold=inf"}, "target threshold is inf; give a number"),
        ({"target": {"expand": "half"}}, "target of 'expand' is 'half'; give the fraction that stays"),
        ({"target": {"expand": True}}, "target of 'expand' is True"),
        ({"target": {}}, "names no channel group"),
    ],
)
def test_options_that_cannot_be_are_refused(groups, scores, options, message):
    with pytest.raises(TargetError, match=message):
        select(groups, scores, **options)


def test_no_groups_is_an_error(scores):
    with pytest.raises(TargetError, match="no channel groups were given"):
        select([], scores)


@pytest.mark.parametrize("text", ["macs=0.5", "params=0.25", "latency=0.1", "ratio=1.0", "threshold=0.6"])
def test_a_target_is_read_back_from_what_it_prints(text):
    assert str(Target.of(text)) == text and Target.of(Target.of(text)) == Target.of(text)


def test_shares_of_a_target_multiply_to_it():
    assert Target.of("macs=0.25").share(1 / 2) == Target.of("macs=0.5")
    assert Target.of({"a": 0.25, "b": 1.0}).share(1 / 2) == Target.of({"a": 0.5, "b": 1.0})
    assert Target.of("threshold=0.6").share(1 / 2) == Target.of("threshold=0.6")


class Uneven(nn.Module):
    """Halves of a joined tensor are multiplied, and its thirds: two numbers of rows to choose."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(3, 12, 1)
        self.two = nn.Conv2d(24, 8, 1, groups=2)
        self.end = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.end(self.two(torch.cat([self.a(x), self.b(x), self.c(x)], 1)))


def cluster_of(net, rng):
    groups = [group for group in channel_groups(net, X) if group.prunable and group.constraint]
    balances = list(dict.fromkeys(balance for group in groups for balance in group.constraint))
    joined = [group for group in groups if any(balance in balances[:1] for balance in group.constraint)]
    scores = {group.name: rng.random(group.size) for group in joined}
    return Cluster.of(joined, balances[:1], scores), scores


@pytest.mark.parametrize("seed", range(8))
def test_the_balanced_choice_is_the_best_there_is(seed):
    rng = np.random.default_rng(seed)
    cluster, scores = cluster_of(Uneven(), rng)
    assert len(cluster.rows) > 1
    counts = {name: int(rng.integers(1, size + 1)) for name, size in cluster.sizes.items()}

    def rank(lost):
        kept = cluster.kept(np.array(lost))
        whole = sum(counts[name] < size == kept[name].size for name, size in cluster.sizes.items())
        away = sum(abs(kept[name].size - counts[name]) for name in counts)
        spread = {name: 0.01 + 0.99 * (own - own.min()) / np.ptp(own) for name, own in scores.items()}
        return whole, away, round(-sum(spread[name][own].sum() for name, own in kept.items()), 9)

    possible = [
        lost
        for lost in itertools.product(*(range(rows + 1) for rows in cluster.rows))
        if all(len(set((loss @ lost).tolist())) == 1 for loss in cluster.block_loss)
        and all(own.size for own in cluster.kept(np.array(lost)).values())
    ]
    assert len(possible) > 20
    assert rank(rows_to_lose(cluster, scores, counts, cluster.rows)) == min(map(rank, possible))


@pytest.mark.parametrize("make", [TwoGroupings, Uneven])
def test_a_solver_that_gives_up_leaves_a_balanced_choice(make, monkeypatch):
    monkeypatch.setattr("scap_hub.selection.balanced.milp", lambda **_: SimpleNamespace(x=None))
    net = randomize(make()).eval()
    groups = channel_groups(net, X)
    scores = {group.name: torch.rand(group.size) for group in groups if group.prunable}
    plan = select(groups, scores, "ratio=0.5", round_to=1, floor=0.0)
    assert plan == select(groups, scores, "ratio=0.5", round_to=1, floor=0.0)
    assert all(len(plan.kept(group.name)) == group.size // 2 for group in groups if group.prunable)
    assert verify(net, plan, X) < 1e-12
