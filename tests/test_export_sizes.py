"""ONNX files for images of other sizes than the model's own: where there are such, and that none is wrong."""

import json

import onnx
import pytest
import torch

import scap_hub
from scap_hub import export
from scap_hub.deploy.runtimes import OnnxRuntime
from tests.test_export_outputs import NAMES, assert_answers, onnxruntime, saved

MULTIPLE = {
    "AutoModelForSemanticSegmentation": 1,
    "AutoModelForObjectDetection": 1,
    "AutoModelForDepthEstimation": 32,  # what its decoder joins has one size only then
    "AutoBackbone": 1,
    "headless": 1,
    "stages": 1,
}
QUICK = ("headless",)


def axes(file):
    return [dim.dim_param or dim.dim_value for dim in onnx.load(file).graph.input[0].type.tensor_type.shape.dim]


def noted(file):
    return {entry.key: json.loads(entry.value) for entry in onnx.load(file).metadata_props}.get("size_multiple")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in MULTIPLE]
)
def test_a_file_takes_images_of_other_sizes_and_answers_as_the_model_does(name, tmp_path):
    saved(tmp_path / "out", name)
    made, model = export(tmp_path / "out", "onnx"), scap_hub.load(tmp_path / "out")
    assert made.size_multiple == noted(made.file) == MULTIPLE[name]
    assert axes(made.file) == ["batch", 3, "height", "width"]
    session = onnxruntime.InferenceSession(str(made.file))
    for batch, height, width in ((1, 64, 64), (3, 32, 160), (2, 77, 101) if MULTIPLE[name] == 1 else (2, 96, 128)):
        images = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(height))
        assert_answers(session, model, images, NAMES[name])


def test_a_model_with_places_of_one_size_keeps_it(tmp_path):
    saved(tmp_path / "out", "AutoModel")
    made = export(tmp_path / "out", "onnx")
    assert made.size_multiple is None and noted(made.file) is None
    assert axes(made.file) == ["batch", 3, 64, 64]


@pytest.mark.parametrize(
    ("wrong", "multiple"),
    [
        (lambda *sides: sides[0] % 32, 32),
        pytest.param(lambda *sides: max(sides) > 64, None, marks=pytest.mark.slow),
    ],
    ids=["others than multiples", "all others"],
)
def test_a_file_that_is_wrong_at_other_sizes_is_not_for_them(wrong, multiple, tmp_path, monkeypatch):
    """As one whose model fills up what does not fit its windows, which is recorded for one size."""
    right = OnnxRuntime.run

    def run(self, images):
        answer = right(self, images)
        return answer + 1e-2 if wrong(*images.shape[2:]) else answer

    monkeypatch.setattr(OnnxRuntime, "run", run)
    saved(tmp_path / "out", "headless")
    made = export(tmp_path / "out", "onnx")
    assert made.size_multiple == noted(made.file) == multiple
    assert axes(made.file)[2:] == ([64, 64] if multiple is None else ["height", "width"])
