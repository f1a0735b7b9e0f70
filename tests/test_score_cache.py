"""Scores that are found once: an interrupted run, and one comparison's targets."""

import pytest
import torch

import scap_hub
from scap_hub import criteria
from scap_hub.criteria.base import criterion
from scap_hub.errors import TargetError
from scap_hub.run.score_cache import Scoring
from tests.nets import Residual, tiny_net
from tests.test_comparison import QUICK as COMPARED
from tests.test_criteria import MINE
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
    arguments = {"model_input_size": (3, 32, 32), "output_dir": folder / "out", "data_batch_size": 8, **changes}
    return scap_hub.prune(Residual(width=16), images(), QUICK, **arguments)


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


def test_a_resumed_run_reports_the_same_diagnostics(tmp_path, scored, monkeypatch):
    whole = prune(tmp_path / "whole", criterion_diagnostics=True)
    with monkeypatch.context() as patch:
        patch.setattr("scap_hub.run.pruning.finetune", stop)
        with pytest.raises(KeyboardInterrupt):
            prune(tmp_path / "cut", criterion_diagnostics=True)
    scored.clear()
    resumed = prune(tmp_path / "cut", criterion_diagnostics=True)
    assert not scored, "scores and diagnostics are read"
    assert resumed.report.groups == whole.report.groups
    assert all(len(group.diagnosis.fidelity) == 5 for group in resumed.report.groups.values())


def test_kept_scores_are_the_same_value(tmp_path):
    model = Residual(width=16).eval()
    batches = [torch.randn(8, 3, 32, 32)]
    groups = [group for group in scap_hub.channel_groups(model, batches[0]) if group.prunable]
    for kind in (criteria.Scap, criteria.ScapSet):
        first, second = (Scoring(tmp_path, model, batches, kind(), groups).scores() for _ in range(2))
        assert list(first) == list(second) and first.scope == second.scope == kind.scope
        assert first.fidelity.keys() == second.fidelity.keys()
        for one, other in ((first, second), (first.fidelity, second.fidelity)):
            assert all(torch.equal(one[name], other[name]) for name in one)


def test_scores_of_a_changed_file_are_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(criteria.base, "_CRITERIA", dict(criteria.base._CRITERIA))
    model = Residual(width=16).eval()
    groups = [group for group in scap_hub.channel_groups(model, torch.randn(1, 3, 32, 32)) if group.prunable]
    path = tmp_path / "mine.py"
    found = []
    for factor in ("1.0", "20.0"):
        path.write_text(MINE.replace("self.slope *", f"{factor} *"))
        found.append(Scoring(tmp_path, model, [], criterion(f"{path}:Mine"), groups).scores()["stem"])
    assert torch.equal(20 * found[0], found[1])


def test_a_mistake_found_after_scoring_leaves_nothing(tmp_path, scored):
    with pytest.raises(TargetError):
        prune(tmp_path, target="params=0.0001", schedule_steps=2)  # with one step it is found before
    assert scored and not list(tmp_path.iterdir())


def test_a_comparison_scores_once_for_all_targets(scored):
    found = scap_hub.compare(
        tiny_net(), "digits", criteria=["l1", "scap-set"], targets=["macs=0.7", "macs=0.5"], seeds=2, **COMPARED
    )
    assert len(found.cells) == 8 and sorted(scored) == ["l1"] * 2 + ["scap-set"] * 2
    alone = scap_hub.compare(tiny_net(), "digits", criteria=["scap-set"], targets=["macs=0.5"], seeds=1, **COMPARED)
    same = next(cell for cell in found.cells if (cell["criterion"], cell["target"]) == ("scap-set", "macs=0.5"))
    assert {**alone.cells[0], "seconds": 0} == {**same, "seconds": 0}
