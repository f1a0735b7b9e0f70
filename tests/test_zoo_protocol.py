"""The seam between zoos and the rest: a zoo that nobody else has heard of, and models whose outputs are unusual."""

import json
import subprocess
import sys

import pytest
import timm
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

import scap_hub
from scap_hub.channels import channel_groups
from scap_hub.errors import CheckpointError, ModelError
from scap_hub.hub.checkpoint import load, save_checkpoint
from scap_hub.plan import PruningPlan
from scap_hub.surgery import apply_plan
from scap_hub.zoo import Door, LoadedModel, Uniform, Zoo, load_model, register, registry, zoo_named
from scap_hub.zoo.base import default_preprocessing
from scap_hub.zoo.described import narrowed
from tests.test_pruning import QUICK, images

SIZE = (3, 64, 64)


class Brick(nn.Module):
    """A model of the toy zoo: it says how wide its features are, which its forward pass does not read."""

    def __init__(self, stem=8, width=16, classes=5):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, stem, 3, stride=2), nn.BatchNorm2d(stem), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(stem, width, 3, stride=2), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Linear(width, classes)
        self.feature_width = width

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


class ToyZoo(Zoo):
    """Names such as "brick-16"; config.json has the entry "brick"."""

    name = "toy"

    def knows_name(self, name):
        return name.startswith("brick-")

    def nearest(self, name):
        return ["brick-16"] if name.startswith("brick") else []

    def knows_config(self, config):
        return "brick" in config

    def knows_module(self, module):
        return isinstance(module, Brick)

    def from_name(self, name, wanted):
        module = Brick(width=int(name.partition("-")[2]), classes=wanted.num_classes or 5)
        return self.from_module(module, name, wanted.input_size)

    def from_folder(self, folder, config, source, wanted):
        module = self.rebuild(config)
        module.load_state_dict(load_file(folder / "model.safetensors"))
        return self.from_module(module, source, wanted.input_size)

    def from_module(self, module, source, input_size):
        classes = module.head.out_features
        sizes = {"stem": module.stem[0].out_channels, "width": module.body[0].out_channels, "classes": classes}
        return LoadedModel(
            module=module.eval(),
            zoo=self,
            name="Brick",
            source=source,
            preprocessing=default_preprocessing(input_size or SIZE),
            num_classes=classes,
            config={"brick": sizes},
        )

    def rebuild(self, config):
        return Brick(**config["brick"])

    def doors(self, place, loaded):
        return [Door("import toy", f'model = toy.brick("{place}")')]

    def widths(self, model, dense, small):
        width = narrowed(model.feature_width, dense.calls["body"][1], small.calls["body"][1])
        return {**super().widths(model, dense, small), "": {"feature_width": width}}

    def uniform(self, loaded, shapes):
        sizes = {"stem": shapes["stem.0.weight"][0], "width": shapes["body.0.weight"][0]}
        config = {"brick": {**loaded.config["brick"], **sizes}}
        return Uniform(sizes, config, self.rebuild(config))


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(registry, "_ZOOS", list(registry._ZOOS))
    zoo = ToyZoo()
    register(zoo)
    return zoo


def answer(model):
    with torch.no_grad():
        return model(torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(0)))


def test_a_zoo_of_one_s_own_goes_all_the_way(toy, tmp_path):
    result = scap_hub.prune("brick-24", images(), QUICK, target="macs=0.5", output_dir=tmp_path / "out")
    assert result.loaded.zoo is toy
    again = scap_hub.load(tmp_path / "out")
    assert type(again) is Brick and torch.equal(answer(again), answer(result.model))
    assert again.feature_width == again.head.in_features < 24

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["scap"]["library"] == "toy" and config["brick"]["width"] == 24
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: toy" in card and 'model = toy.brick("path/to/this/folder")' in card
    # It promises no code of ours in the repository, so there is none, and the card does not offer it.
    assert not (tmp_path / "out" / "modeling_scap.py").exists() and "Without scap_hub" not in card

    second = scap_hub.prune(str(tmp_path / "out"), images(), QUICK, target="macs=0.7", output_dir=tmp_path / "second")
    assert second.loaded.zoo is toy and second.loaded.config == {"brick": result.loaded.config["brick"]}
    assert torch.equal(answer(scap_hub.load(tmp_path / "second")), answer(second.model))


def test_its_modules_and_folders_are_recognised(toy, tmp_path):
    module = Brick(width=12)
    assert load_model(module).zoo is toy
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"brick": {"width": 12}}))
    loaded = load_model(tmp_path)
    assert loaded.zoo is toy and torch.equal(answer(loaded.module), answer(module.eval()))
    module.head = nn.Sequential(nn.Linear(12, 5))
    module.head.out_features = 5
    with pytest.warns(UserWarning, match="not what toy builds"):
        assert not load_model(module).zoo.rebuilds
    with pytest.raises(ModelError, match="unknown model 'brick': did you mean 'brick-16'"):
        load_model("brick")
    assert load_model(timm.create_model("test_resnet")).zoo.name == "timm"


def test_its_uniform_layout_needs_nothing_of_ours(toy, tmp_path):
    options = {"target": "ratio=0.5", "round_to": 1, "publish_layout": "uniform", "criterion": "l1"}
    result = scap_hub.prune("brick-16", images(), QUICK, output_dir=tmp_path / "out", **options)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["brick"] == {"stem": 4, "width": 8, "classes": 5}
    plain = toy.rebuild(config).eval()
    plain.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    assert torch.equal(answer(plain), answer(result.model))
    assert torch.equal(answer(scap_hub.load(tmp_path / "out")), answer(result.model))


def test_without_its_zoo_a_checkpoint_says_what_is_missing(tmp_path, monkeypatch):
    with monkeypatch.context() as context:
        context.setattr(registry, "_ZOOS", [ToyZoo(), *registry._ZOOS])
        loaded = load_model("brick-16")
        groups = channel_groups(loaded.module, torch.zeros(1, *SIZE))
        plan = PruningPlan.from_keep(groups, {"stem.0": [1, 2]})
        save_checkpoint(tmp_path / "out", apply_plan(loaded.module, plan), loaded, plan)
    with pytest.raises(CheckpointError, match=r"no zoo 'toy'.*scap_hub\.zoo\.register"):
        load(tmp_path / "out")


def test_names_of_zoos_are_unique(toy):
    with pytest.raises(ModelError, match="there is a zoo 'toy' already"):
        register(ToyZoo())
    with pytest.raises(ModelError, match="no zoo 'tim'; did you mean 'timm'"):
        zoo_named("tim")


def test_recognising_a_module_imports_no_zoo():
    code = (
        "import sys, torch, scap_hub; from scap_hub.zoo import load_model, zoo_of\n"
        "net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())\n"
        "assert zoo_of(net).name == load_model(net).zoo.name == 'module'\n"
        "assert not {'timm', 'transformers', 'huggingface_hub'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def detr(kind="Detr", **options):
    backbone = hf.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 1, 1], out_features=["stage4"]
    )
    config = getattr(hf, f"{kind}Config")(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, d_model=16,
        encoder_layers=1, decoder_layers=1, encoder_ffn_dim=24, decoder_ffn_dim=24, encoder_attention_heads=2,
        decoder_attention_heads=2, num_queries=5, num_labels=3, **options,
    )  # fmt: skip
    return getattr(hf, f"{kind}ForObjectDetection")(config)


def mask2former():
    backbone = hf.SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2, image_size=64,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = hf.Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_layers=1,
        encoder_feedforward_dim=24, decoder_layers=2, dim_feedforward=24, num_attention_heads=2, num_queries=5,
        num_labels=3,
    )  # fmt: skip
    return hf.Mask2FormerForUniversalSegmentation(config)


def resnet(**options):
    return hf.ResNetForImageClassification(
        hf.ResNetConfig(hidden_sizes=[16, 24], depths=[1, 1], embedding_size=8, **options)
    )


@pytest.mark.parametrize(
    "build",
    [
        detr,
        lambda: detr("ConditionalDetr"),
        pytest.param(mask2former, marks=pytest.mark.slow),
        lambda: resnet(return_dict=False),
    ],
)
def test_outputs_without_hidden_states(build):
    model, x = build().eval(), torch.randn(1, *SIZE)
    groups = channel_groups(model, x)
    keep = {g.name: range(0, g.size, 2) for g in groups if g.prunable and g.constraint is None}
    assert keep
    plan = PruningPlan.from_keep(groups, keep)
    assert scap_hub.verify(model, plan, x) < 1e-9
