"""Saving pruned models, and loading them back exactly."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import MobileNetV2ImageProcessor

from scap_hub.channels import channel_groups
from scap_hub.errors import CheckpointError, ModelError, PlanError, ScapHubError
from scap_hub.hub.card import Measured, model_card
from scap_hub.hub.checkpoint import check_output, input_size, is_pruned, load, save_checkpoint
from scap_hub.plan import PruningPlan
from scap_hub.surgery import apply_plan
from scap_hub.zoo import load_model, logits
from tests.test_adapters import TRANSFORMERS, tiny_resnet

SIZE = (3, 64, 64)


def pruned(model, share=0.5, **options):
    """(pruned model, loaded, plan), with random weights and random channels gone."""
    loaded = load_model(model, pretrained=False, input_size=SIZE, **options)
    for tensor in loaded.module.state_dict().values():
        if tensor.ndim < 2 and tensor.is_floating_point():  # norms, whose initial values hide mistakes
            tensor.uniform_(0.5, 1.5)
    groups = channel_groups(loaded.module, torch.zeros(1, *SIZE))
    generator = torch.Generator().manual_seed(0)
    keep = {
        group.name: torch.randperm(group.size, generator=generator)[: max(1, int(share * group.size))].tolist()
        for group in groups
        if group.prunable and group.constraint is None
    }
    plan = PruningPlan.from_keep(groups, keep)
    return apply_plan(loaded.module, plan).eval(), loaded, plan


def run(model):
    images = torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return logits(model(images.to(next(model.parameters()).dtype)))


@pytest.fixture(scope="module")
def resnet():
    return pruned("test_resnet", num_classes=4, labels=["a", "b", "c", "d"])


@pytest.fixture
def folder(resnet, tmp_path):
    return save_checkpoint(tmp_path / "out", *resnet, recipe_yaml="target: macs=0.5\n")


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "convnext_atto"])
def test_timm_round_trip_is_exact(name, tmp_path):
    small, loaded, plan = pruned(name, num_classes=5)
    again = load(save_checkpoint(tmp_path / "out", small, loaded, plan))
    assert not again.training
    assert type(again) is type(small)
    assert torch.equal(run(again), run(small))
    assert sum(p.numel() for p in again.parameters()) < 0.6 * sum(p.numel() for p in loaded.module.parameters())
    assert again.num_features == again.get_classifier().in_features  # what a new head is built with
    again.reset_classifier(3)
    assert run(again).shape == (2, 3)


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_transformers_round_trip_is_exact(kind, tmp_path):
    small, loaded, plan = pruned(TRANSFORMERS[kind]())
    again = load(save_checkpoint(tmp_path / "out", small, loaded, plan))
    assert torch.equal(run(again), run(small))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == kind
    assert config["architectures"] == [type(small).__name__]
    assert "scap" in config


def test_fresh_processes_agree_to_the_last_bit(resnet, folder, tmp_path):
    code = (
        "import sys, torch; from scap_hub.hub.checkpoint import load;"
        "images = torch.load(sys.argv[2]);"
        "torch.save(load(sys.argv[1])(images).detach(), sys.argv[3])"
    )
    images, output = tmp_path / "images.pt", tmp_path / "logits.pt"
    torch.save(torch.randn(2, *SIZE), images)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code, folder, images, output], check=True, env=environment)
    with torch.no_grad():
        assert torch.equal(torch.load(output), resnet[0](torch.load(images)))


def test_plain_module_needs_its_owner(tmp_path):
    def build():
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(8, 3),
        )  # fmt: skip

    small, loaded, plan = pruned(build())
    out = save_checkpoint(tmp_path / "out", small, loaded, plan)
    assert json.loads((out / "config.json").read_text()).keys() == {"scap"}
    dense = build()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    assert torch.equal(run(load(out, model=dense)), run(small))
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
    with pytest.raises(ModelError, match="model=dense"):
        load(out)
    with pytest.raises(PlanError):
        load(out, model=nn.Sequential(nn.Conv2d(3, 6, 3)))


def test_buffers_outside_the_state_dict(tmp_path):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3)
            self.register_buffer("scale", torch.arange(8.0).view(8, 1, 1) + 0.1, persistent=False)
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            return self.head((self.stem(x) * self.scale).mean((2, 3)))

    small, loaded, plan = pruned(Scaled())
    assert small.scale.shape == (4, 1, 1)
    again = load(save_checkpoint(tmp_path / "out", small.bfloat16(), loaded, plan), model=Scaled())
    assert torch.equal(again.scale, small.scale)
    assert torch.equal(run(again), run(small))


def test_shared_tensors_stay_shared(tmp_path):
    def build():
        tied = nn.Conv2d(8, 8, 3, padding=1)
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), tied, nn.Conv2d(8, 8, 3), head)
        model[4].weight = tied.weight
        return model

    loaded = load_model(build(), input_size=SIZE)
    plan = PruningPlan.from_keep(channel_groups(loaded.module, torch.zeros(1, *SIZE)), {"0": [0, 3, 6]})
    small = apply_plan(loaded.module, plan).eval()
    again = load(save_checkpoint(tmp_path / "out", small, loaded, plan), model=build())
    assert again[3].weight is again[4].weight
    assert torch.equal(run(again), run(small))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("model", ["resnetblur18", "transformers"])
def test_dtype_is_kept(dtype, model, tmp_path):
    small, loaded, plan = pruned(tiny_resnet() if model == "transformers" else model)
    out = save_checkpoint(tmp_path / "out", small.to(dtype), loaded, plan)
    again = load(out)
    for (name, ours), theirs in zip(small.named_buffers(), again.buffers(), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name
    for (name, ours), theirs in zip(small.named_parameters(), again.parameters(), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name


def test_channels_last_weights_are_saved(resnet, tmp_path):
    small, loaded, plan = resnet
    expected = run(small)
    other = apply_plan(loaded.module, plan)
    other.load_state_dict(small.state_dict())
    out = save_checkpoint(tmp_path / "out", other.to(memory_format=torch.channels_last), loaded, plan)
    assert torch.equal(run(load(out)), expected)


def test_folder_layout(resnet, folder):
    small, _, plan = resnet
    assert {path.name for path in folder.iterdir()} == {
        "model.safetensors",
        "config.json",
        "modeling_scap.py",
        "pruning_plan.json",
        "recipe.yaml",
    }
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(small.state_dict())
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "scap_pruned"
    assert config["model_args"]["base"] == "test_resnet"
    assert "num_classes" not in config["model_args"]  # transformers' timm wrapper passes it itself
    assert config["num_classes"] == 4
    assert config["num_features"] == small.get_classifier().in_features
    assert config["label_names"] == ["a", "b", "c", "d"]
    timm.models.PretrainedCfg(**config["pretrained_cfg"])  # refuses unknown keys
    assert PruningPlan.from_json((folder / "pruning_plan.json").read_text()) == plan
    assert load(folder).pretrained_cfg["label_names"] == ["a", "b", "c", "d"]


def test_transformers_labels_and_image_processor(tmp_path):
    tiny_resnet().save_pretrained(tmp_path / "dense")
    MobileNetV2ImageProcessor().save_pretrained(tmp_path / "dense")
    small, loaded, plan = pruned(tmp_path / "dense", labels=["x", "y", "z"])
    out = save_checkpoint(tmp_path / "out", small, loaded, plan)
    processor = json.loads((out / "preprocessor_config.json").read_text())
    assert processor["crop_size"] == {"height": 64, "width": 64}
    assert load(out).config.id2label == {0: "x", 1: "y", 2: "z"}


def test_existing_output_is_not_touched(resnet, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        save_checkpoint(tmp_path / "out", *resnet)
    with pytest.raises(CheckpointError, match="is no folder"):
        check_output(tmp_path / "out" / "mine.txt")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]
    (tmp_path / "empty").mkdir()
    save_checkpoint(tmp_path / "empty", *resnet)
    assert (tmp_path / "empty" / "config.json").is_file()


def test_failed_save_leaves_nothing(resnet, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("scap_hub.hub.checkpoint.save_torch_model", fail)
    with pytest.raises(CheckpointError, match="No space left"):
        save_checkpoint(tmp_path / "out", *resnet)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot write"):
        save_checkpoint(tmp_path / "file" / "out", *resnet)


def edit(path, **changes):
    document = json.loads(path.read_text())
    document["scap"] |= changes
    path.write_text(json.dumps(document))


def other_plan():
    cut = {"shape": [4, 96], "keep": {1: 0}}
    plan = PruningPlan(keeps=["0"], groups={}, tensors={"fc.weight": cut}, attributes={"fc": {"in_features": 1}})
    return plan.to_json()


def edit_weights(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json"),
        (lambda f: (f / "config.json").write_text("{"), "not JSON"),
        (lambda f: (f / "config.json").write_text('{"architecture": "resnet18"}'), "not a pruned model"),
        (lambda f: edit(f / "config.json", version=99), "upgrade scap_hub"),
        (lambda f: edit(f / "config.json", library="mystery"), "mystery"),
        (lambda f: edit(f / "config.json", library="transformers"), "architectures"),
        (lambda f: edit(f / "config.json", buffer_dtypes={"conv1.weight": "load"}), "does not fit"),
        (lambda f: (f / "pruning_plan.json").write_text(other_plan()), "different models"),
        (lambda f: (f / "pruning_plan.json").write_text("[]"), "plan"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04pickle"), "cannot read"),
        (lambda f: edit_weights(f / "model.safetensors", lambda t: t.pop("fc.bias")), "fc.bias"),
        (lambda f: edit_weights(f / "model.safetensors", lambda t: t.update(extra=torch.ones(1))), "extra"),
        (lambda f: edit_weights(f / "model.safetensors", lambda t: t.update({"fc.bias": torch.ones(9)})), "fc.bias"),
    ],
)
def test_damaged_checkpoints(folder, damage, message):
    damage(folder)
    with pytest.raises(ScapHubError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def change(path, edit):
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_links_that_lead_back_to_themselves_are_one_line(folder, name):
    (folder / name).unlink()
    (folder / name).symlink_to(name)
    with pytest.raises(CheckpointError, match="symbolic links"):
        load(folder)


@pytest.mark.parametrize("name", ["config.json", "pruning_plan.json", "model.safetensors"])
def test_links_stay_in_the_folder_or_in_its_cached_repository(resnet, folder, name, tmp_path):
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="leads out of"):
        load(folder)
    snapshot = tmp_path / "models--me--it" / "snapshots" / "0"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    (snapshot.parents[1] / "blobs").mkdir()
    (tmp_path / "elsewhere").rename(snapshot.parents[1] / "blobs" / "1")
    (snapshot / name).unlink()
    (snapshot / name).symlink_to("../../blobs/1")
    assert torch.equal(run(load(snapshot)), run(resnet[0]))


@pytest.mark.parametrize(
    "edit",
    [
        lambda d: d["model_args"].update(base="hf-hub:me/evil"),
        lambda d: d["model_args"].update(base="local-dir:/tmp"),
        lambda d: d["model_args"].update(base="scap_pruned"),
        lambda d: d["model_args"].update(base=["resnet18"]),
        lambda d: d["model_args"]["cut"]["attributes"].setdefault("layer2.0.conv1", {}).update(stride=[1, 1]),
        lambda d: d["model_args"]["cut"]["attributes"].update({"conv1": {"out_channels": 10**6}}),
        lambda d: d["model_args"]["cut"]["attributes"]["fc"].update(in_features=1),
        lambda d: d["model_args"]["cut"]["attributes"].pop("fc"),
        lambda d: d["model_args"]["cut"].update(calls={"fc": [["view", 1, 0, 4, 2]]}),
        lambda d: d.update(pretrained_cfg="resnet18"),
        lambda d: d.update(num_classes="4"),
    ],
)
def test_hostile_configs_are_refused(folder, edit):
    change(folder / "config.json", edit)
    with pytest.raises(ScapHubError) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_a_config_fetches_nothing(tmp_path):
    small, loaded, plan = pruned(tiny_resnet())
    out = save_checkpoint(tmp_path / "out", small, loaded, plan)
    kernels = {"_attn_implementation": "me/kernels", "attn_implementation": "me/kernels", "use_kernels": True}
    change(out / "config.json", lambda d: d.update(kernels, auto_map={"AutoConfig": "me/evil--code.Config"}))
    again = load(out)
    assert torch.equal(run(again), run(small))
    assert "me/" not in str(vars(again.config))


@pytest.mark.parametrize("start", [2**63, 10**8, 0])
def test_a_header_is_no_longer_than_its_file(folder, start):
    (folder / "model.safetensors").write_bytes(start.to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="cannot read"):
        load(folder)


def test_what_timm_saved_again_is_still_a_pruned_model(resnet, folder):
    config = json.loads((folder / "config.json").read_text())
    del config["scap"]  # timm keeps no entries but its own
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(run(load(folder)), run(resnet[0]))
    assert is_pruned(folder) and input_size(folder) == SIZE
    again = load_model(folder)
    assert again.preprocessing == resnet[1].preprocessing and torch.equal(run(again.module), run(resnet[0]))
    (folder / "pruning_plan.json").unlink()
    with pytest.raises(ModelError, match=r"already pruned, and .* no pruning_plan.json"):
        load_model(folder)


@pytest.mark.parametrize("name", ["owner/pruned", "no-such-folder", "/no/such/folder"])
def test_missing_checkpoint(name, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="local folder"):
        load(name)


@pytest.mark.parametrize("base_model", [None, "timm/resnet18.a1_in1k"])
def test_card(resnet, base_model):
    _, loaded, plan = resnet
    loaded.base_model, loaded.license = base_model, base_model and "apache-2.0"
    measured = Measured({"macs": 2e9, "top1": 0.9, "latency_ms": None}, {"macs": 1e9, "top1": 0.895}, "digits")
    text = model_card(loaded, plan, measured, "target: macs=0.5\n")
    card = ModelCard(text)
    assert (card.data.library_name, card.data.pipeline_tag) == ("timm", "image-classification")
    assert (card.data.base_model, card.data.license) == (base_model, loaded.license)
    assert "| MACs | 2.000 G | 1.000 G | 0.50 |" in text
    assert "| Top-1 accuracy (digits) | 90.00% | 89.50% |" in text
    assert "Latency" not in text
    assert 'scap_hub.load("path/to/this/folder")' in text
    assert "target: macs=0.5" in text
    citation = re.search(r"```bibtex\n.*?\n```\n", text, re.DOTALL)[0]
    assert "eprint        = {2601.09352}" in citation
    assert citation in (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    for name, cut in plan.groups.items():
        assert f"| `{name}` | {cut.size} | {len(plan.kept(name))} |" in text
    assert "$" not in text


@pytest.mark.parametrize("made", ["test_resnet", "transformers"])
def test_the_snippets_of_a_card_work_on_the_folder_as_it_lies(made, tmp_path):
    small, loaded, plan = pruned(made, num_classes=4) if made == "test_resnet" else pruned(tiny_resnet())
    card = model_card(loaded, plan, Measured())
    folder = save_checkpoint(tmp_path / "saved" / "out", small, loaded, plan, extra_files={"README.md": card})
    text = (folder / "README.md").read_text().replace("path/to/this/folder", str(folder))
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(snippets) >= 2 and (made != "test_resnet" or any("local-dir:" in snippet for snippet in snippets))
    for snippet in snippets:
        if "trust_remote_code" not in snippet:  # the doors without scap_hub are opened in tests/test_doors.py
            found = {}
            exec(snippet, found)
            assert torch.equal(run(found["model"].eval()), run(small)), snippet
