"""Several sizes of one model."""

import functools
import json
import re

import pytest
import torch
from huggingface_hub import HfApi

import scap_hub
from scap_hub import errors
from scap_hub.criteria.rivals.magnitude import L1
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
    assert len(repr(family).splitlines()) == 4 and "macs-0.4" in family._repr_html_()


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
        for name, value in {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        for module in ("publish", "collection"):
            monkeypatch.setattr(f"scap_hub.hub.{module}.HfApi", functools.partial(HfApi, endpoint=hub.endpoint))
        for _ in range(2):  # the second time everything is there already
            url = family.push_to_hub("me/tiny", token="hf_write")
        assert re.fullmatch(hub.endpoint + "/collections/me/tiny-.*", url)
        api = HfApi(endpoint=hub.endpoint, token="hf_write")
        items = api.get_collection(url.partition("/collections/")[2]).items
        assert [item.item_id for item in items] == ["me/tiny-macs-0.7", "me/tiny-macs-0.4"]
        assert {"model.safetensors", "family.svg", "report.html"} <= set(api.list_repo_files("me/tiny-macs-0.4"))
