"""Several sizes of one model."""

import json
import re
from dataclasses import dataclass
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from huggingface_hub import HfApi

import scap_hub
from scap_hub import errors
from scap_hub.criteria.diagnostics import diagnose
from scap_hub.criteria.rivals.magnitude import L1
from scap_hub.run import baselines, details, pruning, score_cache
from tests.hub_client import running_hub
from tests.nets import tiny_net

RECIPE = {
    "data": {"calibration_images": 16}, "criterion": {"name": "l1", "diagnostics": False}, "finetune": {"epochs": 1},
    "evaluate": {"latency": False}, "model": {"input_size": (1, 8, 8)},
}  # fmt: skip
TARGETS = ["macs=0.7", "macs=0.4"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family") / "out"
    return scap_hub.prune_family(tiny_net(), "digits", RECIPE, targets=TARGETS, output_dir=folder), folder


def test_each_size_is_what_prune_gives_for_its_target(made):
    family, _ = made
    assert list(family.members) == ["macs-0.7", "macs-0.4"]
    alone = scap_hub.prune(tiny_net(), "digits", RECIPE, target="macs=0.4")
    member = family.members["macs-0.4"]
    assert member.plan == alone.plan and member.report.after.macs == alone.report.after.macs
    pairs = zip(member.model.parameters(), alone.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_the_folder_has_a_whole_one_for_each_size_and_the_picture(made):
    family, folder = made
    assert {path.name for path in folder.iterdir()} == {"macs-0.7", "macs-0.4", "family.json"}
    assert not list(folder.parent.glob(".*")), "nothing is left beside it"
    assert json.loads((folder / "family.json").read_text()) == family.to_dict()
    for name, member in family.members.items():
        loaded = scap_hub.load(folder / name, model=tiny_net())
        x = torch.randn(2, 1, 8, 8)
        assert torch.equal(loaded(x), member.model(x))
        page, picture = (folder / name / "report.html").read_text(), (folder / name / "family.svg").read_text()
        assert "The family" in page and "macs-0.7" in page and "macs-0.4" in page
        assert picture.startswith('<svg xmlns="http://www.w3.org/2000/svg"') and "macs-0.4" in picture
        assert "](family.svg)" in (folder / name / "README.md").read_text()
    assert len(repr(family).splitlines()) < 10 and "macs-0.4" in family._repr_html_()
    assert family.head() == ["model", "MACs", "parameters", "top-1", "latency"]


def test_channels_are_scored_once_and_an_interrupted_family_goes_on(tmp_path, monkeypatch):
    scored, whole = [], L1.score
    monkeypatch.setattr(L1, "score", lambda self, *given: scored.append(1) or whole(self, *given))
    seen = []

    class Stop:
        def on_epoch_end(self, row, kept):
            seen.append(row)
            if len(seen) == 2:  # in the training of the second member
                raise KeyboardInterrupt

    arguments = (tiny_net(), "digits", RECIPE)
    with pytest.raises(KeyboardInterrupt):
        scap_hub.prune_family(*arguments, targets=TARGETS, output_dir=tmp_path / "out", callbacks=[Stop()])
    assert len(scored) == 1 and not (tmp_path / "out").exists()
    family = scap_hub.prune_family(*arguments, targets=TARGETS, output_dir=tmp_path / "out")
    assert len(scored) == 1 and len(family.members) == 2 and (tmp_path / "out" / "macs-0.4").is_dir()
    with pytest.raises(errors.CheckpointError, match="not empty"):
        scap_hub.prune_family(*arguments, targets=TARGETS, output_dir=tmp_path / "out")


class Until:
    """Interrupts after so many epochs."""

    def __init__(self, last):
        self.left = last

    def on_epoch_end(self, row, kept):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def epochs(capsys):
    return capsys.readouterr().err.count("epoch 1 of 1")


TUNED = RECIPE | {"finetune": {"epochs": 1, "dense_epochs": 1}}


def same(one, other):
    """Whether two members are the same to the last bit."""
    pairs = zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    return one.plan == other.plan and all(torch.equal(*pair) for pair in pairs)


def test_an_interrupted_family_goes_on_with_other_targets(tmp_path, monkeypatch, capsys):
    scored, whole = [], L1.score
    monkeypatch.setattr(L1, "score", lambda self, *given: scored.append(1) or whole(self, *given))
    arguments = dict(model=tiny_net(), dataset="digits", recipe=TUNED, output_dir=tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        scap_hub.prune_family(**arguments, targets=["macs=0.7", "macs=0.4"], callbacks=[Until(2)])
    assert epochs(capsys) == 3, "the dense model and two sizes"
    family = scap_hub.prune_family(**arguments, targets=["params=0.6", "macs=0.7"])
    assert len(scored) == epochs(capsys) == 1, "scores, the dense model and macs=0.7 were there"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"params-0.6", "macs-0.7", "family.json"}
    fresh = scap_hub.prune_family(**arguments | {"output_dir": None}, targets=["params=0.6", "macs=0.7"])
    assert all(same(family.members[name], fresh.members[name]) for name in fresh.members)
    assert not same(*fresh.members.values())


def test_scores_of_all_sizes_are_diagnosed_once(monkeypatch):
    made = []
    monkeypatch.setattr(score_cache, "diagnose", lambda *given: made.append(1) or diagnose(*given))
    quick = {"criterion_diagnostics": True, "finetune_epochs": 0, "repair_tune_steps": 0}
    family = scap_hub.prune_family(tiny_net(), "digits", RECIPE, targets=TARGETS, **quick)
    first, second = ([own.diagnosis for own in member.report.groups.values()] for member in family.members.values())
    assert made == [1] and first == second and all(first)


def test_a_size_is_taken_up_only_if_the_same_larger_ones_taught_it(tmp_path, capsys):
    arguments = dict(model=tiny_net(), dataset="digits", recipe=RECIPE, teacher="next-larger")
    kept = arguments | {"output_dir": tmp_path / "out"}
    with pytest.raises(KeyboardInterrupt):  # two sizes are finished then
        scap_hub.prune_family(**kept, targets=["macs=0.7", "macs=0.4", "macs=0.2"], callbacks=[Until(3)])
    assert epochs(capsys) == 3
    family = scap_hub.prune_family(**kept, targets=["macs=0.7", "macs=0.5", "macs=0.4"])
    assert epochs(capsys) == 2, "macs=0.4 learns from another one now"
    fresh = scap_hub.prune_family(**arguments, targets=["macs=0.7", "macs=0.5", "macs=0.4"])
    assert all(same(family.members[name], fresh.members[name]) for name in fresh.members)


@dataclass(kw_only=True)
class FailsOnce(L1):
    """A criterion of somebody else that fails in the second size, before that is trained; once."""

    name = "fails-once-in-the-second-size"
    refined = 0

    def refine(self, *given, **more):
        FailsOnce.refined += 1
        if FailsOnce.refined == 2:
            raise errors.RecipeError("the criterion is at its end")
        return super().refine(*given, **more)


def test_a_mistake_in_a_later_size_leaves_the_training_of_those_before(tmp_path, capsys):
    arguments = dict(targets=TARGETS, output_dir=tmp_path / "out", criterion=FailsOnce.name)
    with pytest.raises(errors.RecipeError, match="at its end"):
        scap_hub.prune_family(tiny_net(), "digits", RECIPE, **arguments)
    first = capsys.readouterr().err
    family = scap_hub.prune_family(tiny_net(), "digits", RECIPE, **arguments)
    then = capsys.readouterr().err
    assert first.count("epoch 1 of 1") == then.count("epoch 1 of 1") == 1, "the first size is trained once"
    assert f"{family.members['macs-0.7'].report.history[-1]['loss']:.3f}" in first


def test_a_size_that_cannot_be_reached_is_told_before_any_work(tmp_path):
    def work(*_):
        raise AssertionError("it has begun")

    watch = SimpleNamespace(on_epoch_end=work)
    with pytest.raises(errors.TargetError, match=r"macs=0\.001 cannot be reached"):
        scap_hub.prune_family(tiny_net(), "digits", RECIPE | {"criterion": {"name": "l1"}},
                              targets=["macs=0.7", "macs=0.001"], output_dir=tmp_path / "out", callbacks=[watch],
                              finetune_dense_epochs=1)  # fmt: skip
    assert not list(tmp_path.iterdir()), "nothing is left beside it either"


def test_latencies_that_cannot_be_reached_are_told_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr("scap_hub.selection.latency.milliseconds", lambda calls: [1.0, 0.6])
    monkeypatch.setattr(L1, "score", lambda *_: pytest.fail("it has begun"))
    for call, target in (
        (scap_hub.prune_family, {"targets": ["macs=0.7", "latency=0.7", "latency=0.5"]}),
        (scap_hub.prune, {"target": "latency=0.5"}),
        (scap_hub.forecast, {"target": "latency=0.5"}),
    ):
        with pytest.raises(errors.TargetError, match=r"latency=0\.5 cannot be reached.* 0\.600 of the latency stay"):
            call(tiny_net(), "digits", RECIPE, output_dir=tmp_path / "out", **target)
        assert not list(tmp_path.iterdir())
    told = scap_hub.forecast(tiny_net(), "digits", RECIPE, target="latency=0.7")
    assert told.least == 0.6 and "  the smallest model takes 0.600 of the time" in told.lines()


def test_a_threshold_with_all_channels_on_one_side_is_told():
    for threshold, message in (("0.0", "every channel reaches it, so none goes"), ("1.0", "no channel reaches it")):
        settings = dict(criterion="random", target=f"threshold={threshold}", finetune_epochs=0, repair_tune_steps=0)
        with pytest.warns(UserWarning, match=rf"threshold={threshold}: {message}.*; importances lie between 0\."):
            scap_hub.prune(tiny_net(), "digits", RECIPE, **settings)


ZOO = RECIPE | {
    "finetune": {"epochs": 1, "dense_epochs": 1}, "evaluate": {"latency": True},
    "model": {"input_size": (3, 16, 16), "pretrained": False},
}  # fmt: skip


def test_smaller_models_of_the_zoo_stand_beside_it(tmp_path, monkeypatch):
    asked, trained, whole = [], [], baselines.finetune
    monkeypatch.setattr(baselines, "finetune", lambda *given, **more: trained.append(1) or whole(*given, **more))
    monkeypatch.setattr("scap_hub.run.family.milliseconds", lambda calls: asked.append(len(calls)) or [8.0, 4.0, 2.0])
    arguments = dict(targets=["macs=0.5"], siblings=["test_efficientnet"], output_dir=tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("scap_hub.run.siblings.measure", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            scap_hub.prune_family("test_byobnet", "digits", ZOO, **arguments)
    with pytest.raises(
        errors.CheckpointError, match=r"weights differ; siblings: was \['test_efficientnet'\], now \[\]"
    ):
        scap_hub.prune_family("test_byobnet", "digits", ZOO, **arguments | {"siblings": []})
    family = scap_hub.prune_family("test_byobnet", "digits", ZOO, **arguments)
    assert len(trained) == 1, "what was trained is taken up"
    (sibling,) = family.to_dict()["siblings"]
    assert sibling["name"] == "test_efficientnet" and 0 <= sibling["top1"] <= 1 and sibling["params"] == 101_766
    report = family.members["macs-0.5"].report
    assert asked == [3], "dense, pruned and smaller models take turns"
    assert (report.before.latency_ms, report.after.latency_ms, sibling["latency_ms"]) == (8.0, 4.0, 2.0)
    assert [row[0] for row in family.rows()] == ["test_byobnet", "macs-0.5", "test_efficientnet"]
    notes = family.notes()
    assert "Latency is the median time" in notes[0] and "test_efficientnet, not pruned" in notes[2]
    assert all(note.splitlines()[0][:60] in repr(family) for note in notes)
    folder = tmp_path / "out" / "macs-0.5"
    picture, page = (folder / "family.svg").read_text(), (folder / "report.html").read_text()
    for text in (picture, page):
        assert text.count(">test_efficientnet</text>") == 2, "over MACs and over latency"
        assert "top-1 over thousand MACs" in text and "top-1 over milliseconds of latency" in text
    assert ElementTree.fromstring(picture).tag.endswith("svg") and "smaller models of the zoo" in picture


def test_siblings_that_cannot_stand_beside_it_are_told(tmp_path):
    for wanted, changes, message in (
        ("test_efficientnet", {}, r'give a list such as \["test_efficientnet"\]'),
        (["test_resnet"], {}, "wants its images as"),
        (["test_efficientnet"], {"finetune_epochs": 0, "finetune_dense_epochs": 0}, "nothing trains it"),
    ):
        with pytest.raises(errors.RecipeError, match=message):
            scap_hub.prune_family("test_byobnet", "digits", ZOO | {"model": ZOO["model"] | {"num_classes": 10}},
                                  targets=["macs=0.5"], siblings=wanted, **changes)  # fmt: skip


def test_the_next_larger_size_may_teach(monkeypatch, tmp_path):
    teachers, whole = [], pruning.finetune
    monkeypatch.setattr(pruning, "finetune", lambda *a, **k: teachers.append(_width(a[3])) or whole(*a, **k))
    chosen, choose = [], details.Choosing.__call__
    monkeypatch.setattr(details.Choosing, "__call__", lambda own, to: chosen.append(str(to)) or choose(own, to))
    arguments = dict(targets=["macs=0.4", "macs=0.7"], teacher="next-larger", output_dir=tmp_path / "out")
    family = scap_hub.prune_family(tiny_net(), "digits", RECIPE, **arguments)
    assert list(family.members) == ["macs-0.4", "macs-0.7"]
    assert teachers == [16 + 32, _width(family.members["macs-0.7"].model)] and teachers[1] < 48
    assert chosen.count("macs=0.95") == chosen.count("macs=0.5") == 1, "other targets are chosen once for all sizes"
    assert "It learned from macs-0.7, the next larger size." in (tmp_path / "out/macs-0.4/README.md").read_text()
    assert "repeats the run, with the dense model as teacher" in (tmp_path / "out/macs-0.4/report.html").read_text()
    assert "It learned from" not in (tmp_path / "out/macs-0.7/README.md").read_text()


def _width(model):
    return model[0].out_channels + model[4].out_channels


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "larger"}, "take dense or next-larger"),
        ({"teacher": "next-larger", "targets": ["macs=0.5", "params=0.5"]}, "in the same unit"),
        ({"teacher": "next-larger", "targets": ["threshold=0.5"]}, "in the same unit"),
        ({"teacher": "next-larger", "finetune_epochs": 0}, "nothing is taught"),
    ],
)
def test_a_teacher_that_cannot_teach_is_told_before_any_work(changes, message):
    with pytest.raises(errors.ScapHubError, match=message):
        scap_hub.prune_family("no-such-model", **{"targets": TARGETS} | changes)


def test_a_kill_between_saving_and_cleaning_up_is_finished(tmp_path, monkeypatch):
    arguments = dict(
        model=tiny_net(), dataset="digits", recipe=RECIPE, targets=["macs=0.5"], output_dir=tmp_path / "out"
    )
    with monkeypatch.context() as patch:
        patch.setattr("scap_hub.run.unfinished._remove", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            scap_hub.prune_family(**arguments)
    saved = (tmp_path / "out" / "family.json").read_bytes()
    with pytest.raises(errors.CheckpointError, match="differs: targets"):
        scap_hub.prune_family(**arguments | {"targets": ["macs=0.6"]})
    family = scap_hub.prune_family(**arguments)
    assert family.members["macs-0.5"].report.after.top1 is not None
    assert (tmp_path / "out" / "family.json").read_bytes() == saved
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("macs=0.5", "give a list"),
        ([], "give a list"),
        (["macs=0.5", "macs=0.50"], "given twice"),
        (["mac=1"], "target"),
    ],
)
def test_mistakes_are_told_before_any_work(targets, message):
    with pytest.raises(errors.ScapHubError, match=message):
        scap_hub.prune_family("no-such-model", targets=targets)


def test_a_family_is_published_as_a_collection(made, monkeypatch, tmp_path):
    family, _ = made
    with running_hub() as hub:
        hub.used_here(monkeypatch, "publish", "collection")
        for _ in range(2):  # the second time everything is there already
            url = family.push_to_hub("me/tiny", token="hf_write")
        assert re.fullmatch(hub.endpoint + "/collections/me/tiny-.*", url)
        api = HfApi(endpoint=hub.endpoint, token="hf_write")
        items = api.get_collection(url.partition("/collections/")[2]).items
        assert [item.item_id for item in items] == ["me/tiny-macs-0.7", "me/tiny-macs-0.4"]
        assert {"model.safetensors", "family.svg", "report.html"} <= set(api.list_repo_files("me/tiny-macs-0.4"))


def test_a_family_that_was_not_published_is_by_the_same_call(monkeypatch, tmp_path):
    pushed = []

    def push(family, *arguments):
        pushed.append(arguments)
        if len(pushed) == 1:
            raise KeyboardInterrupt
        return "https://me/x"

    monkeypatch.setattr("scap_hub.run.sizes.Family.push_to_hub", push)
    options = {"targets": ["macs=0.6"], "publish_repo_id": "me/x", "output_dir": tmp_path / "out", "finetune_epochs": 0}
    with pytest.raises(KeyboardInterrupt):
        scap_hub.prune_family(tiny_net(), "digits", RECIPE, **options)
    scap_hub.prune_family(tiny_net(), "digits", RECIPE, **options)
    assert pushed == [("me/x", False)] * 2 and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_long_family_says_what_it_takes_first(monkeypatch, capsys):
    monkeypatch.setattr("scap_hub.run.forecast.LONG", 0.0)
    scap_hub.prune_family(tiny_net(), "digits", RECIPE, targets=["macs=0.6", "macs=0.4"])
    said = capsys.readouterr().err
    assert (
        said.index("target macs=0.6: MACs") < said.index("target macs=0.4: MACs") < said.index("memory while training")
    )
    assert said.count("memory while training") == 1 and said.index("memory while training") < said.index("epoch 1 of 1")
