"""Scores that are found once: an interrupted run, and one comparison's targets."""

import pytest
import torch

import scap_hub
from scap_hub import criteria
from scap_hub.errors import TargetError
from tests.nets import Residual, tiny_net
from tests.test_comparison import QUICK as COMPARED
from tests.test_pruning import QUICK, images


@pytest.fixture
def scored(monkeypatch):
    """Names of the criteria that scored a model, each time they did."""
    found = []
    for kind in (criteria.L1, criteria.Scap, criteria.ScapSet):

        def score(self, *arguments, whole=kind.score):
            found.append(self.name)
            return whole(self, *arguments)

        monkeypatch.setattr(kind, "score", score)
    return found


def stop(*_, **__):
    raise KeyboardInterrupt


def prune(folder, **changes):
    torch.manual_seed(0)
    arguments = {"model_input_size": (3, 32, 32), "output_dir": folder / "out", "data_batch_size": 8}
    return scap_hub.prune(Residual(width=16), images(), QUICK, **arguments | changes)


def test_an_interrupted_run_finds_its_scores_again(tmp_path, scored, monkeypatch):
    whole = prune(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("scap_hub.run.pruning.finetune", stop)
        with pytest.raises(KeyboardInterrupt):
            prune(tmp_path / "cut")
    assert scored == ["scap", "scap"]
    resumed = prune(tmp_path / "cut")
    assert scored == ["scap", "scap"], "the third run reads them"
    assert resumed.plan == whole.plan and resumed.report.groups == whole.report.groups
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))
    assert not list((tmp_path / "cut").glob(".*")), "nothing is left beside the output"


def test_a_run_that_takes_up_reports_the_same_diagnostics(tmp_path, monkeypatch):
    whole = prune(tmp_path / "whole", criterion_diagnostics=True)
    with monkeypatch.context() as patch:
        patch.setattr("scap_hub.run.pruning.finetune", stop)
        with pytest.raises(KeyboardInterrupt):
            prune(tmp_path / "cut", criterion_diagnostics=True)
    resumed = prune(tmp_path / "cut", criterion_diagnostics=True)
    assert resumed.report.groups == whole.report.groups
    assert all(group.diagnosis.fidelity for group in resumed.report.groups.values())


@pytest.mark.parametrize(
    "change",
    [
        {"criterion": "l1"},
        {"seed": 1},
        {"data_calibration_images": 4},
        {"criterion_options": {"autoencoder": "residual"}},
    ],
)
def test_scores_of_something_else_are_not_taken(change, tmp_path, scored, monkeypatch):
    monkeypatch.setattr("scap_hub.run.pruning.finetune", stop)
    for changes in ({}, change):
        with pytest.raises(KeyboardInterrupt):
            prune(tmp_path, **changes)
    assert len(scored) == 2


def test_a_mistake_found_after_scoring_leaves_nothing(tmp_path, scored):
    with pytest.raises(TargetError):
        prune(tmp_path, target="params=0.0001")
    assert scored and not list(tmp_path.iterdir())


def test_a_comparison_scores_once_for_all_targets(scored):
    found = scap_hub.compare(
        tiny_net(), "digits", criteria=["l1", "scap-set"], targets=["macs=0.7", "macs=0.5"], seeds=2, **COMPARED
    )
    assert len(found.cells) == 8 and sorted(scored) == ["l1"] * 2 + ["scap-set"] * 2
    alone = scap_hub.compare(tiny_net(), "digits", criteria=["scap-set"], targets=["macs=0.5"], seeds=1, **COMPARED)
    same = next(cell for cell in found.cells if (cell["criterion"], cell["target"]) == ("scap-set", "macs=0.5"))
    assert {**alone.cells[0], "seconds": 0} == {**same, "seconds": 0}
