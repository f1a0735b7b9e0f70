"""Loading models by name, from folders, and as modules."""

import importlib
import json
import time

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import nn
from transformers import (
    AriaImageProcessor,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextImageProcessor,
    DetrImageProcessor,
    GLPNImageProcessor,
    MaskFormerImageProcessor,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    MobileNetV2ImageProcessor,
    MobileViTImageProcessor,
    PerceiverImageProcessor,
    PvtConfig,
    PvtForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    TextNetImageProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from scap_hub.errors import ModelError
from scap_hub.zoo import load_model, logits, rebuild, zoo_named
from scap_hub.zoo.base import first_difference
from scap_hub.zoo.timm import private


def tiny_resnet(**options):
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **options)
    )


TRANSFORMERS = {
    "resnet": tiny_resnet,
    "convnext": lambda: ConvNextForImageClassification(
        ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1])
    ),
    "mobilenet_v2": lambda: MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.25, num_labels=5)),
}


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "convnext_atto"])
def test_timm_name_gives_a_model_that_its_config_rebuilds(name):
    loaded = load_model(name, pretrained=False, num_classes=7)
    assert (loaded.zoo.name, loaded.name, loaded.num_classes) == ("timm", name, 7)
    assert not loaded.module.training
    copy = rebuild(zoo_named("timm"), json.loads(json.dumps(loaded.config)))
    copy.load_state_dict(loaded.module.state_dict())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(copy.eval()(images), loaded.module(images))


def test_timm_preprocessing_is_the_tag_s():
    cfg = timm.get_pretrained_cfg("resnet18.a1_in1k")
    preprocessing = load_model("resnet18.a1_in1k", pretrained=False).preprocessing
    assert preprocessing.input_size == cfg.input_size
    assert (preprocessing.mean, preprocessing.std) == (cfg.mean, cfg.std)
    assert (preprocessing.interpolation, preprocessing.crop_pct) == (cfg.interpolation, cfg.crop_pct)


@pytest.mark.parametrize(("name", "size"), [("resnet18", (1, 32, 48)), ("vit_tiny_patch16_224", (1, 64, 64))])
def test_input_size_shapes_the_timm_model(name, size):
    loaded = load_model(name, pretrained=False, num_classes=3, input_size=size)
    assert loaded.preprocessing.input_size == size
    assert len(loaded.preprocessing.mean) == 1
    assert loaded.module(torch.zeros(1, *size)).shape == (1, 3)
    assert rebuild(zoo_named("timm"), loaded.config)(torch.zeros(1, *size)).shape == (1, 3)


def test_timm_folder_with_weights_and_labels(tmp_path):
    module = timm.create_model("test_resnet", num_classes=3).eval()
    save_for_hf(module, tmp_path, model_config={"label_names": ["a", "b", "c"]}, safe_serialization=True)
    images = torch.randn(1, 3, 32, 32)
    for source in (str(tmp_path), tmp_path, f"local-dir:{tmp_path}"):
        loaded = load_model(source)
        assert (loaded.zoo.name, loaded.name, loaded.labels) == ("timm", "test_resnet", ["a", "b", "c"])
        with torch.no_grad():
            assert torch.equal(loaded.module(images), module(images))
    assert load_model(tmp_path, num_classes=5).module(images).shape == (1, 5)
    assert load_model(tmp_path, num_classes=5).labels is None
    assert str(tmp_path) not in json.dumps(loaded.config)


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_transformers_folder_and_module(kind, tmp_path):
    module = TRANSFORMERS[kind]().eval()
    module.save_pretrained(tmp_path)
    images = torch.randn(1, 3, 64, 64)
    for source in (tmp_path, module):
        loaded = load_model(source)
        assert (loaded.zoo.name, loaded.name) == ("transformers", type(module).__name__)
        assert loaded.num_classes == module.config.num_labels
        copy = rebuild(zoo_named("transformers"), json.loads(json.dumps(loaded.config))).eval()
        copy.load_state_dict(loaded.module.state_dict())
        with torch.no_grad():
            # Not the loaded module itself: transformers maps the file, and unaligned weights round differently.
            assert torch.equal(logits(copy(images)), logits(module(images)))


def test_a_config_may_count_its_classes_without_naming_them():
    config = PvtConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 1, 1])
    if config.id2label is not None:
        pytest.skip("transformers 5.0 names them")
    loaded = load_model(PvtForImageClassification(config))
    assert (loaded.num_classes, loaded.labels) == (config.num_labels, None)


def test_transformers_new_head_keeps_the_body(tmp_path):
    module = tiny_resnet(id2label={0: "cat", 1: "dog"})
    module.save_pretrained(tmp_path)
    assert load_model(tmp_path).labels == ["cat", "dog"]
    loaded = load_model(tmp_path, labels=["x", "y", "z"])
    assert (loaded.num_classes, loaded.labels) == (3, ["x", "y", "z"])
    assert logits(loaded.module(torch.zeros(1, 3, 32, 32))).shape == (1, 3)
    assert torch.equal(loaded.module.resnet.embedder.embedder.convolution.weight,
                       module.resnet.embedder.embedder.convolution.weight)  # fmt: skip


@pytest.mark.parametrize(
    ("processor", "size", "crop_pct", "crop_mode"),
    [
        (ConvNextImageProcessor(size={"shortest_edge": 224}, crop_pct=0.875), 224, 0.875, "center"),
        (ConvNextImageProcessor(size={"shortest_edge": 384}), 384, 1.0, "squash"),
        (MobileNetV2ImageProcessor(), 224, 224 / 256, "center"),
        (ViTImageProcessor(size={"height": 96, "width": 96}), 96, 1.0, "squash"),
    ],
)
def test_transformers_preprocessing_is_the_image_processor_s(processor, size, crop_pct, crop_mode, tmp_path):
    tiny_resnet().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.preprocessing.input_size == (3, size, size)
    assert (loaded.preprocessing.crop_pct, loaded.preprocessing.crop_mode) == (crop_pct, crop_mode)
    assert loaded.preprocessing.mean == tuple(processor.image_mean)
    # transformers 5.0 still tells the fast ones by their names.
    assert loaded.image_processor["image_processor_type"].removesuffix("Fast") == type(processor).__name__

    smaller = load_model(tmp_path, input_size=(3, 64, 64))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(smaller.image_processor))
    again = load_model(tmp_path).preprocessing
    assert again.input_size == smaller.preprocessing.input_size == (3, 64, 64)
    assert again.crop_pct == pytest.approx(crop_pct, abs=0.01)  # a whole number of pixels


@pytest.mark.parametrize("processor", [GLPNImageProcessor(), DetrImageProcessor(do_normalize=False)])
def test_nothing_is_normalised_where_the_image_processor_does_not(processor, tmp_path):
    tiny_resnet().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    found = load_model(tmp_path, input_size=(3, 64, 64)).preprocessing
    assert (found.mean, found.std) == (pytest.approx((0, 0, 0)), pytest.approx((1, 1, 1)))
    assert "-" not in str(found.mean)


@pytest.mark.parametrize(
    "processor",
    [
        ConvNextImageProcessor(),  # squares alone, unless it crops
        DetrImageProcessor(),
        MaskFormerImageProcessor(),  # multiples of 32, unless told otherwise
        PerceiverImageProcessor(),
        TextNetImageProcessor(),  # always in proportion
        MobileViTImageProcessor(do_center_crop=False),
        ViTImageProcessor(
            size={"height": 256, "width": 256}, do_center_crop=True, crop_size={"height": 224, "width": 224}
        ),
    ],
)
def test_the_image_processor_of_another_size_makes_what_the_run_does(processor, tmp_path):
    tiny_resnet().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    whole = load_model(tmp_path)
    assert load_model(tmp_path, input_size=whole.preprocessing.input_size).image_processor == whole.image_processor
    smaller = load_model(tmp_path, input_size=(3, 50, 64))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(smaller.image_processor))
    image = Image.linear_gradient("L").resize((90, 70)).rotate(30)
    image = Image.merge("RGB", (image, image.rotate(60), image.rotate(200)))
    mean, std = (torch.tensor(own)[:, None, None] for own in (smaller.preprocessing.mean, smaller.preprocessing.std))
    own = type(processor).from_pretrained(tmp_path)(image, return_tensors="pt")["pixel_values"][0]
    assert (own * std + mean - smaller.zoo.pixels(smaller)(image) / 255).abs().max() < 0.01


def test_an_image_processor_that_cannot_make_a_size_is_not_taken_for_the_model_s(tmp_path):
    tiny_resnet().save_pretrained(tmp_path)
    AriaImageProcessor().save_pretrained(tmp_path)  # squares alone
    assert load_model(tmp_path, input_size=(3, 48, 64)).image_processor is None


def test_colours_are_the_image_processor_s_also_where_it_makes_several_sizes_or_the_module_was_changed(tmp_path):
    tiny_resnet().save_pretrained(tmp_path)
    MobileViTImageProcessor(size={"shortest_edge": 64}, do_center_crop=False).save_pretrained(tmp_path)
    module = ResNetForImageClassification.from_pretrained(tmp_path)
    module.classifier = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.Tanh())
    with pytest.warns(UserWarning, match="not rebuilt by name"):
        changed = load_model(module)
    for loaded in (load_model(tmp_path), changed):
        assert loaded.preprocessing.input_size == (3, 64, 64)
        blue = loaded.zoo.pixels(loaded)(Image.new("RGB", (80, 70), (255, 0, 0)))[:, 32, 32]
        assert blue.tolist() == [0, 0, 255]


def test_an_image_processor_that_does_not_resize_leaves_the_size_to_the_model(tmp_path):
    config = ViTConfig(image_size=32, patch_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    ViTForImageClassification(config).save_pretrained(tmp_path)
    ViTImageProcessor(do_resize=False).save_pretrained(tmp_path)
    assert load_model(tmp_path).preprocessing.input_size == (3, 32, 32)


def test_one_mean_of_an_image_processor_is_that_of_all_channels(tmp_path):
    tiny_resnet().save_pretrained(tmp_path)
    ViTImageProcessor(image_mean=0.5, image_std=0.25, do_resize=False).save_pretrained(tmp_path)
    found = load_model(tmp_path).preprocessing
    assert (found.mean, found.std) == ((0.5,) * 3, (0.25,) * 3)


def test_an_image_processor_that_cannot_be_loaded_is_told(tmp_path):
    tiny_resnet().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "Unknown", "image_mean": [0, 0, 0]}')
    with pytest.warns(UserWarning, match=r"cannot be loaded \(Unrecognized.*ImageNet's mean"):
        load_model(tmp_path)


def test_timm_modules_are_recognised():
    assert load_model(timm.create_model("test_resnet", num_classes=4)).zoo.name == "timm"
    direct = timm.models.resnet18(num_classes=4)  # an entrypoint, not create_model
    assert load_model(direct).zoo.name == "timm"
    new_head = timm.create_model("test_resnet")
    new_head.fc = nn.Linear(new_head.num_features, 6)
    loaded = load_model(new_head)
    assert (loaded.zoo.name, loaded.num_classes) == ("timm", 6)
    assert first_difference(rebuild(zoo_named("timm"), loaded.config), new_head) is None


@pytest.mark.parametrize(
    ("change", "layer"),
    [
        (lambda m: setattr(m, "maxpool", nn.Identity()), "maxpool"),  # no tensor tells
        (lambda m: setattr(m.conv1, "stride", (1, 1)), "conv1"),
        (lambda m: setattr(m, "fc", nn.Sequential(nn.Linear(512, 8), nn.Linear(8, 6))), "fc"),
    ],
)
def test_changed_timm_module_is_the_user_s_own(change, layer):
    module = timm.create_model("resnet18", num_classes=6)
    change(module)
    with pytest.warns(UserWarning, match=f"'{layer}.*model=<the dense model>"):
        loaded = load_model(module, input_size=(3, 64, 64))
    assert (loaded.zoo.name, loaded.num_classes) == ("module", 6)
    with pytest.raises(ModelError, match=f"{layer}.*model=dense"):
        rebuild(loaded.zoo, loaded.config)


@pytest.mark.skipif(not private.NOTES_ARGUMENTS, reason="timm notes arguments since 1.0.31")
def test_arguments_of_timm_modules_are_known():
    loaded = load_model(timm.create_model("test_resnet", num_classes=4, act_layer="silu"))
    assert (loaded.zoo.name, loaded.config["model_args"]["act_layer"]) == ("timm", "silu")


@pytest.mark.skipif(private.NOTES_ARGUMENTS, reason="timm notes arguments since 1.0.31")
@pytest.mark.parametrize("arguments", [{"act_layer": "silu"}, {"output_stride": 16}])
def test_arguments_that_timm_did_not_note_make_a_module_the_user_s_own(arguments):
    module = timm.create_model("test_resnet", **arguments)
    with pytest.warns(UserWarning, match=r"timm notes since 1\.0\.31.*pass it by name.*model=<the dense model>"):
        assert load_model(module, input_size=(3, 64, 64)).zoo.name == "module"


def test_a_setting_that_no_layer_shows_makes_a_module_the_user_s_own():
    module = timm.models.test_vit(num_classes=4)  # an entrypoint, of which timm notes nothing
    assert load_model(module).zoo.name == "timm"
    module.blocks[0].attn.fused_attn, module.blocks[0].attn.scale = False, 1.0
    with pytest.warns(UserWarning, match="forward pass"):
        assert load_model(module).zoo.name == "module"


@pytest.mark.skipif(not private.NOTES_ARGUMENTS, reason="timm notes arguments since 1.0.31")
def test_argument_that_json_cannot_hold_is_the_user_s_own():
    with pytest.warns(UserWarning, match="SiLU|silu"):
        assert load_model(timm.create_model("test_resnet", act_layer=nn.SiLU)).zoo.name == "module"


def test_changed_transformers_module_is_the_user_s_own():
    module = tiny_resnet()
    module.classifier[1] = nn.Linear(16, 9)
    with pytest.warns(UserWarning, match=r"classifier\.1"):
        loaded = load_model(module)
    assert (loaded.zoo.name, loaded.num_classes) == ("module", 9)


def test_plain_module():
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    loaded = load_model(module, labels=["a", "b", "c"])
    assert (loaded.zoo.name, loaded.num_classes, loaded.labels) == ("module", 3, ["a", "b", "c"])
    assert loaded.preprocessing.input_size == (1, 224, 224)
    with pytest.raises(ModelError, match="3 classes, not 2"):
        load_model(module, num_classes=2)
    with pytest.raises(ModelError, match="set input_size"):
        load_model(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)))
    assert load_model(nn.Conv2d(3, 4, 1)).num_classes == 0, "no classifier"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet81", "unknown model 'resnet81'.*resnet18"),
        ("resnet18.a1_in2k", "no weights 'a1_in2k'.*a1_in1k"),
        ("local-dir:/no/such/folder", "no folder"),
        ("./no-such-folder", "neither a local folder nor a Hub id"),
        ("owner/name/extra", "neither a local folder nor a Hub id"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ModelError, match=message):
        load_model(name)


def cache(repo_id, root):
    """An empty snapshot of a repo in a Hub cache."""
    repo = root / f"models--{repo_id.replace('/', '--')}"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    return snapshot


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_cached_timm_weights_need_no_network(offline):
    module = timm.create_model("resnet18").eval()
    save_file(module.state_dict(), cache("timm/resnet18.a1_in1k", offline) / "model.safetensors")
    loaded = load_model("resnet18")
    assert (loaded.base_model, loaded.license) == ("timm/resnet18.a1_in1k", "apache-2.0")
    assert torch.equal(loaded.module.fc.weight, module.fc.weight)
    assert str(offline) not in json.dumps(loaded.config)
    small = load_model("resnet18.a1_in1k", num_classes=3).module
    assert torch.equal(small.conv1.weight, module.conv1.weight)
    assert small.fc.out_features == 3


@pytest.mark.parametrize("source", ["me/mine", "hf-hub:me/mine"])
@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_cached_repos_need_no_network(source, library, offline):
    snapshot = cache("me/mine", offline)
    (snapshot / "README.md").write_text("---\nlicense: mit\n---\n")
    with pytest.raises(ModelError, match="no weights for 'me/mine'"):
        load_model(source)
    if library == "timm":
        save_for_hf(timm.create_model("test_resnet"), snapshot, safe_serialization=True)
    else:
        tiny_resnet().save_pretrained(snapshot)
    loaded = load_model(source)
    assert (loaded.zoo.name, loaded.base_model, loaded.license) == (library, "me/mine", "mit")
    assert load_model(source, pretrained=False).base_model is None


@pytest.mark.parametrize("name", ["resnet18", "owner/some-model", "hf-hub:owner/some-model@main"])
def test_no_network_fails_at_once(name, offline):
    start = time.perf_counter()
    with pytest.raises(ModelError, match=r"cannot reach the Hub.*pretrained=False") as caught:
        load_model(name)
    assert time.perf_counter() - start < 2
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "no config.json"),
        ("{", "is no JSON"),
        ('{"scap": {}}', "already pruned"),
        ('{"architecture": "resnet81"}', "unknown model 'resnet81'"),
        ('{"model_type": "no-such-type"}', "transformers cannot load"),
        ('{"model_type": "bert"}', "transformers cannot load"),
        ('{"model_type": "x", "auto_map": {"AutoConfig": "evil.Config"}}', "transformers cannot load"),
    ],
)
def test_bad_folders(config, message, tmp_path):
    (tmp_path / "evil.py").write_text("raise SystemExit('code from a folder ran')")
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("library", "config", "message"),
    [
        ("timm", {"architecture": "resnet18", "num_classes": 3, "pretrained_cfg": {}}, "model_args"),
        (
            "timm",
            {
                "architecture": "resnet18",
                "num_classes": 3,
                "pretrained_cfg": {},
                "model_args": {"checkpoint_path": "x"},
            },
            "would open files",
        ),
        ("timm", {"architecture": "no", "num_classes": 3, "pretrained_cfg": {}, "model_args": {}}, "unknown model"),
        ("transformers", {"model_type": "resnet"}, "architectures"),
        ("transformers", {"model_type": "resnet", "architectures": ["os"]}, "no model 'os'"),
        ("transformers", {"model_type": "nope", "architectures": ["ResNetForImageClassification"]}, "cannot build"),
    ],
)
def test_bad_configs_do_not_rebuild(library, config, message):
    with pytest.raises(ModelError, match=message):
        rebuild(zoo_named(library), config)


def test_features_without_a_classifier_are_described_and_rebuilt():
    loaded = load_model(timm.create_model("test_resnet", features_only=True))
    assert (loaded.zoo.name, loaded.num_classes) == ("timm", 0)
    assert first_difference(loaded.module, rebuild(loaded.zoo, loaded.config)) is None


def test_what_we_use_of_timm_beyond_its_public_api():
    """A release that takes one of these away breaks here by name."""
    made = timm.create_model("test_resnet", num_classes=3, act_layer="silu")
    private.note_model_args(made, {"act_layer": "silu"})
    assert private.get_model_args(made)["act_layer"] == "silu", f"timm {timm.__version__}"
    assert private.resolve_input_data_config(made, {})["input_size"] == made.pretrained_cfg["input_size"]
    # The file that travels with the weights asks for these itself, as it can import nothing of ours.
    for module, name in (("_hub", "download_from_hf"), ("_features", "FeatureGetterNet")):
        assert hasattr(importlib.import_module(f"timm.models.{module}"), name), f"timm {timm.__version__}"
