"""What a run says of itself before it starts."""

import time

import pytest
import torch
from torch import nn

import scap_hub
from scap_hub.criteria.obs.cost import elimination_seconds
from scap_hub.errors import CheckpointError, TargetError
from tests.nets import Residual
from tests.test_pruning import QUICK, images


def test_a_forecast_leaves_the_model_and_the_run_as_they_were():
    torch.manual_seed(0)
    model = Residual()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    arguments = dict(model_input_size=(3, 32, 32), finetune_epochs=2)
    told = scap_hub.forecast(model, images(), QUICK, **arguments)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert told.seconds["the report's other targets"] > 0
    result = scap_hub.prune(model, images(), QUICK, **arguments)
    dense = result.loaded.module.state_dict()  # a batch of it was timed
    assert all(torch.equal(dense[name], tensor) for name, tensor in before.items())
    assert told.macs[0] == result.report.before.macs and told.params[0] == result.report.before.params
    assert abs(told.macs[1] / result.report.after.macs - 1) < 0.3
    assert f"parameters {told.params[0] / 1e3:.3g} k to about" in "\n".join(told.lines()), "never 0.0 M"
    assert told.seconds["repair"] > 0 and told.seconds["scores"] > 0
    assert "reading images comes on top" in told.lines()[-2]
    unknown = scap_hub.forecast(model, images(), QUICK, criterion="scap", target="threshold=0.5", **arguments)
    assert unknown.macs[1] is None and any("then what the scores say" in line for line in unknown.lines())


class Delayed(Residual):
    """Most of its passes wait for other work on the machine."""

    passes = 0

    def forward(self, x):
        Delayed.passes += 1
        time.sleep(0.05 if Delayed.passes % 8 else 0.0)
        return super().forward(x)


def test_other_work_on_the_machine_changes_no_forecast():
    data = {"train": images(), "test": images()}
    told = scap_hub.forecast(Delayed(), data, QUICK, model_input_size=(3, 32, 32))
    assert 0 < told.seconds["measuring"] < 2 * 16 * 0.05 / 8


def test_a_forecast_finds_the_mistakes_that_the_run_would(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        scap_hub.forecast(Residual(), images(), QUICK, output_dir=tmp_path / "out")
    with pytest.raises(TargetError, match="cannot be reached"):
        scap_hub.forecast(Residual(), images(), QUICK, target="macs=0.001", model_input_size=(3, 32, 32))
    # Several steps may go below what a single one leaves: that is not known before.
    steps = dict(target="macs=0.001", schedule_steps=2, model_input_size=(3, 32, 32))
    assert scap_hub.forecast(Residual(), images(), QUICK, **steps).macs[1] is None


def test_a_long_run_says_what_it_takes_first_and_a_short_one_nothing(monkeypatch, capsys):
    arguments = dict(model=Residual(), dataset=images(), recipe=QUICK, model_input_size=(3, 32, 32))
    scap_hub.prune(**arguments)
    assert "memory while training" not in capsys.readouterr().err
    monkeypatch.setattr("scap_hub.run.forecast.LONG", 0.0)
    scap_hub.prune(**arguments)
    said = capsys.readouterr().err
    assert said.index("fine-tuning") < said.index("memory while training") < said.index("epoch 1 of 1")


def test_a_run_without_training_says_what_scores_and_repair_take(monkeypatch, capsys, tmp_path):
    arguments = dict(model_input_size=(3, 32, 32), finetune_epochs=0, repair_tune_steps=100)
    told = scap_hub.forecast(Residual(), images(), QUICK, criterion="scap-set", **arguments)
    assert told.seconds["scores"] > 0 and told.memory > 0
    untuned = scap_hub.forecast(
        Residual(), images(), QUICK, criterion="scap-set", **arguments | {"repair_tune_steps": 0}
    )
    assert told.seconds["repair"] > 3 * untuned.seconds["repair"] > 0 and untuned.memory == 0
    file = tmp_path / "own.py"
    file.write_text(
        "import torch\nfrom scap_hub.criteria import Criterion\n"
        "class Flat(Criterion):\n    name = 'flat'\n    def score(self, model, groups, batches):\n"
        "        return {group.name: torch.ones(group.size) for group in groups}\n"
    )
    own = scap_hub.forecast(Residual(), images(), QUICK, criterion=f"{file}:Flat", **arguments)
    assert "scores" not in own.seconds and "reading images and scores come on top" in own.lines()[-2]
    monkeypatch.setattr("scap_hub.run.forecast.LONG", 0.0)
    scap_hub.prune(Residual(), images(), QUICK, **arguments | {"repair_tune_steps": 2})
    assert "about scores 0 s" in capsys.readouterr().err


def test_eliminations_and_diagnostics_are_counted(monkeypatch):
    """They take as long for few small images as for many large ones."""
    arguments = dict(criterion="obs", model_input_size=(3, 32, 32))
    wide, narrow = (nn.Sequential(nn.Conv2d(width, 8, 3)) for width in (128, 8))
    assert elimination_seconds(wide) > 10 * elimination_seconds(narrow) > 0
    monkeypatch.setattr("scap_hub.criteria.obs.criterion.elimination_seconds", lambda model: 1000.0)
    told = scap_hub.forecast(Residual(), images(), QUICK, **arguments | {"criterion_diagnostics": True}).seconds
    assert 1000 < told["scores"] < 1100 and 2000 < told["diagnostics"] < 2100
    told = scap_hub.forecast(Residual(), images(), QUICK, **arguments | {"criterion_diagnostics": False}).seconds
    assert told["scores"] > 1000 and "diagnostics" not in told
