"""Budgets and widths for where the model will run."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import scap_hub
from scap_hub.channels import channel_groups
from scap_hub.deploy import widths
from scap_hub.deploy.opened import opened
from scap_hub.errors import ScapHubError
from scap_hub.selection.latency import select_latency
from scap_hub.surgery import apply_plan
from scap_hub.timing.clock import milliseconds
from tests.nets import Clock, Residual

X = torch.randn(1, 3, 32, 32)


class Elsewhere(nn.Module):
    """A model in a runtime that takes 5 ms for anything beside what the device takes."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


def test_a_budget_is_met_where_the_model_will_run():
    net = Residual(width=64).eval()
    groups = channel_groups(net, X)
    scores = {group.name: torch.rand(group.size) for group in groups if group.prunable}
    here = Clock()

    def clock(calls, **_):
        return [ms + 5 * isinstance(net, Elsewhere) for ms, (net, _) in zip(here(calls), calls, strict=True)]

    choice = select_latency(net, groups, scores, 0.7, X, 1, timer=clock, built=Elsewhere)
    dense, small = clock([(Elsewhere(net), X), (Elsewhere(apply_plan(net, choice.plan)), X)])
    assert small / dense == pytest.approx(choice.share) and abs(choice.share / 0.7 - 1) < 0.02
    plain_dense, plain_small = clock([(net, X), (apply_plan(net, choice.plan), X)])
    assert abs(plain_small / plain_dense / 0.7 - 1) > 0.04, "the runtime makes a difference"


@pytest.mark.parametrize(("times", "multiple"), [((1, 0.93, 0.8), 8), ((1, 0.99, 0.8), 16), ((1, 1.01, 0.96), 32)])
def test_the_multiple_follows_from_what_was_measured(times, multiple):
    found = widths.liked_multiple("torch", False, torch.device("cpu"), lambda calls: list(times))
    assert found == multiple
    assert widths.liked_multiple("torch", True, torch.device("cuda"), None) == 32


def test_a_recipe_that_asks_for_auto_is_saved_with_the_number(monkeypatch):
    monkeypatch.setattr("scap_hub.run.selecting.liked_multiple", lambda runtime, int8, device: 16)
    images = DataLoader(TensorDataset(torch.randn(8, 3, 32, 32)), batch_size=8)
    result = scap_hub.prune(
        Residual(width=64), images, model_input_size=(3, 32, 32), round_to="auto", criterion="l1", finetune_epochs=0,
        evaluate_latency=False, repair_tune_steps=0,
    )  # fmt: skip
    assert result.recipe.target.round_to == 16
    assert all(len(result.plan.kept(name)) % 16 == 0 for name in result.plan.groups)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("int8", [False, True])
def test_a_model_in_its_runtime(runtime, int8):
    pytest.importorskip("onnxscript")
    pytest.importorskip(runtime)
    net = Residual(width=16).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))  # those that ranges are found on
    with torch.no_grad():
        expected, found = net(images), opened(net, images, runtime, int8)(images)
    error = ((found - expected).norm() / expected.norm()).item()
    assert 1e-4 < error < 0.3 if int8 else error < 1e-4
    assert opened(net, images, "torch") is net


def test_a_runtime_that_is_not_installed_is_told_before_any_work(monkeypatch):
    real = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "openvino" else real(name))
    with pytest.raises(ScapHubError, match=r"pip install 'scap-hub\[openvino\]'"):
        scap_hub.prune("resnet18", target="latency=0.5", target_runtime="openvino")


@pytest.mark.slow
def test_a_real_budget_in_onnxruntime():
    images = DataLoader(TensorDataset(torch.randn(8, 3, 64, 64)), batch_size=8)
    net = Residual(width=128)
    result = scap_hub.prune(
        net, images, model_input_size=(3, 64, 64), target="latency=0.6", target_runtime="onnxruntime", criterion="l1",
        finetune_epochs=0, repair_tune_steps=0, evaluate_latency=False,
    )  # fmt: skip
    one = torch.randn(1, 3, 64, 64)
    dense, small = milliseconds([(opened(own.eval(), one, "onnxruntime"), one) for own in (net, result.model)])
    assert small / dense == pytest.approx(result.report.selections[-1].latency, abs=0.1)
    assert abs(result.report.selections[-1].latency - 0.6) < 0.15
