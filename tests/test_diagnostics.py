"""Diagnostics say what is true of nets in which it is known."""

import pytest
import torch
from torch import nn

import scap_hub
from scap_hub.channels import channel_groups
from scap_hub.criteria import base, score
from scap_hub.criteria.diagnostics import diagnose
from tests.nets import Residual
from tests.test_pruning import QUICK, images


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    with torch.no_grad():
        net[0].bias[2], net[0].weight[5], net[0].bias[5] = -1e3, 0, 3.0
        net[0].weight[6] *= 10
    return net


def diagnosed(net, x, name, **options):
    groups = channel_groups(net, x[0][:1])
    criterion = base.criterion(name, options)
    scores = score(net, x, criterion, groups=groups)
    return diagnose(net, groups, x, criterion, scores)["0"]


def test_dead_channels_energy_and_fidelity(net):
    x = list(torch.randn(32, 3, 8, 8).split(10))
    found = diagnosed(net, x, "scap", latent=4)
    assert found.dead == (2, 5)
    with torch.no_grad():
        variance = net[:2](torch.cat(x)).double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(torch.tensor(found.energy).double(), variance / variance.sum(), rtol=1e-4, atol=1e-6)
    assert list(found.fidelity) == sorted(found.fidelity) and 0 < found.fidelity[0] < found.fidelity[4] == 1
    assert diagnosed(net, x, "activation").fidelity is None


def test_correlations(net):
    x = list(torch.randn(32, 3, 8, 8).split(10))
    magnitude = diagnosed(net, x, "l1")
    assert magnitude.l1_correlation == magnitude.stability == pytest.approx(1)
    assert diagnosed(net, x, "random").l1_correlation < 1
    few, many = (diagnosed(net, [torch.randn(n, 3, 8, 8)], "activation").stability for n in (8, 256))
    assert 0 < few <= many <= 1
    assert diagnosed(net, [torch.randn(7, 3, 8, 8)], "activation").stability is None


def test_a_run_reports_them_unless_told_not_to():
    given = dict(model_input_size=(3, 32, 32), finetune_epochs=0)
    report = scap_hub.prune(Residual(width=16), images(), QUICK, criterion_diagnostics=True, **given).report
    assert all(len(group.diagnosis.energy) == group.size for group in report.groups.values())
    assert report.to_dict()["groups"]["stem"]["diagnosis"]["stability"] <= 1
    report = scap_hub.prune(Residual(width=16), images(), QUICK, criterion_diagnostics=False, **given).report
    assert all(group.diagnosis is None for group in report.groups.values())
