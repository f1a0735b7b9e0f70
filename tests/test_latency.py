"""Layer times and latency budgets, on a clock that counts operations."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

import scap_hub
from scap_hub.channels import channel_groups
from scap_hub.channels.oracle import randomize
from scap_hub.errors import TargetError
from scap_hub.selection.latency import select_latency
from scap_hub.selection.select import select
from scap_hub.surgery import apply_plan
from scap_hub.timing.clock import milliseconds
from scap_hub.timing.table import latency_table
from tests.nets import Clock, Residual, tiny_net

X = torch.randn(2, 3, 32, 32)


def staying(groups, plan):
    stays = groups[0].whole.partition.everything()
    for group in groups:
        if group.name in plan.groups:
            stays[np.delete(group.channels, plan.kept(group.name))] = False
    return stays


def random_scores(groups):
    return {group.name: torch.rand(group.size) for group in groups if group.prunable}


class Joined(nn.Module):
    """Grouped and transposed convolutions, a layer norm over channels and a group norm."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 32, 3, padding=1), nn.GroupNorm(4, 32)
        self.grouped, self.act = nn.Conv2d(32, 64, 3, padding=1, groups=4), nn.GELU()
        self.up, self.last = nn.ConvTranspose2d(64, 24, 2, stride=2), timm.layers.LayerNorm2d(24)
        self.bands, self.joined = nn.Conv2d(24, 96, 2, 2, groups=24), nn.ConvTranspose2d(96, 24, 2, 2, groups=24)
        self.token, self.head = nn.Linear(24, 40), nn.Linear(40, 5)

    def forward(self, x):
        x = self.last(self.up(self.act(self.grouped(self.norm(self.stem(x))))))
        x = self.joined(self.bands(x).relu())
        return self.head(self.token(x.permute(0, 2, 3, 1)).mean((1, 2)))


NETS = {
    "residual": lambda: Residual(width=32),
    "joined": Joined,
    "resnet": lambda: timm.create_model("test_resnet", num_classes=5),
    "convnext": lambda: timm.create_model("test_convnext", num_classes=5),
    "efficientnet": lambda: timm.create_model("test_efficientnet", num_classes=5),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("ratio", [0.75, 0.4])
def test_the_table_predicts_the_pruned_models_time(name, ratio):
    net = NETS[name]().eval()
    state = {key: value.clone() for key, value in net.state_dict().items()}
    groups = channel_groups(net, X)
    clock = Clock(call=0.01, rest=3.0)
    table = latency_table(net, groups, X, clock)
    plan = select(groups, random_scores(groups), f"ratio={ratio}", round_to=1)
    assert table.ms(staying(groups, plan)) == pytest.approx(clock([(apply_plan(net, plan), X)])[0], rel=1e-3)
    assert all(torch.equal(state[key], value) for key, value in net.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_equal_layers_are_measured_once():
    torch.manual_seed(0)
    same = [nn.Conv2d(16, 16, 3, padding=1) for _ in range(3)]
    net = nn.Sequential(nn.Conv2d(3, 16, 1), *same, nn.Conv2d(16, 4, 1)).eval()
    clock = Clock()
    table = latency_table(net, channel_groups(net, X), X, clock)
    layers = [shape for module, shape in clock.asked if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)]
    assert len(table.entries) == 5 and len(layers) == 4 * 4, "four widths in, four out, for all three"
    assert (2, 16, 32, 32) in layers and (2, 4, 32, 32) in layers


@pytest.mark.parametrize(("alone", "scale", "rest"), [(1.0, 1.0, 2.0), (4.0, 0.25, 0.0)])
def test_the_table_agrees_with_the_whole_model(alone, scale, rest):
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)).eval()
    groups = channel_groups(net, X)
    clock = Clock(rest=0.0 if alone > 1 else 2.0, alone=alone)
    table = latency_table(net, groups, X, clock)
    assert table.ms(groups[0].whole.partition.everything()) == pytest.approx(clock([(net, X)])[0])
    assert (table.scale, table.rest) == (pytest.approx(scale), pytest.approx(rest)), "layers alone may be slower"


@pytest.mark.parametrize("fraction", [0.6, 0.8])
@pytest.mark.parametrize("scope", ["global", "cost-aware", "uniform"])
def test_a_latency_budget_is_met_on_the_measured_model(fraction, scope):
    net = Residual(width=64).eval()
    groups = channel_groups(net, X)
    # Layers alone take twice as long as in the model, and the model has 2 ms of its own: the table must be corrected.
    clock = Clock(call=0.05, rest=2.0, alone=2.0)
    scores = random_scores(groups)
    choice = select_latency(net, groups, scores, fraction, X, 1, scope=scope, timer=clock)
    dense, small = clock([(net, X), (apply_plan(net, choice.plan), X)])
    assert choice.met == (abs(choice.share / fraction - 1) <= 0.01)
    assert small / dense == pytest.approx(choice.share) and abs(choice.share / fraction - 1) < 0.02
    again = select(groups, scores, choice.target, 1, scope=scope, latency=choice.table)
    assert again == choice.plan


def test_a_missed_latency_budget_is_said():
    net = Residual(width=32).eval()
    groups = channel_groups(net, X)
    with pytest.warns(UserWarning, match=r"latency=0\.7 is missed: the nearest plan that was found takes 0\.\d+"):
        choice = select_latency(net, groups, random_scores(groups), 0.7, X, 32, floor=0.0, timer=Clock())
    assert not choice.met and choice.miss == pytest.approx(abs(choice.share / 0.7 - 1)) and choice.miss > 0.01


def test_an_impossible_latency_says_what_is_possible():
    net = Residual(width=32).eval()
    groups = channel_groups(net, X)
    clock = Clock(rest=100.0)
    with pytest.raises(TargetError, match=r"latency=0\.5 cannot be reached: .* (0\.\d+) of the latency stay") as error:
        select_latency(net, groups, random_scores(groups), 0.5, X, timer=clock)
    possible = float(str(error.value).split(" of the latency")[0].split()[-1])
    assert 0.9 < possible < 1


class Disturbed(Clock):
    """The narrower a layer, the longer it takes."""

    def __call__(self, calls, **_):
        return [1.0 for _ in calls] if len(calls) < 3 else list(range(1, len(calls) + 1))


def test_noise_never_makes_a_narrower_layer_slower():
    net = Residual(width=32).eval()
    groups = channel_groups(net, X)
    table = latency_table(net, groups, X, Disturbed())
    for entry in table.entries:
        assert (np.diff(entry.times.ms, axis=0) >= 0).all() and (np.diff(entry.times.ms, axis=1) >= 0).all()


def test_select_asks_for_the_table():
    net = Residual(width=32).eval()
    groups = channel_groups(net, X)
    with pytest.raises(TargetError, match="pass latency="):
        select(groups, random_scores(groups), "latency=0.5")
    table = scap_hub.latency_table(net, groups, X, Clock())
    plan = scap_hub.select(groups, random_scores(groups), "latency=0.5", round_to=1, latency=table)
    everything = groups[0].whole.partition.everything()
    assert 0.47 < table.ms(staying(groups, plan)) / table.ms(everything) <= 0.5


def test_prune_meets_a_latency_budget_and_reports_it(monkeypatch):
    monkeypatch.setattr("scap_hub.selection.latency.milliseconds", Clock(rest=0.2))
    monkeypatch.setattr("scap_hub.timing.table.milliseconds", Clock(rest=0.2))
    report = scap_hub.prune(
        randomize(tiny_net()).float(), "digits", "quick", target="latency=0.7", criterion="l1", schedule_steps=2,
        round_to=1, target_batch_size=2, finetune_epochs=0, model_input_size=(1, 8, 8), data_calibration_images=32,
    ).report  # fmt: skip
    assert [selection.latency for selection in report.selections] == pytest.approx([0.7**0.5, 0.7], rel=0.05)
    assert all(selection.met == (abs(selection.latency / asked - 1) <= 0.01)
               for selection, asked in zip(report.selections, [0.7**0.5, 0.7], strict=True))  # fmt: skip
    assert report.after.latency_ms is None and report.after.macs < report.before.macs


def test_times_are_positive_and_modules_keep_their_mode():
    net = tiny_net().train()
    times = milliseconds([(net, torch.randn(1, 1, 8, 8)), (net, torch.randn(64, 1, 8, 8))], seconds=0.01)
    assert 0 < times[0] < times[1] and all(module.training for module in net.modules())
