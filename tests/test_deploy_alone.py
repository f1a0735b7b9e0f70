"""Exported files, opened by those who have no scap_hub and trust no code from a repository."""

import json
import subprocess
import sys
import venv

import numpy as np
import pytest
import torch

import scap_hub
from scap_hub.hub.checkpoint import load, save_checkpoint
from scap_hub.hub.publish import _files
from tests.test_adapters import tiny_resnet
from tests.test_checkpoint import SIZE, pruned

MODELS = {"timm": lambda: "test_efficientnet", "transformers": tiny_resnet}
IN_TRANSFORMERS = """
import sys
sys.modules["scap_hub"] = None
import numpy, torch
from transformers.exporters import ExportedModel

options = {"config": {"INFERENCE_PRECISION_HINT": "f32"}} if sys.argv[2] == "openvino" else {}
model = ExportedModel.from_pretrained(sys.argv[1], subfolder=sys.argv[2], **options)
output = model(pixel_values=torch.from_numpy(numpy.load("images.npy")))
numpy.save("logits.npy", getattr(output, "logits", output))
print(type(output).__name__)
"""
IN_ONNXRUNTIME = """
import importlib.util, sys
import numpy, onnxruntime

assert not any(importlib.util.find_spec(name) for name in ("scap_hub", "torch", "timm", "transformers"))
session = onnxruntime.InferenceSession(sys.argv[1])
(logits,) = session.run(None, {"pixel_values": numpy.load("images.npy")})
numpy.save("logits.npy", logits)
"""


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp(request.param) / "out", *pruned(MODELS[request.param]()))


def answered(command, folder, place, count=2, **options):
    """What a process prints that answers images.npy with logits.npy, its logits, and those of the model."""
    images = torch.randn(count, *SIZE, generator=torch.Generator().manual_seed(3))
    np.save(place / "images.npy", images.numpy())
    done = subprocess.run(command, check=True, cwd=place, capture_output=True, text=True, **options)
    with torch.no_grad():
        expected = getattr(output := load(folder)(images), "logits", output)
    return done.stdout, torch.from_numpy(np.load(place / "logits.npy")), expected


@pytest.mark.parametrize("name", ["onnx", "openvino", "executorch"])
def test_transformers_opens_what_was_exported(folder, name, tmp_path):
    """Of a timm model too. A port without a name would be fed with nothing, and nobody would say so."""
    pytest.importorskip("transformers.exporters")
    for needed in {"onnx": ["onnxscript", "onnxruntime"], "openvino": ["openvino"], "executorch": ["executorch"]}[name]:
        pytest.importorskip(needed)
    ours = not hasattr(load(folder), "config_class")
    if ours and name != "onnx":
        pytest.importorskip("timmx")
    file = scap_hub.export(folder, name).file
    published = {path.relative_to(folder).as_posix() for path in file.parent.iterdir()}
    assert published <= set(_files(folder))
    told, logits, expected = answered(
        [sys.executable, "-c", IN_TRANSFORMERS, str(folder), name], folder, tmp_path, count=1 + (name != "executorch")
    )
    assert (logits - expected).abs().max() <= 1e-4 * max(1, expected.abs().max())
    assert told.split()[-1] == ("Tensor" if ours else "ImageClassifierOutputWithNoAttention")


def test_the_manifest_names_what_was_exported_last(tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    folder = save_checkpoint(tmp_path / "out", *pruned(tiny_resnet()))
    named = lambda: json.loads((folder / "onnx" / "export.json").read_text())["components"]["model"]["file"]  # noqa: E731
    images = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(4, *SIZE)), batch_size=4)
    scap_hub.export(folder, int8=True, dataset=images, max_loss=1.0)
    assert named() == "model_quantized.onnx"
    scap_hub.export(folder, output=tmp_path / "elsewhere" / "model.onnx")
    assert named() == "model_quantized.onnx" and [path.name for path in (tmp_path / "elsewhere").iterdir()] == [
        "model.onnx"
    ]
    scap_hub.export(folder)
    assert named() == "model.onnx"


@pytest.mark.slow
def test_onnxruntime_and_numpy_are_enough(folder, tmp_path):
    """In a new environment that has nothing else. pip fetches both."""
    pytest.importorskip("onnxscript")
    file = scap_hub.export(folder, "onnx").file
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "onnxruntime", "numpy"], check=True)
    _, logits, expected = answered([python, "-I", "-c", IN_ONNXRUNTIME, str(file)], folder, tmp_path)
    assert (logits - expected).abs().max() <= 1e-4 * max(1, expected.abs().max())
