"""Exported files compute what the pruned model computes, for any batch size."""

import json
from dataclasses import replace

import pytest
import torch

from scap_hub import export
from scap_hub.deploy import formats
from scap_hub.deploy.capture import Named
from scap_hub.deploy.runtimes import Runtime
from scap_hub.errors import CheckpointError, ModelError, VerificationError
from scap_hub.hub.checkpoint import load, save_checkpoint
from tests.test_adapters import tiny_resnet
from tests.test_checkpoint import SIZE, pruned


@pytest.fixture(scope="module", params=["timm", "transformers"])
def folder(request, tmp_path_factory):
    made = pruned("test_efficientnet", num_classes=4) if request.param == "timm" else pruned(tiny_resnet())
    return save_checkpoint(tmp_path_factory.mktemp("saved") / "out", *made)


def answers(folder, images):
    with torch.no_grad():
        output = load(folder)(images)
    return getattr(output, "logits", output)


def assert_agree(ours, expected):
    """To 1e-4, absolute for logits up to 1, relative to the largest one above."""
    assert (ours - expected).abs().max() <= 1e-4 * max(1, expected.abs().max())


def test_torch_export(folder, tmp_path):
    path = export(folder, "torch-export", tmp_path / "deep" / "model.pt2").file
    for batch in (1, 3):
        images = torch.randn(batch, *SIZE)
        assert_agree(torch.export.load(path).module()(images), answers(folder, images))


def test_onnx(folder):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = export(folder, "onnx").file
    assert path == folder / "onnx" / "model.onnx"
    assert b"site-packages" not in path.read_bytes(), "nothing of this machine is published"
    session = onnxruntime.InferenceSession(str(path))
    for batch in (1, 3):
        images = torch.randn(batch, *SIZE)
        (logits,) = session.run(None, {"pixel_values": images.numpy()})
        assert_agree(torch.from_numpy(logits), answers(folder, images))
    assert not list(folder.rglob(".*"))


def test_an_onnx_file_says_how_it_is_fed_and_what_it_answers(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    names = ["a", "b", "<c>", "d"]
    small, loaded, plan = pruned("test_resnet", num_classes=4, labels=names)
    shown = replace(loaded.preprocessing, mean=(0.25, 0.5, 0.75), std=(0.125, 0.25, 0.5))
    folder = save_checkpoint(tmp_path / "out", small, replace(loaded, preprocessing=shown), plan)
    file = onnx.load(export(folder, "onnx"))
    notes = {note.key: json.loads(note.value) for note in file.metadata_props}
    assert notes["class_names"] == names and notes["input_size"] == list(SIZE)
    assert (notes["mean"], notes["std"]) == (list(shown.mean), list(shown.std)) and notes["crop_pct"] == shown.crop_pct
    for value in (*file.graph.input, *file.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"


@pytest.mark.parametrize("largest", [0.001, 0.1, 100.0])
@pytest.mark.parametrize(("error", "kept"), [(0.9e-4, True), (1.1e-4, False), (float("nan"), False)])
def test_what_agreement_means(folder, largest, error, kept, tmp_path, monkeypatch):
    """1e-4 of a logit of 100 is 0.01, of a feature of 0.1 it is 1e-5; of less than 0.01 it is 1e-6."""

    def scaled(batch):
        return torch.linspace(-largest, largest, len(batch))[:, None]

    class Wrong(Runtime):
        name = "wrong"

        def run(self, images):
            return scaled(images) + error * max(0.01, largest)

    def wrong_file(source, path):
        path.write_bytes(b"file")

    monkeypatch.setattr(Named, "forward", lambda self, images: scaled(images))
    monkeypatch.setitem(formats.FORMATS, "torch-export", formats.Format("model.pt2", (), "", wrong_file, Wrong))
    if kept:
        assert export(folder, "torch-export", tmp_path / "model.pt2").file.read_bytes() == b"file"
        return
    with pytest.raises(VerificationError, match=r"differs from the model by .* at logits\[\d, 0\] .* are allowed"):
        export(folder, "torch-export", tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_an_operator_that_onnx_lacks_is_named_with_its_module(tmp_path):
    class Odd(torch.nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.odd, self.head = torch.nn.Conv2d(3, 8, 3), Odd(), torch.nn.Linear(8, 4)

        def forward(self, x):
            return self.head(self.odd(self.conv(x)).mean((2, 3)))

    dense = Net()
    saved = save_checkpoint(tmp_path / "out", *pruned(dense))
    with pytest.raises(ModelError, match=r"no operator for aten\.special_bessel_j0.* in module 'odd' of Net"):
        export(saved, "onnx", model=dense)
    assert not (saved / "onnx").exists() or not list((saved / "onnx").iterdir())


def test_bad_input(folder, tmp_path):
    with pytest.raises(ModelError, match="choose 'onnx' or 'torch-export' or"):
        export(folder, "tflite")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        export(tmp_path, "torch-export")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot write"):
        export(folder, "torch-export", tmp_path / "file" / "model.pt2")
