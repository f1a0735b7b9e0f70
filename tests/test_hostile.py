"""Folders of strangers: what they claim is checked before anything is built, and nothing of theirs runs."""

import json
import os
import resource
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from scap_hub.errors import CheckpointError, PlanError, RecipeError, ScapHubError
from scap_hub.hub.checkpoint import load, save_checkpoint
from scap_hub.plan import PruningPlan
from scap_hub.recipe import Recipe
from scap_hub.surgery import apply_plan
from scap_hub.zoo import load_model
from tests.test_adapters import tiny_resnet
from tests.test_checkpoint import change, pruned, run


def tiny_vit():
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=64, num_labels=3
    )
    return transformers.ViTForImageClassification(config)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of a timm model and of two of transformers', by name, with what they compute."""
    root = tmp_path_factory.mktemp("saved")
    models = {"timm": "test_vit", "transformers": tiny_resnet(), "vit": tiny_vit()}
    made = {}
    for name, model in models.items():
        small, loaded, plan = pruned(model)
        made[name] = save_checkpoint(root / name, small, loaded, plan), run(small)
    return made


@pytest.fixture
def copy_of(saved, tmp_path):
    def copied(name):
        target = tmp_path / name
        target.mkdir()
        for path in saved[name][0].iterdir():
            (target / path.name).write_bytes(path.read_bytes())
        return target

    return copied


def large_resnet(config):
    config.update(hidden_sizes=[10**6] * len(config["hidden_sizes"]))


def many_labels(config):
    config.update(num_labels=10**8)
    for name in ("id2label", "label2id"):
        config.pop(name, None)


CLAIMS = {
    "wide transformers": ("transformers", large_resnet),
    "deep transformers": ("transformers", lambda c: c.update(depths=[10**5] * len(c["depths"]))),
    "many labels": ("transformers", many_labels),
    "deep vit": ("vit", lambda c: c.update(num_hidden_layers=10**5)),
    "wide vit": ("vit", lambda c: c.update(intermediate_size=5 * 10**5)),
    "large images": ("vit", lambda c: c.update(image_size=400_000)),
    "wide timm": ("timm", lambda c: c["model_args"].update(embed_dim=10**6, num_heads=10)),
    "deep timm": ("timm", lambda c: c["model_args"].update(depth=10**5)),
    "a wide ratio": ("timm", lambda c: c["model_args"].update(mlp_ratio=1e12)),
    "many classes": ("timm", lambda c: c.update(num_classes=10**8)),
    "another model": ("timm", lambda c: c["model_args"].update(base="vit_giant_patch14_224")),
}

MEASURE = """
import json, resource, sys, time, warnings
warnings.simplefilter("ignore")
import timm, transformers, torch, scap_hub
from scap_hub.hub.checkpoint import load
load(sys.argv[1])
for folder in sys.argv[2:]:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        load(folder)
        told = ""
    except scap_hub.ScapHubError as error:
        told = str(error)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps([told, grown * 1024, time.process_time() - start]), flush=True)
"""


def test_a_config_that_claims_more_than_its_weights_takes_no_memory_and_no_time(saved, copy_of, tmp_path):
    folders = []
    for number, (name, edit) in enumerate(CLAIMS.values()):
        folder = copy_of(name).rename(tmp_path / str(number))
        change(folder / "config.json", edit)
        folders.append(folder)
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE, saved["vit"][0], *folders], capture_output=True, text=True, timeout=550
    )
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(rows) == len(CLAIMS), ran.stderr[-2000:]
    for claim, (told, grown, seconds) in zip(CLAIMS, rows, strict=True):
        assert told and "\n" not in told, claim
        assert grown < 300e6 and seconds < 20, (claim, told, grown, seconds)


WATCH = """
import json, sys, warnings
warnings.simplefilter("ignore")
import timm, transformers, scap_hub
from scap_hub.hub.checkpoint import load
honest, hostile = sys.argv[1:]
load(honest)
seen, watching = [], False
def watch(event, arguments):
    if watching and event.split(".")[0] in ("exec", "import", "socket", "subprocess", "os", "compile", "open"):
        told = str(arguments[0])
        # The libraries look up their own versions in what is installed.
        known = told.startswith((hostile, sys.prefix, sys.base_prefix))
        if not (event == "open" and known) and event not in ("os.listdir", "os.scandir"):
            seen.append([event, told])
sys.addaudithook(watch)
watching = True
model = load(hostile)
watching = False
print(json.dumps([seen, str(vars(model.config))]))
"""


def huge_images(config):
    config["scap"]["preprocessing"]["input_size"] = [3, 10**30, 64]


def no_images(config):
    config["scap"]["preprocessing"]["input_size"] = [3, 0, 64]


def strange_type(config):
    config["dtype"] = "nothing"


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        *(("transformers", edit) for edit in (huge_images, no_images, strange_type)),
        ("timm", lambda c: c["pretrained_cfg"].update(input_size=None)),
        ("timm", lambda c: c["pretrained_cfg"].update(mean=[])),
        ("timm", lambda c: c.update(label_names=3.5)),
    ],
)
def test_values_that_a_library_takes_and_fails_on_later_are_one_line(copy_of, name, edit):
    folder = copy_of(name)
    change(folder / "config.json", edit)
    with pytest.raises(ScapHubError) as caught:
        load(folder)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("name", [pytest.param("transformers", marks=pytest.mark.slow), "vit"])
def test_a_config_runs_opens_and_reaches_nothing(saved, copy_of, name):
    folder = copy_of(name)
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    evil = {
        "attn_implementation": "me/kernels", "_attn_implementation": "me/kernels", "use_kernels": True,
        "_attn_implementation_internal": "me/kernels", "kernel_config": {"Linear": "me/kernels:Layer"},
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForImageClassification": "me/it--evil.Model"},
        "quantization_config": {"quant_method": "gptq", "bits": 4}, "custom_pipelines": {"x": {"impl": "evil.P"}},
    }  # fmt: skip
    change(folder / "config.json", lambda config: config.update(evil))
    ran = subprocess.run(
        [sys.executable, "-c", WATCH, saved[name][0], folder], capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    seen, config = json.loads(ran.stdout.splitlines()[-1])
    assert seen == [] and "me/kernels" not in config and "evil.Model" not in config
    assert torch.equal(run(load(folder)), saved[name][1])


def test_weights_that_are_not_finite_are_refused_unless_asked_for(saved, copy_of, tmp_path):
    folder = copy_of("timm")
    tensors = load_file(folder / "model.safetensors")
    tensors["patch_embed.proj.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'patch_embed\.proj\.weight' holds NaN.*allow_nan=True"):
        load(folder)
    model = load(folder, allow_nan=True)
    assert model.patch_embed.proj.weight.isnan().any()
    loaded = load_model("test_vit", pretrained=False)
    nothing = PruningPlan(keeps=(), groups={}, tensors={})
    loaded.module.head.bias.data[0] = float("inf")
    with pytest.raises(CheckpointError, match=r"'head\.bias' holds NaN or infinite.*allow_nan=True"):
        save_checkpoint(tmp_path / "out", loaded.module, loaded, nothing)
    assert not (tmp_path / "out").exists()
    save_checkpoint(tmp_path / "out", loaded.module, loaded, nothing, allow_nan=True)


def rewritten(path, edit):
    """Edits the header of a safetensors file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def a_weight(header):
    return header["blocks.0.norm1.weight"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: rewritten(f, lambda h: a_weight(h).update(dtype="I32")),
        lambda f: rewritten(f, lambda h: a_weight(h).update(dtype="F8_E4M3")),
        lambda f: rewritten(f, lambda h: a_weight(h).update(dtype="F64")),
        lambda f: rewritten(f, lambda h: a_weight(h).update(data_offsets=h["blocks.0.norm1.bias"]["data_offsets"])),
        lambda f: rewritten(f, lambda h: a_weight(h).update(data_offsets=[0, 2**62])),
        lambda f: rewritten(f, lambda h: a_weight(h).update(shape=[2**62, 2**62])),
        lambda f: rewritten(f, lambda h: a_weight(h).update(shape=[-1])),
        lambda f: rewritten(f, lambda h: h.clear()),
        lambda f: f.write_bytes(f.read_bytes()[:-4]),
        lambda f: f.write_bytes(f.read_bytes() + b"more"),
        lambda f: f.write_bytes(b""),
        lambda f: f.write_bytes((2).to_bytes(8, "little") + b"[]"),
    ],
)
def test_malformed_safetensors_are_one_line(copy_of, damage):
    folder = copy_of("timm")
    damage(folder / "model.safetensors")
    with pytest.raises(ScapHubError) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_mixed_precision_is_loaded_as_it_was_saved(copy_of):
    folder = copy_of("timm")
    tensors = load_file(folder / "model.safetensors")
    tensors["head.weight"] = tensors["head.weight"].double()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = load(folder)
    assert (model.head.weight.dtype, model.head.bias.dtype) == (torch.float64, torch.float32)
    assert torch.equal(model.head.weight, tensors["head.weight"])


class Gated(nn.Module):
    """Widths of 1 would be repeated here without a word."""

    def __init__(self):
        super().__init__()
        self.a, self.gate, self.scale = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Parameter(torch.ones(8, 1, 1))
        self.b, self.slope, self.head = nn.Conv2d(8, 8, 1), nn.PReLU(8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.slope(self.b(self.a(x) * self.gate(x).sigmoid() * self.scale))
        return self.head(x.mean((2, 3)))


INCOMPLETE = {
    "gate": {"gate.weight": [8, 3, 1, 1], "gate.bias": [8]},
    "scale": {"scale": [8, 1, 1]},
    "slope": {"slope.weight": [8]},
    "a branch": {"a.weight": [8, 3, 1, 1], "a.bias": [8]},
}
WIDTHS = {"gate": {"out_channels": 1}, "slope": {"num_parameters": 1}, "a": {"out_channels": 1}}


@pytest.mark.parametrize("cut", INCOMPLETE)
def test_a_tensor_that_is_cut_without_its_partners_is_refused(cut, tmp_path):
    tensors = {name: {"shape": shape, "keep": {0: 0}} for name, shape in INCOMPLETE[cut].items()}
    attributes = {path: own for path, own in WIDTHS.items() if f"{path}.weight" in tensors}
    plan = PruningPlan(keeps=("0",), groups={}, tensors=tensors, attributes=attributes)
    dense = Gated()
    small = apply_plan(dense, plan)
    small(torch.randn(2, 3, 4, 4))  # it runs, and is wrong
    folder = save_checkpoint(tmp_path / "out", small, load_model(dense, input_size=(3, 4, 4)), plan)
    with pytest.raises(PlanError, match=r"does not fit together.* repeats a single channel"):
        load(folder, model=dense)


def test_a_layer_keeps_the_same_channels_of_all_its_tensors():
    cuts = {"weight": 0, "bias": 1, "running_mean": 0, "running_var": 0}
    tensors = {f"0.{name}": {"shape": [8], "keep": {0: entry}} for name, entry in cuts.items()}
    plan = PruningPlan(keeps=("0-3", "4-7"), groups={}, tensors=tensors, attributes={"0": {"num_features": 4}})
    with pytest.raises(PlanError, match="keeps different channels of the tensors of '0'"):
        apply_plan(nn.Sequential(nn.BatchNorm2d(8)), plan)


def test_only_channel_numbers_are_renumbered():
    tensors = {"0.weight": {"shape": [8], "refers": 0}}
    plan = PruningPlan(keeps=("0-3",), groups={}, tensors=tensors)
    with pytest.raises(PlanError, match=r"renumbers '0\.weight', which holds no channel numbers"):
        apply_plan(nn.Sequential(nn.BatchNorm2d(8)), plan)


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [1,1,1]\nb: &b [*a,*a,*a]\nc: [*b,*b,*b]\n", "seed: &x 1\nfinetune: {epochs: *x}\n",
        "[" * 50_000, "a: " + "{b: " * 2000, "- " * 3000, "seed: " + "9" * 5000, "seed: " + "9" * 4000,
        "finetune: {learning_rate: .inf}", "repair: {ridge: .nan}", "repair: {ridge: 1e999}", "seed: -.inf",
        "finetune: {epochs: yes}", "seed: true", "seed: !!int ''", "seed: !!int abc", "seed: !!float x",
        "seed: !!timestamp x", "seed: !!bool x", "seed: !!binary '*'", "seed: 2001-99-99", "? [a, b]\n: 1\n",
        "? {a: b}\n: 1\n", "seed: !!python/name:os.system", "!!python/object:os.x {}", "<<: 3", "\x00", "\ufeff\ufeff",
        "seed: 1\n--- \nseed: 2\n", "%YAML 9.9\n---\nseed: 1", "*a", "seed: !!set {a}", "seed: !!omap [a: 1]",
        "criterion: {options: {a: " + "9" * 4000 + "}}", "x" * 2**21,
    ],
)  # fmt: skip
def test_hostile_recipes_are_one_line(text, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text.encode())
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize("folder", [".", "/proc/scap_hub/out", "/"])
def test_a_place_that_cannot_be_written_is_told_in_one_line(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small, loaded, plan = pruned("test_resnet")
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(folder, small, loaded, plan)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs a limit on the size of files")
def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    small, loaded, plan = pruned("test_resnet")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, hard))
    try:
        with pytest.raises(CheckpointError, match="cannot write") as caught:
            save_checkpoint(tmp_path / "out", small, loaded, plan)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value) and not os.listdir(tmp_path)
    assert torch.equal(run(load(save_checkpoint(tmp_path / "out", small, loaded, plan))), run(small))
