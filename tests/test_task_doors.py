"""Ways into pruned models that are no classifiers, in fresh processes against a real HTTP Hub."""

import json

import pytest
import timm
import torch
import transformers

import scap_hub
from scap_hub.hub.checkpoint import save_checkpoint
from scap_hub.hub.publish import push_to_hub
from scap_hub.zoo import load_model
from scap_hub.zoo.timm.private import NOTES_ARGUMENTS
from tests.hub_client import running_hub
from tests.test_doors import assert_close, fresh

SIZE = (3, 64, 64)
IMAGES = torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(1))
LABELS = {0: "road", 1: "tree", 2: "sky"}


def resnet(**options):
    return transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 1, 1], layer_type="basic", **options
    )


def segmenter():
    """SegFormer, with the names of its classes."""
    config = transformers.SegformerConfig(
        hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 4], decoder_hidden_size=16,
        id2label=LABELS, label2id={label: index for index, label in LABELS.items()},
    )  # fmt: skip
    return transformers.SegformerForSemanticSegmentation(config)


def detector():
    """DETR."""
    config = transformers.DetrConfig(
        backbone_config=resnet(out_features=["stage4"]), use_timm_backbone=False, use_pretrained_backbone=False,
        d_model=32, num_queries=5, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_labels=3,
    )  # fmt: skip
    return transformers.DetrForObjectDetection(config)


def depth():
    """GLPN."""
    config = transformers.GLPNConfig(
        hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 4], decoder_hidden_size=16
    )
    return transformers.GLPNForDepthEstimation(config)


VISION = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 64,
    "patch_size": 16,
}  # fmt: skip


def tower():
    """The image tower of SigLIP, whose head is one of torch's attentions."""
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION))


def projected():
    """The image tower of CLIP."""
    return transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**VISION, projection_dim=24))


MODELS = {
    "AutoModelForSemanticSegmentation": segmenter,
    "AutoModelForObjectDetection": detector,
    "AutoModelForDepthEstimation": depth,
    "AutoBackbone": lambda: transformers.ResNetBackbone(resnet(out_features=["stage2", "stage4"])),
    "AutoModel": tower,
    "CLIPVisionModelWithProjection": projected,
    "headless": lambda: timm.create_model("test_resnet", num_classes=0),
    "stages": lambda: timm.create_model("test_convnext", features_only=True),
}
if NOTES_ARGUMENTS:  # of which the size of the images is one
    MODELS["tokens"] = lambda: timm.create_model("test_vit", features_only=True, img_size=64)


def outputs(returned):
    """All floating-point tensors of an output, as one."""
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(returned) if isinstance(leaf, torch.Tensor)]
    return torch.cat([leaf.flatten() for leaf in leaves if leaf.is_floating_point()]).detach()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A Hub with a pruned model for each door, and what they answer."""
    root, answers = tmp_path_factory.mktemp("world"), {}
    with running_hub() as hub, pytest.MonkeyPatch.context() as patch:
        hub.used_here(patch, "publish")
        for name, make in MODELS.items():
            torch.manual_seed(0)
            loaded = load_model(make(), input_size=SIZE)
            groups = scap_hub.channel_groups(loaded.module, IMAGES)
            scores = {group.name: torch.rand(group.size) for group in groups.prunable}
            plan = scap_hub.select(groups, scores, "ratio=0.5", round_to=1)
            assert plan.groups, name
            small = scap_hub.apply_plan(loaded.module, plan).eval()
            save_checkpoint(root / name, small, loaded, plan)
            push_to_hub(root / name, f"me/{name}", token="hf_write")
            answers[name] = outputs(small(IMAGES))
        torch.save(IMAGES, root / "images.pt")
        yield hub, root, answers


READ = """
import timm, transformers
from PIL import Image
def outputs(returned):
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(returned) if isinstance(leaf, torch.Tensor)]
    return torch.cat([leaf.flatten() for leaf in leaves if leaf.is_floating_point()]).detach()
"""


def read(name, place, **options):
    """Code that loads by an auto class, or another class of transformers, and notes the outputs."""
    given = "".join(f", {key}={value}" for key, value in options.items())
    return f"out[{name!r}] = outputs(transformers.{name}.from_pretrained({place!r}{given}).eval()(images))\n"


def test_each_auto_class_loads_it_by_the_code_beside_the_weights(world):
    names = [name for name in MODELS if name.startswith("Auto")]
    found = fresh(world, READ + "".join(read(name, f"me/{name}", trust_remote_code=True) for name in names) + """
assert "scap_hub" not in sys.modules
""")  # fmt: skip
    for name in names:
        assert_close(found[name], world[2][name])


def test_with_scap_hub_the_usual_calls_load_it(world):
    """Also timm's, under the names that it gives to stages, and pipelines."""
    names = [name for name in MODELS if name.startswith(("Auto", "CLIP"))]
    found = fresh(world, READ + "import scap_hub\n" + "".join(read(name, f"me/{name}") for name in names) + f"""
model = transformers.AutoModelForSemanticSegmentation.from_pretrained("me/AutoModelForSemanticSegmentation")
assert model.config.id2label == {LABELS}, model.config.id2label
processor = transformers.SegformerImageProcessor(size={{"height": 64, "width": 64}})
run = transformers.pipeline("image-segmentation", model=model, image_processor=processor)
found = run(Image.new("RGB", (64, 48), (200, 30, 60)))
assert {{part["label"] for part in found}} <= set({[*LABELS.values()]}), found
for name in {[name for name in ("headless", "stages", "tokens") if name in MODELS]}:
    out[name] = outputs(timm.create_model("hf-hub:me/" + name, pretrained=True).eval()(images))
asked = timm.create_model("hf-hub:me/stages", pretrained=True, features_only=True).eval()
out["asked"] = outputs(asked(images))
assert [maps.shape[1] for maps in asked(images)] == asked.feature_info.channels()
out["wrapped"] = transformers.AutoModel.from_pretrained("me/headless").eval()(images).pooler_output.detach().flatten()
""")  # fmt: skip
    same = {"asked": "stages", "wrapped": "headless"}
    assert len(found) == len(MODELS) + 2
    for name, ours in found.items():
        assert_close(ours, world[2][same.get(name, name)])


def test_what_a_saved_folder_says(world):
    _, root, _ = world
    config = json.loads((root / "AutoModelForSemanticSegmentation" / "config.json").read_text())
    assert config["auto_map"] == {"AutoModelForSemanticSegmentation": "modeling_scap.SegformerForSemanticSegmentation"}
    assert config["id2label"] == {str(index): label for index, label in LABELS.items()}
    for name in MODELS:
        has_code = (root / name / "modeling_scap.py").is_file()
        assert has_code == (name not in ("CLIPVisionModelWithProjection", "stages", "tokens")), name
        assert_close(outputs(scap_hub.load(root / name)(IMAGES)), world[2][name])


@pytest.mark.parametrize(
    ("name", "door"),
    [
        ("AutoBackbone", 'AutoBackbone.from_pretrained("me/it")'),
        ("CLIPVisionModelWithProjection", 'CLIPVisionModelWithProjection.from_pretrained("me/it")'),
        ("headless", 'AutoModel.from_pretrained("me/it")'),
        ("stages", 'timm.create_model("local-dir:me/it", pretrained=True, features_only=True)'),
    ],
)
def test_the_card_names_the_door(name, door):
    loaded = load_model(MODELS[name](), input_size=SIZE)
    assert loaded.zoo.doors("me/it", loaded)[-1].call == f"model = {door}"
