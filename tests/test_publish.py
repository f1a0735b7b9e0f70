"""Publishing against a real HTTP Hub, with the real client."""

import contextlib
import functools
import json
import re
import shutil
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HTTPError
from safetensors.torch import load_file, save_file

import scap_hub
from scap_hub.errors import CheckpointError, PlanError, PublishError
from scap_hub.hub import publish
from scap_hub.hub.card import BEGIN, END, Measured, merged_card, model_card
from scap_hub.hub.checkpoint import load, save_checkpoint
from scap_hub.hub.publish import push_to_hub
from scap_hub.recipe import Recipe
from scap_hub.run.report import Measures, Report
from scap_hub.run.result import Result
from tests.hub_client import running_hub
from tests.nets import Residual
from tests.test_adapters import tiny_resnet
from tests.test_checkpoint import pruned, run
from tests.test_pruning import QUICK, images

STORED = "^/[0-9a-f]{64}$"
SAVED = {"config.json", "model.safetensors", "modeling_scap.py", "pruning_plan.json", "recipe.yaml", "README.md"}


@pytest.fixture(scope="module")
def hub():
    with running_hub() as server:
        yield server


@pytest.fixture(scope="module")
def resnet():
    return pruned("test_resnet", num_classes=4, labels=["a", "b", "c", "d"])


@pytest.fixture(scope="module")
def folder(resnet, tmp_path_factory):
    small, loaded, plan = resnet
    loaded.license = "mit"
    card = model_card(loaded, plan, Measured({"top1": 0.9}, {"top1": 0.8}, "digits"), "target: macs=0.5\n")
    out = tmp_path_factory.mktemp("saved") / "out"
    return save_checkpoint(out, small, loaded, plan, "target: macs=0.5\n", {"README.md": card})


@pytest.fixture
def new_weights(folder, tmp_path):
    """A copy with weights that the storage cannot have yet."""
    copy = shutil.copytree(folder, tmp_path / "new")
    weights = load_file(copy / "model.safetensors")
    weights["fc.bias"] = torch.from_numpy(np.random.default_rng().random(4, dtype=np.float32))
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    return copy


@pytest.fixture(autouse=True)
def online(hub, monkeypatch, tmp_path):
    hub.used_here(monkeypatch, "publish")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("scap_hub.hub.publish._WAITS", (0.01, 0.01, 0.01))
    yield
    hub.fail("", "")


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.endpoint, token="hf_write")


@pytest.fixture
def repo(request):
    return "me/" + re.sub(r"\W+", "-", request.node.name)[:60].strip("-")


def names(api, repo, revision=None):
    return set(api.list_repo_files(repo, revision=revision)) - {".gitattributes"}


def titles(api, repo):
    return [commit.title for commit in api.list_repo_commits(repo)]


def readme(api, repo, tmp_path):
    return Path(api.hf_hub_download(repo, "README.md", cache_dir=tmp_path / "readme")).read_text(encoding="utf-8")


def test_one_commit_with_everything_and_nothing_else(hub, api, folder, repo, tmp_path, resnet):
    (folder / "optimizer.bin").write_bytes(b"pickle")
    url = push_to_hub(folder, repo, token="hf_write", commit_message="First")
    (folder / "optimizer.bin").unlink()
    assert url == f"{hub.endpoint}/{repo}"
    assert titles(api, repo) == ["First", "initial commit"]
    assert names(api, repo) == SAVED
    got = api.snapshot_download(repo, cache_dir=tmp_path / "cache")
    assert torch.equal(run(load(got)), run(resnet[0]))
    card = ModelCard(readme(api, repo, tmp_path))
    assert f'timm.create_model("hf-hub:{repo}", pretrained=True)' in card.text
    assert f'AutoModelForImageClassification.from_pretrained("{repo}", trust_remote_code=True)' in card.text
    assert card.data.eval_results[0].metric_value == 0.8
    assert card.data.license == "mit"
    log = hub.log()
    assert any(request["path"] == "/api/validate-yaml" for request in log)
    uploads = [request for request in log if request["origin"] == "Storage"]
    assert uploads and not any(request["token"] for request in uploads)
    assert not api.repo_info(repo).private


BY_NAME = """
import sys, torch, scap_hub
from tests.test_pruning import QUICK, images
repo, folder, out = sys.argv[1:]
probe = torch.rand(2, 3, 64, 64)
with torch.no_grad():
    assert torch.equal(scap_hub.load(repo)(probe), scap_hub.load(folder)(probe))
more = dict(finetune_epochs=0, target="macs=0.8")
results = [scap_hub.prune(name, images(classes=4), QUICK, **more) for name in (repo, folder)]
left, right = (result.model.state_dict() for result in results)
assert all(torch.equal(left[name], right[name]) for name in right)
assert results[0].loaded.labels == ["a", "b", "c", "d"] and results[0].loaded.earlier == results[1].loaded.earlier
results[0].save_pretrained(out)
print(len(scap_hub.channel_groups(f"hf-hub:{repo}")))
"""


def test_a_pruned_model_is_loaded_and_pruned_again_by_its_name(hub, folder, repo, tmp_path):
    push_to_hub(folder, repo, token="hf_write")
    command = [sys.executable, "-c", BY_NAME, repo, str(folder), str(tmp_path / "out")]
    done = subprocess.run(command, env=hub.environment(tmp_path / "home"), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 5 and (tmp_path / "out" / "pruning_plan.json").is_file()


def test_private_repositories_stay_private(api, folder, repo, hub):
    push_to_hub(folder, repo, private=True, token="hf_write")
    assert api.model_info(repo).private
    with pytest.raises(Exception, match=r"not found|401|404"):
        HfApi(endpoint=hub.endpoint, token="hf_other").model_info(repo)
    with pytest.raises(PublishError, match="may not write"):
        push_to_hub(folder, repo, token="hf_other")


def test_branches_and_pull_requests(hub, api, folder, repo):
    assert push_to_hub(folder, repo, revision="v2", token="hf_write") == f"{hub.endpoint}/{repo}/tree/v2"
    assert names(api, repo) == set()
    assert names(api, repo, "v2") == SAVED
    assert push_to_hub(folder, repo, create_pr=True, token="hf_write").endswith(f"{repo}/discussions/1")
    assert names(api, repo) == set()
    assert names(api, repo, "refs/pr/1") == SAVED
    # A pull request can be pushed to as well.
    push_to_hub(folder, repo, revision="refs/pr/1", token="hf_write")


def test_foreign_files_stay_and_the_card_keeps_what_people_wrote(api, folder, repo, tmp_path):
    api.create_repo(repo)
    api.upload_file(path_or_fileobj=b"mine", path_in_repo="notes/data.txt", repo_id=repo)
    written = "---\nlicense: cc-by-4.0\nlanguage: de\ntags: [mine]\n---\n# My words\n"
    api.upload_file(path_or_fileobj=written.encode(), path_in_repo="README.md", repo_id=repo)
    push_to_hub(folder, repo, token="hf_write")
    assert names(api, repo) == SAVED | {"notes/data.txt"}
    card = ModelCard(readme(api, repo, tmp_path))
    assert card.text.strip().startswith("# My words") and card.text.count(BEGIN) == 1
    assert (card.data.license, card.data.to_dict()["language"]) == ("cc-by-4.0", "de")
    assert set(card.data.tags) == {"mine", "scap_hub", "pruning", "image-classification"}
    # A person adds a line below our block and spoils the block; the next push repairs the block only.
    text = readme(api, repo, tmp_path).replace("## Limits", "## No limits") + "\nBelow.\n"
    api.upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id=repo)
    push_to_hub(folder, repo, token="hf_write")
    again = readme(api, repo, tmp_path)
    assert "# My words" in again and again.rstrip().endswith("Below.")
    assert "## Limits" in again and "No limits" not in again and again.count(END) == 1


@pytest.mark.parametrize(
    "theirs",
    [
        "",
        "no metadata",
        "---\n: [broken\n---\nbody",
        "---\r\nlicense: mit\r\n---\r\nbody",
        "---\ntags: [{a: 1}, mine]\n---\nbody",
    ],
)
def test_any_card_can_be_merged(theirs):
    merged = merged_card(theirs, f"---\nlicense: apache-2.0\n---\n\n{BEGIN}\nours\n{END}\n")
    assert merged.count(BEGIN) == 1 and ModelCard(merged).data.license in ("mit", "apache-2.0")
    assert merged_card(merged, f"{BEGIN}\nnew\n{END}").count(BEGIN) == 1
    assert ("body" in merged) == ("body" in theirs)


@pytest.mark.parametrize(
    ("match", "action", "times"),
    [
        ("/commit/", "500", 2),
        ("/commit/", "drop", 1),
        ("/commit/", "412", 1),
        ("repos/create", "500", 1),
        ("/preupload/", "drop", 1),
        ("info/lfs/objects/batch", "500", 1),
        (STORED, "500", 2),
        (STORED, "drop", 1),
    ],
)
def test_failures_that_pass(hub, api, new_weights, repo, match, action, times, tmp_path):
    hub.fail(match, action, times, "PUT" if match == STORED else "POST")
    push_to_hub(new_weights, repo, token="hf_write", commit_message="Once")
    assert titles(api, repo) == ["Once", "initial commit"]
    assert names(api, repo) == SAVED
    got = api.hf_hub_download(repo, "model.safetensors", cache_dir=tmp_path / "cache")
    assert Path(got).read_bytes() == (new_weights / "model.safetensors").read_bytes()


def test_a_broken_download_goes_on_where_it_stopped(hub, api, new_weights, repo, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1024)
    push_to_hub(new_weights, repo, token="hf_write")
    weights = (new_weights / "model.safetensors").read_bytes()
    hub.fail(STORED, "half", method="GET")
    with contextlib.suppress(HTTPError):  # huggingface_hub 1.3 goes on only when it is asked again
        api.hf_hub_download(repo, "model.safetensors", cache_dir=tmp_path / "cache")
    got = api.hf_hub_download(repo, "model.safetensors", cache_dir=tmp_path / "cache")
    assert Path(got).read_bytes() == weights
    first, second = [entry["range"] for entry in hub.log() if entry["path"].endswith(sha256(weights).hexdigest())][-2:]
    assert first is None and 0 < int(re.fullmatch(r"bytes=(\d+)-", second)[1]) < len(weights)


def test_shards_replace_a_single_file_and_the_other_way_round(api, repo, tmp_path, monkeypatch):
    loaded = {}
    for share, shard in ((0.3, "5GB"), (0.5, "5KB"), (0.7, "8KB"), (0.9, "5GB")):
        monkeypatch.setattr("scap_hub.hub.checkpoint.SHARD", shard)
        small, dense, plan = pruned(tiny_resnet(), share)
        folder = save_checkpoint(tmp_path / f"{share}", small, dense, plan)
        push_to_hub(folder, repo, token="hf_write")
        weights = {path.name for path in folder.glob("model[.-]*")}
        assert {name for name in names(api, repo) if name.startswith(("model.", "model-"))} == weights
        loaded[share] = len(weights)
        got = api.snapshot_download(repo, cache_dir=tmp_path / "cache")
        assert torch.equal(run(load(got)), run(small))
    assert loaded[0.3] == loaded[0.9] == 1 and min(loaded[0.5], loaded[0.7]) > 2
    next((tmp_path / "0.5").glob("model-*")).unlink()
    with pytest.raises(CheckpointError, match=r"it lacks model-0.*safetensors"):
        push_to_hub(tmp_path / "0.5", repo, token="hf_write")


def test_the_report_page_goes_along(api, folder, repo, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "report.html").write_text("<!doctype html>")
    push_to_hub(copy, repo, token="hf_write")
    assert names(api, repo) == SAVED | {"report.html"}
    assert Path(api.hf_hub_download(repo, "report.html")).read_text() == "<!doctype html>"


def test_retry_after_is_honoured(hub, api, folder, repo):
    hub.fail("/commit/", "429")
    start = time.monotonic()
    push_to_hub(folder, repo, token="hf_write")
    assert time.monotonic() - start > 1
    assert names(api, repo) == SAVED


@pytest.mark.parametrize(
    ("match", "action"),
    [("/commit/", "500"), ("/commit/", "drop"), ("/commit/", "412"), (STORED, "500"), (STORED, "drop")],
)
def test_network_gone_half_way(hub, api, new_weights, repo, match, action, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # huggingface_hub waits half a minute each time
    folder = new_weights
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.fail(match, action, 99, "PUT" if match == STORED else "POST")
    with pytest.raises(PublishError, match="nothing was published") as caught:
        push_to_hub(folder, repo, private=True, token="hf_write", revision="v2")
    message = str(caught.value)
    assert "\n" not in message and "hf_write" not in message
    assert message.endswith(f"scap-hub push {folder} {repo} --private --revision v2")
    assert names(api, repo) == names(api, repo, "v2") == set()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    # The network is back: the same call publishes.
    hub.fail("", "")
    push_to_hub(folder, repo, private=True, token="hf_write", revision="v2")
    assert names(api, repo, "v2") == SAVED


def test_a_card_that_cannot_be_read_is_not_taken_for_none(hub, api, folder, repo, monkeypatch):
    api.create_repo(repo)
    theirs = api.upload_file(path_or_fileobj=b"# Mine", path_in_repo="README.md", repo_id=repo).oid
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    nowhere = "http://127.0.0.1:9/{repo_id}/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", nowhere)
    with pytest.raises(PublishError, match=r"cannot be reached.*nothing was published"):
        push_to_hub(folder, repo, token="hf_write")
    assert api.model_info(repo).sha == theirs


@pytest.mark.parametrize(
    ("token", "name", "message"),
    [
        (False, "me/x", "no Hub token"),
        (None, "me/x", "no Hub token"),
        ("hf_bad", "me/x", "refuses this token"),
        ("hf_read", "me/x", "may only read"),
        ("hf_write", "somebody/x", "may not write"),
        ("hf_write", "me/x/y", "no Hub id"),
        ("hf_write", "me/-x-", "no Hub id"),
    ],
)
def test_who_may_not_push(api, folder, token, name, message, monkeypatch):
    monkeypatch.setattr(publish, "get_token", lambda: None)
    with pytest.raises(PublishError, match=message) as caught:
        push_to_hub(folder, name, token=token)
    assert "\n" not in str(caught.value)
    assert not api.repo_exists("me/x")


def test_a_hub_that_is_not_there(folder, monkeypatch):
    monkeypatch.setattr(publish, "HfApi", functools.partial(HfApi, endpoint="http://127.0.0.1:9"))
    with pytest.raises(PublishError, match="cannot be reached") as caught:
        push_to_hub(folder, "me/x", token="hf_write")
    assert "scap-hub push" in str(caught.value)


@pytest.mark.parametrize("present", [[], ["config.json"], ["model.safetensors"]])
def test_incomplete_folders(tmp_path, present):
    for name in present:
        (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match="no saved model"):
        push_to_hub(tmp_path, "me/x", token="hf_write")


def test_weights_that_were_cut_off_are_not_published(new_weights):
    file = new_weights / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"cannot read .*model.safetensors"):
        push_to_hub(new_weights, "me/cut-off", token="hf_write")


def test_a_config_that_contradicts_the_weights_is_not_published(api, new_weights):
    config = json.loads((new_weights / "config.json").read_text())
    (new_weights / "config.json").write_text(json.dumps(config | {"num_classes": 7}))
    with pytest.raises(PlanError, match="fc"):
        push_to_hub(new_weights, "me/contradictory", token="hf_write")
    (new_weights / "config.json").write_text(json.dumps(config | {"scap": 5}))
    with pytest.raises(CheckpointError, match="has no 'scap' entry"):
        push_to_hub(new_weights, "me/contradictory", token="hf_write")
    assert not api.repo_exists("me/contradictory")


def test_code_references_to_another_repository_are_made_our_own(api, folder, repo, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {key: f"other/repo--{value}" for key, value in config["auto_map"].items()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    push_to_hub(tmp_path, repo, token="hf_write")
    assert names(api, repo) == {"config.json", "model.safetensors", "modeling_scap.py", "README.md"}
    pushed = json.loads(Path(api.hf_hub_download(repo, "config.json")).read_text())
    assert pushed["auto_map"] == {"AutoModelForImageClassification": "modeling_scap.TimmWrapperForImageClassification"}


def test_a_result_publishes_itself(api, repo, resnet, tmp_path, monkeypatch):
    small, loaded, plan = resnet
    before, after = Measures(2000, 20, 80, 0.9, 3.0), Measures(1000, 10, 40, 0.8, 2.0)
    result = Result(small, plan, Report(before, after), Recipe.resolve(data_dataset="me/flowers"), loaded)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    result.push_to_hub(repo, token="hf_write")
    assert names(api, repo) - {"channels.png"} == SAVED | {"report.json", "report.html"}
    assert not list((tmp_path / "temporary").iterdir())
    card = ModelCard(readme(api, repo, tmp_path))
    assert card.data.datasets == ["me/flowers"]
    assert {entry.metric_type: entry.metric_value for entry in card.data.eval_results} == {
        "accuracy": 0.8, "macs": 1000, "params": 10, "bytes": 40, "latency_ms": 2.0,
    }  # fmt: skip
    with pytest.raises(PublishError) as caught:
        result.push_to_hub(repo, token="hf_read")
    kept = next((tmp_path / "temporary").iterdir()) / repo.rpartition("/")[2]
    assert str(kept) in str(caught.value)
    assert torch.equal(run(load(kept)), run(small))


def test_a_recipe_can_publish(monkeypatch, capsys):
    pushed = []
    monkeypatch.setattr(Result, "push_to_hub", lambda self, *arguments: pushed.append(arguments) or "https://me/x")
    options = {"model_input_size": (3, 64, 64), "publish_repo_id": "me/x", "publish_private": True}
    scap_hub.prune(Residual(width=16), images(), QUICK, **options)
    assert pushed == [("me/x", True)] and "published at https://me/x" in capsys.readouterr().err
