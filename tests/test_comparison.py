"""Criteria beside each other, on the digits."""

import json

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import scap_hub
from scap_hub.errors import CalibrationError, DataError, RecipeError
from scap_hub.run import compare, peers
from scap_hub.run.comparison import Comparison
from tests.nets import tiny_net
from tests.test_outputs import OPTIONS, Pair, images
from tests.test_pruning import images as labelled_images

QUICK = dict(
    recipe="quick", model_input_size=(1, 8, 8), data_calibration_images=32, finetune_epochs=0, round_to=1,
    data_batch_size=256, repair_tune_steps=2,
)  # fmt: skip


def test_every_criterion_gets_the_same_budget_and_the_better_ones_rank_first(tmp_path):
    net = tiny_net()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    arguments = QUICK | {"finetune_epochs": 1, "targets": ["macs=0.6", "params=0.5"], "seeds": 2}
    found = scap_hub.compare(net, "digits", criteria=["l1", "random"], output=tmp_path / "out.json", **arguments)
    assert [(c["target"], c["criterion"], c["seed"]) for c in found.cells] == [
        (target, criterion, seed)
        for seed in (0, 1)
        for target in arguments["targets"]
        for criterion in ("l1", "random")
    ]
    for cell in found.cells:
        kind, _, budget = cell["target"].partition("=")
        assert float(budget) - 0.05 < cell[kind] <= float(budget)
        assert cell["validation"] >= cell["repaired"] and 0 <= cell["test"] <= 1 and cell["seconds"] > 0
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    document = json.loads((tmp_path / "out.json").read_text())
    assert set(document["summary"]) == {"repaired", "validation", "test"} and document["cells"] == found.cells
    assert not list(tmp_path.glob(".*"))


def test_finished_cells_are_not_run_again(tmp_path, monkeypatch):
    arguments = QUICK | {"model": tiny_net(), "dataset": "digits", "seeds": 1, "output": tmp_path / "out.json"}
    first = scap_hub.compare(criteria=["l1"], **arguments)
    ran = []
    whole = compare.prune_loaded
    monkeypatch.setattr(compare, "prune_loaded", lambda *a, **k: ran.append(a[2].criterion.name) or whole(*a, **k))
    both = scap_hub.compare(criteria=["l1", "random"], **arguments)
    assert ran == ["random"] and both.cells[0] == first.cells[0] and len(both.cells) == 2
    scap_hub.compare(criteria=["l1", "random"], criterion={"name": "random", "options": {"seed": 7}}, **arguments)
    assert ran == ["random", "random"], "an option has changed"
    with pytest.raises(RecipeError, match=r"is a comparison with other recipe; choose another file"):
        scap_hub.compare(criteria=["l1"], **arguments | {"round_to": 2})
    torch.nn.init.zeros_(next(arguments["model"].parameters()))
    other = labelled_images(channels=1, size=8, classes=10)
    with pytest.raises(RecipeError, match=r"with other data, recipe, weights, images; choose another file"):
        scap_hub.compare(criteria=["l1"], **arguments | {"dataset": {"train": other, "validation": other}})
    (tmp_path / "out.json").write_text("[]")
    with pytest.raises(RecipeError, match="is no comparison"):
        scap_hub.compare(criteria=["l1"], **arguments)


def test_a_criterion_that_cannot_score_the_model_is_a_failed_row_that_is_tried_again(tmp_path, monkeypatch):
    arguments = QUICK | {"model": tiny_net(), "dataset": "digits", "seeds": 1, "output": tmp_path / "out.json"}

    def refuse(*_, **__):
        raise CalibrationError("not these images")

    with monkeypatch.context() as patch:
        patch.setattr(compare, "prune_loaded", refuse)
        broken = scap_hub.compare(criteria=["l1"], **arguments)
    assert broken.cells[0]["error"] == "not these images" and broken.summary()[0]["rank"] is None
    assert "error" not in scap_hub.compare(criteria=["l1"], **arguments).cells[0]


def test_mean_ranks_count_only_cells_that_all_have():
    def cell(target, criterion, seed, top1):
        versions = {"torch": "2.9.0" if seed else "2.11.0", "timm": "1.0.20"}
        return {
            "target": target, "criterion": criterion, "seed": seed, "versions": versions, "validation": top1
        }  # fmt: skip

    found = Comparison({}, {"validation": 0.9, "test": None}, [
        cell("macs=0.5", "a", 0, 0.8), cell("macs=0.5", "b", 0, 0.7), cell("macs=0.5", "c", 0, 0.7),
        cell("macs=0.5", "a", 1, 0.6), cell("macs=0.5", "b", 1, 0.7), cell("macs=0.5", "c", 1, 0.5),
        cell("macs=0.3", "a", 0, 0.1), cell("macs=0.3", "b", 0, 0.9),
        {"target": "macs=0.3", "criterion": "c", "seed": 0, "error": "no"},
    ])  # fmt: skip
    summary = {row["criterion"]: row for row in found.summary()}
    assert {name: row["rank"] for name, row in summary.items()} == {"a": 1.5, "b": 1.75, "c": 2.75}
    assert summary["a"]["targets"]["macs=0.5"] == {
        "mean": pytest.approx(0.7), "std": pytest.approx(0.1414, abs=1e-4), "seeds": 2
    }  # fmt: skip
    table = found.rows()
    assert table[0] == ["criterion", "macs=0.5", "macs=0.3", "mean rank"] and table[1] == [
        "dense",
        "90.00 %",
        "90.00 %",
        "",
    ]
    assert table[-1] == ["c", "60.00 ± 14.14 %", "failed", "2.75"]
    found.cells.append(cell("macs=0.1", "a", 0, 0.5))
    assert found.rows()[-1] == ["c", "60.00 ± 14.14 %", "failed", "not measured", "2.75"]
    found.cells.pop()
    words = " ".join(found.notes())
    assert (
        "validation images, more is better; mean and standard deviation of 2 seeds" in words and "failed: why" in words
    )
    assert "different versions of torch: 2.11.0, 2.9.0." in words and "of timm" not in words


def test_less_of_an_error_ranks_first():
    cells = [
        {"target": "macs=0.5", "criterion": name, "seed": 0, "validation": error}
        for name, error in (("a", 0.3), ("b", 0.1), ("c", 0.2))
    ]
    about = {"metric": {"name": "relative output error", "lower_is_better": True}}
    found = Comparison(about, {"validation": 0.0, "test": None}, cells)
    assert [row["criterion"] for row in found.summary()] == ["b", "c", "a"]
    assert "relative output error on the validation images, less is better." in found.notes()[0]


def test_criteria_are_compared_by_the_outputs_of_a_model_without_logits(tmp_path):
    """Taylor among them; a schedule of training keeps the epoch of the smallest error."""
    torch.manual_seed(0)
    halves = images(40).split(20)
    splits = {
        name: DataLoader(TensorDataset(half), batch_size=10)
        for name, half in zip(("train", "validation"), halves, strict=True)
    }
    options = {"targets": ["macs=0.6"], "seeds": 1, "output": tmp_path / "out.json", **OPTIONS, "repair_tune_steps": 0}
    del options["target"]
    found = scap_hub.compare(Pair(), splits, criteria=["taylor", "random"], finetune_epochs=1, **options)
    assert not [cell for cell in found.cells if "error" in cell], found.cells
    assert all(0 < cell["validation"] <= cell["repaired"] for cell in found.cells)
    best, worst = (row["targets"]["macs=0.6"]["mean"] for row in found.summary())
    assert best <= worst
    assert json.loads((tmp_path / "out.json").read_text())["metric"]["lower_is_better"] is True
    with pytest.raises(RecipeError, match="zoo:test_resnet: relative output error compares outputs"):
        scap_hub.compare(Pair(), splits, criteria=["zoo:test_resnet"], finetune_epochs=1,
                         model_pretrained=False, **{**options, "output": None})  # fmt: skip


def test_torch_pruning_stands_beside_at_the_same_macs():
    pytest.importorskip("torch_pruning")
    found = scap_hub.compare(
        tiny_net(), "digits", criteria=list(peers.PEERS), seeds=1, targets=["macs=0.6", "threshold=0.3"], **QUICK
    )
    assert [cell["criterion"] for cell in found.cells] == list(peers.PEERS), "a threshold means nothing to it"
    for cell in found.cells:
        assert 0.5 < cell["macs"] <= 0.6, cell
    by_name = {cell["criterion"]: cell["repaired"] for cell in found.cells}
    assert by_name["torch-pruning-bn"] != by_name["torch-pruning"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"criteria": ["l3"]}, RecipeError, "unknown criterion 'l3'"),
        ({"targets": ["speed=2"]}, RecipeError, "target 'speed=2' is not understood"),
        ({"dataset": labelled_images(channels=1, size=8, classes=10)}, DataError, "labelled validation images"),
        ({"model": None}, RecipeError, "no model"),
    ],
)
def test_mistakes_are_told_before_any_work(arguments, error, message, tmp_path):
    given = {"model": tiny_net(), "dataset": "digits", "criteria": ["l1"], "output": tmp_path / "out.json"}
    with pytest.raises(error, match=message):
        scap_hub.compare(**QUICK | given | arguments)
    assert not list(tmp_path.iterdir())


def test_without_torch_pruning_its_name_is_refused_and_all_means_ours(monkeypatch):
    monkeypatch.setattr(peers, "available", lambda: False)
    with pytest.raises(RecipeError, match="pip install torch-pruning"):
        scap_hub.compare(tiny_net(), "digits", criteria=["torch-pruning"], **QUICK)
    assert not set(peers.PEERS) & set(compare._criteria("all")) and "scap" in compare._criteria("all")
