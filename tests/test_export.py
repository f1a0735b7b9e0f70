"""Exported files compute what the pruned model computes, for any batch size."""

import pytest
import torch

from scap_hub.errors import CheckpointError, ModelError, VerificationError
from scap_hub.hub import export as exporting
from scap_hub.hub.checkpoint import load, save_checkpoint
from scap_hub.hub.export import export
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


@pytest.mark.parametrize("batch", [1, 3])
def test_torch_export(folder, batch, tmp_path):
    path = export(folder, "torch-export", tmp_path / "deep" / "model.pt2")
    images = torch.randn(batch, *SIZE)
    assert torch.allclose(torch.export.load(path).module()(images), answers(folder, images), atol=1e-4)


def test_onnx(folder):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = export(folder, "onnx")
    assert path == folder / "model.onnx"
    session = onnxruntime.InferenceSession(str(path))
    for batch in (1, 3):
        images = torch.randn(batch, *SIZE)
        (logits,) = session.run(None, {"images": images.numpy()})
        assert torch.allclose(torch.from_numpy(logits), answers(folder, images), atol=1e-4)
    assert not list(folder.glob(".*"))


def test_a_wrong_file_is_not_kept(folder, tmp_path, monkeypatch):
    def wrong(net, images, path):
        path.write_bytes(b"wrong")
        return lambda batch: net(batch).detach() + 1

    monkeypatch.setattr(exporting, "_torch_export", wrong)
    with pytest.raises(VerificationError, match="differs"):
        export(folder, "torch-export", tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_bad_input(folder, tmp_path):
    with pytest.raises(ModelError, match="'onnx' or 'torch-export'"):
        export(folder, "tflite")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        export(tmp_path, "torch-export")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot write"):
        export(folder, "torch-export", tmp_path / "file" / "model.pt2")
