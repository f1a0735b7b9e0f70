"""Tuning on calibration images, without labels."""

import contextlib
import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import scap_hub
from scap_hub import apply_plan, channel_groups, repair, select
from scap_hub.compensation import tune, tuning
from scap_hub.errors import CalibrationError
from scap_hub.run import repairing
from scap_hub.tasks.classification import ImageClassification
from scap_hub.tasks.outputs import unlabelled
from tests.nets import Residual
from tests.test_pruning import QUICK
from tests.test_pruning import images as labelled

IMAGES = [torch.randn(24, 3, 12, 12, generator=torch.Generator().manual_seed(i)) for i in range(2)]


def pruned(net, images=IMAGES):
    groups = channel_groups(net, images[0][:1])
    plan = select(groups, scap_hub.score(net, images, "l1", groups=groups), "ratio=0.5", round_to=1)
    small = apply_plan(net, plan)
    repair(net, small, plan, images)
    return small


def error(net, small, x):
    with torch.no_grad():
        dense = net(x)
        return float((small(x) - dense).square().sum() / (dense - dense.mean(0)).square().sum())


def test_outputs_come_nearer_on_images_that_were_not_seen():
    torch.manual_seed(0)
    net = Residual(width=16).eval()
    small = pruned(net)
    norms = {k: v.clone() for k, v in small.named_buffers()}
    new = torch.randn(64, 3, 12, 12)
    unseen = error(net, small, new)
    before, after = tune(net, small, IMAGES, steps=60, learning_rate=1e-2)
    assert after < 0.8 * before and error(net, small, new) < 0.8 * unseen
    assert all(torch.equal(value, norms[name]) for name, value in small.named_buffers()), "batch norm is fixed"
    assert not small.training and all(weight.grad is None for weight in small.parameters())


def test_the_same_seed_gives_the_same_weights():
    torch.manual_seed(0)
    net = Residual(width=16).eval()
    small = pruned(net)
    runs = []
    for seed in (0, 0, 1):
        tuned = copy.deepcopy(small)
        torch.rand(3)  # the state of the caller's generator does not matter
        tune(net, tuned, IMAGES, steps=60, learning_rate=1e-2, seed=seed)
        runs.append(torch.cat([weight.flatten() for weight in tuned.state_dict().values()]))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("diverges", [False, True])
def test_weights_never_get_worse_and_a_rate_that_is_too_high_is_told(diverges):
    torch.manual_seed(0)
    net = Residual(width=16).eval()
    small = pruned(net)
    state = copy.deepcopy(small.state_dict())
    with pytest.warns(UserWarning, match=r"learning rate 1e\+06 took") if diverges else contextlib.nullcontext():
        before, after = tune(net, small, IMAGES, steps=5 * diverges, learning_rate=1e6)
    assert before == after
    assert all(torch.equal(value, state[name]) for name, value in small.state_dict().items())


@pytest.mark.parametrize("first", [1e30, 1.0], ids=["no number", "diverges"])
def test_the_highest_rate_that_does_no_harm_is_taken(first, monkeypatch):
    torch.manual_seed(0)
    net = Residual(width=16).eval()
    small = pruned(net)
    named = copy.deepcopy(small)
    monkeypatch.setattr(tuning, "RATES", (first, 2e-3, 1e-7))
    before, after = tune(net, small, IMAGES, steps=40)
    assert (before, after) == tune(net, named, IMAGES, steps=40, learning_rate=2e-3) and after < 0.9 * before


def test_maps_tuples_and_constants_are_outputs_too():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            y = self.a(x).relu()
            return {"map": self.b(y), "pair": (self.c(y).mean((2, 3)), torch.ones(len(x), 3)), "index": torch.arange(4)}

    torch.manual_seed(0)
    net = Two().eval()
    before, after = tune(net, pruned(net), IMAGES, steps=60, learning_rate=1e-2)
    assert after < 0.8 * before


def test_outputs_too_small_for_single_precision_are_no_aim():
    class Faint(Residual):
        def forward(self, x):
            return super().forward(x) * 1e-24

    torch.manual_seed(0)
    net = Faint(width=16).eval()
    small = pruned(net)
    assert tune(net, small, IMAGES, steps=2) == (0, 0)


def test_half_precision_stays_half():
    torch.manual_seed(0)
    net = Residual(width=16).eval()
    small = pruned(net).bfloat16()
    before, after = tune(net.bfloat16(), small, IMAGES, steps=60, learning_rate=1e-2)
    assert after < before and {weight.dtype for weight in small.parameters()} == {torch.bfloat16}


def test_bad_images_are_told():
    net = Residual(width=16).eval()
    small = pruned(net)
    with pytest.raises(CalibrationError, match="NaN or Inf in the outputs"):
        tune(net, small, [torch.full((4, 3, 12, 12), torch.nan)], steps=2)
    with pytest.raises(CalibrationError, match=r"1 calibration image"):
        tune(net, small, [IMAGES[0][:1]], steps=2)


SCRIPT = """
import sys, torch
from accelerate import PartialState
from scap_hub import tune
from tests.nets import Residual
from tests.test_tuning import IMAGES, pruned
state = PartialState(cpu=True)
torch.manual_seed(0)
net = Residual(width=16).eval()
small = pruned(net, [torch.cat(IMAGES)[state.process_index :: 2]])
before, after = tune(net, small, [torch.cat(IMAGES)[state.process_index :: 2]], steps=40, learning_rate=1e-2)
torch.save((before, after, small.state_dict()), f"{sys.argv[1]}/{state.process_index}.pt")
state.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_end_with_the_same_weights(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    subprocess.run([*launch, tmp_path / "script.py", tmp_path], check=True, env=environment, timeout=120, cwd=root)
    (before, after, weights), other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert after < before and (before, after) == other[:2]
    assert all(torch.equal(value, other[2][name]) for name, value in weights.items())


def test_what_is_judged_is_not_what_a_repaired_model_was_fitted_to(monkeypatch):
    seen = []

    def distance(small, dense, batch):
        seen.append(batch)
        return (small(batch) - dense(batch)).square().mean()

    torch.manual_seed(0)
    net = Residual(width=16).eval()
    tune(net, pruned(net), IMAGES, steps=0, learning_rate=1.0, distance=distance)
    judged, given = torch.cat(seen[: len(seen) // 2]), torch.cat(IMAGES)
    assert judged.shape == given.shape and torch.equal(judged, torch.cat(seen[len(seen) // 2 :])), "the same twice"
    as_they_are = [any(torch.equal(one, other) for other in given) for one in judged]
    assert sum(as_they_are) < 0.6 * len(given), "half are mixed, and those that are not may be shifted by nothing"


def test_no_images_are_told_by_the_public_step_too():
    net = Residual(width=16).eval()
    with pytest.raises(CalibrationError, match="0 calibration image"):
        scap_hub.tune(net, copy.deepcopy(net), [])


def test_prune_tunes_a_classifier_by_what_its_logits_mean():
    """Logits may all grow or shrink by one number: no class becomes more likely."""
    task, (net, x) = ImageClassification(), (nn.Linear(4, 3), torch.randn(5, 4))
    shifted = copy.deepcopy(net)
    with torch.no_grad():
        shifted.bias += 7
    for known in (task, unlabelled(task)):
        assert float(repairing.distance_of(known, 2.0)(shifted, net, x)) == pytest.approx(0, abs=1e-6)
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.bias[0] += 7
    assert float(repairing.distance_of(task, 2.0)(other, net, x)) > 0.1


@pytest.mark.parametrize(("epochs", "steps", "tuned"), [(0, None, 200), (1, None, 0), (0, 0, 0), (1, 3, 3)], ids=str)
def test_prune_tunes_where_nothing_is_trained_afterwards(epochs, steps, tuned, monkeypatch):
    seen = [0]

    def two_steps(*args, **options):
        seen.append(options["steps"])
        return tune(*args, **options | {"steps": 2})

    monkeypatch.setattr(repairing, "tune", two_steps)
    scap_hub.prune(
        *(Residual(width=16), labelled(size=16), QUICK),
        model_input_size=(3, 16, 16), target="ratio=0.5", finetune_epochs=epochs, repair_tune_steps=steps,
    )  # fmt: skip
    assert seen[-1] == tuned
