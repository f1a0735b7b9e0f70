"""Models with several outputs, or with others than logits, as exported files: every output by its name."""

import contextlib
import sys
import time

import onnx
import pytest
import torch
import transformers
from torch import nn

import scap_hub
from scap_hub import export
from scap_hub.channels.oracle import randomize
from scap_hub.deploy.capture import Named, captured
from scap_hub.deploy.onnx_file import write_onnx
from scap_hub.deploy.runtimes import OnnxRuntime, TorchExport
from scap_hub.errors import ModelError, VerificationError
from scap_hub.hub.checkpoint import save_checkpoint
from scap_hub.zoo import load_model
from tests.test_task_doors import MODELS, SIZE

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def masks():
    """MaskFormer, which predicts a set of masks."""
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    decoder = transformers.DetrConfig(
        d_model=32, num_queries=5, encoder_layers=1, decoder_layers=1, decoder_attention_heads=4,
        encoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32,
    )  # fmt: skip
    config = transformers.MaskFormerConfig(
        backbone_config=backbone, decoder_config=decoder, fpn_feature_size=32, mask_feature_size=32, num_labels=3
    )
    return transformers.MaskFormerForInstanceSegmentation(config)


def queries():
    """RT-DETR, which asks for the `len` of its batch."""
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=16, hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.RTDetrConfig(
        backbone_config=backbone, encoder_hidden_dim=32, encoder_in_channels=[24, 32, 40], encoder_attention_heads=4,
        encoder_ffn_dim=48, d_model=32, num_queries=5, decoder_in_channels=[32, 32, 32], decoder_ffn_dim=48,
        decoder_layers=1, decoder_attention_heads=4, num_labels=3, freeze_backbone_batch_norms=False,
    )  # fmt: skip
    # As it is initialised, all places have the same score, and which queries are picked is chance.
    return randomize(transformers.RTDetrForObjectDetection(config))


NAMES = {
    "AutoModelForSemanticSegmentation": ["logits"],
    "AutoModelForObjectDetection": ["logits", "pred_boxes"],
    "AutoModelForDepthEstimation": ["predicted_depth"],
    "AutoBackbone": ["feature_maps_0", "feature_maps_1"],
    "AutoModel": ["last_hidden_state", "pooler_output"],
    "CLIPVisionModelWithProjection": ["image_embeds", "last_hidden_state"],
    "headless": ["features"],
    "stages": ["features_0", "features_1", "features_2", "features_3"],
    "masks": ["class_queries_logits", "masks_queries_logits"],
    "queries": ["logits", "pred_boxes"],
}


QUICK = ("AutoModel", "headless")


def saved(folder, name):
    torch.manual_seed(0)
    loaded = load_model((MODELS | {"masks": masks, "queries": queries})[name](), input_size=SIZE)
    groups = scap_hub.channel_groups(loaded.module, torch.zeros(1, *SIZE))
    scores = {group.name: torch.rand(group.size) for group in groups.prunable}
    plan = scap_hub.select(groups, scores, "ratio=0.5", round_to=1)
    save_checkpoint(folder, scap_hub.apply_plan(loaded.module, plan).eval(), loaded, plan)


def expected(output, names):
    """By name, read as a user reads them."""
    if isinstance(output, torch.Tensor):
        return [output]
    found = []
    for name in names:
        word, _, number = name.rpartition("_")
        several = number.isdigit() and (isinstance(output, list) or word in output)
        found.append((output if isinstance(output, list) else output[word])[int(number)] if several else output[name])
    return found


def assert_answers(session, model, images, names):
    """The file gives the model's outputs for some images, in the order of their names."""
    with torch.no_grad():
        theirs = expected(model(images), names)
    ours = map(torch.from_numpy, session.run(None, {"pixel_values": images.numpy()}))
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= 1e-4 * max(1, other.abs().max())


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in NAMES])
def test_every_output_has_its_name_and_is_the_models(name, tmp_path):
    saved(tmp_path / "out", name)
    file, model = export(tmp_path / "out", "onnx").file, scap_hub.load(tmp_path / "out")
    session = onnxruntime.InferenceSession(str(file))
    assert [output.name for output in session.get_outputs()] == NAMES[name]
    for value in (*onnx.load(file).graph.input, *onnx.load(file).graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    for batch in (1, 3):
        images = torch.randn(batch, *SIZE, generator=torch.Generator().manual_seed(batch))
        assert_answers(session, model, images, NAMES[name])


class Counting(nn.Module):
    """Asks for the `len` of its batch, which Python makes an integer."""

    def __init__(self):
        super().__init__()
        self.body, self.places = nn.Conv2d(3, 8, 3, 2), nn.Parameter(torch.randn(1, 8))

    def forward(self, x):
        x = self.body(x).mean((2, 3))
        return x + self.places.expand(len(x), -1)


def test_a_batch_whose_length_plain_python_asks_for_stays_open(tmp_path):
    model, images = Counting().eval(), torch.randn(2, 3, 16, 16)
    net = Named(model, images)
    write_onnx(net, captured(net, images), tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    more = torch.randn(5, 3, 16, 16)
    (found,) = session.run(None, {"pixel_values": more.numpy()})
    assert torch.allclose(torch.from_numpy(found), model(more), atol=1e-5)


SLOW = ("AutoModelForObjectDetection", "AutoModelForDepthEstimation", "stages", "masks")


@pytest.mark.parametrize("name", ["AutoModel", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_transformers_own_loader_hands_out_every_output_by_its_name(name, tmp_path):
    """With neither scap_hub nor trust; a wrong order would hand out boxes as logits."""
    exporters = pytest.importorskip("transformers.exporters")
    saved(tmp_path / "out", name)
    export(tmp_path / "out", "onnx")
    opened = exporters.ExportedModel.from_pretrained(str(tmp_path / "out"), subfolder="onnx")
    images = torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        answer, theirs = opened(pixel_values=images), expected(scap_hub.load(tmp_path / "out")(images), NAMES[name])
    assert set(NAMES[name]) <= set(answer)
    for own, other in zip(NAMES[name], theirs, strict=True):
        assert answer[own].shape == other.shape
        assert (answer[own] - other).abs().max() <= 1e-4 * max(1, other.abs().max())


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tower") / "out"
    saved(folder, "AutoModel")
    return folder


def test_a_file_answers_as_the_model_does(tower, tmp_path):
    """So whatever measures a model measures its file."""
    program = TorchExport(export(tower, "torch-export", tmp_path / "model.pt2").file)
    images = torch.randn(2, *SIZE)
    with torch.no_grad():
        ours, theirs = program(images), scap_hub.load(tower)(images)
    for name in ("last_hidden_state", "pooler_output"):
        assert torch.allclose(getattr(ours, name), theirs[name], atol=1e-4)


def test_a_wrong_second_output_is_seen(tower, monkeypatch):
    right = OnnxRuntime.run

    def wrong(self, images):
        states, pooled = right(self, images)
        return states, pooled + 1e-2

    monkeypatch.setattr(OnnxRuntime, "run", wrong)
    with pytest.raises(VerificationError, match=r"at pooler_output\[\d"):
        export(tower, "onnx")
    assert not list(tower.glob("onnx/*"))


def test_other_exporters_are_not_asked_for_several_outputs(tower):
    pytest.importorskip("openvino")
    with pytest.raises(ModelError, match="for models with one output, this one has last_hidden_state, pooler_out"):
        export(tower, "openvino")


def test_sizes_that_take_too_long_to_leave_open_are_not():
    class Dawdling(nn.Module):
        """Its shapes take long where a height is open, as windows of Swin do."""

        def __init__(self):
            super().__init__()
            self.body = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            x = self.body(x)
            while isinstance(x.shape[2], torch.SymInt) and time.monotonic() < began + 20:
                with contextlib.suppress(Exception):
                    "".join(map(str, range(100))).title()
            return x

    images = torch.randn(2, 3, 16, 24)
    net, began = Named(Dawdling().eval(), images), time.monotonic()
    with pytest.raises(ModelError, match="it takes longer than 2 s"):
        captured(net, images, sizes_within=2)
    assert time.monotonic() - began < 10
    assert sys.getprofile() is None
    assert captured(net, images).module()(images).shape == images.shape
