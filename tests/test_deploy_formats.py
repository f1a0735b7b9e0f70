"""Formats that other exporters write: run in their runtime, compared, and opened by those who have no scap_hub."""

import json

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import scap_hub
from scap_hub.deploy.formats import FORMATS
from scap_hub.deploy.quantizers.base import SCHEMES
from scap_hub.deploy.quantizers.executorch import XnnpackQuantizer
from scap_hub.deploy.quantizers.openvino import NncfQuantizer
from scap_hub.deploy.source import Source
from scap_hub.errors import ModelError, ScapHubError
from scap_hub.hub.checkpoint import load, save_checkpoint
from tests.nets import Residual
from tests.test_adapters import tiny_resnet
from tests.test_checkpoint import SIZE, pruned

MODELS = {"timm": lambda: "test_efficientnet", "transformers": tiny_resnet}


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tmp_path_factory):
    if request.param == "timm":
        pytest.importorskip("timmx")
    return save_checkpoint(tmp_path_factory.mktemp(request.param) / "out", *pruned(MODELS[request.param]()))


@pytest.mark.parametrize("name", ["openvino", "executorch"])
def test_what_others_write_computes_the_same(folder, name):
    pytest.importorskip(name)
    made = scap_hub.export(folder, name)
    assert made.file == folder / FORMATS[name].file
    images, model = torch.randn(3, *SIZE), load(folder)
    with torch.no_grad():
        expected = getattr(output := model(images), "logits", output)
    found = FORMATS[name].open(made.file)(images)
    assert (found - expected).abs().max() <= 1e-4 * max(1, expected.abs().max())


def eight_bit_weights(file):
    """How many tensors of weights an OpenVINO file has in eight bits."""
    import openvino

    constants = [node for node in openvino.Core().read_model(file).get_ops() if node.get_type_name() == "Constant"]
    return sum(len(node.shape) > 1 and node.get_element_type() == openvino.Type.i8 for node in constants)


@pytest.mark.parametrize(("name", "needed"), [("openvino", "nncf"), ("executorch", "torchao")])
def test_int8_by_the_quantizer_of_the_runtime(name, needed, tmp_path):
    """What it loses is measured, and transformers opens the file that came of it."""
    for module in (name, needed, "transformers.exporters"):
        pytest.importorskip(module)
    torch.manual_seed(0)
    folder = save_checkpoint(tmp_path / "out", *pruned(tiny_resnet(num_labels=4)))
    images = torch.randn(16, *SIZE)
    model = load(folder)
    with torch.no_grad():
        expected = model(images).logits
    data = DataLoader(TensorDataset(images, expected.argmax(1)), batch_size=8)
    made = scap_hub.export(folder, name, int8=True, dataset={"train": data, "test": data}, max_loss=0.2)
    assert made.file == folder / FORMATS[name].int8.file
    assert json.loads((folder / "deploy.json").read_text()) == made.deployment.to_dict()
    *_, in_float, in_int8 = made.deployment.variants
    found = FORMATS[name].open(made.file)(images)
    error = ((found - expected).norm() / expected.norm()).item()
    assert 1e-5 < error < 0.2, "in eight bits, and of this model"
    assert in_float.top1 == 1 and in_int8.top1 == (found.argmax(1) == expected.argmax(1)).float().mean()
    assert (in_float.file, in_int8.file) == (FORMATS[name].file, FORMATS[name].int8.file)
    if name == "openvino":
        weights = [(folder / variant.file).with_suffix(".bin").stat().st_size for variant in (in_float, in_int8)]
        assert weights[1] < 0.6 * weights[0] and in_float.bytes > weights[0]
        quantizer = NncfQuantizer(folder / in_float.file, [images])
        quantizer.write(tmp_path / "kept.xml", SCHEMES[0], kept=quantizer.layers[1:])
        quantizer.write(tmp_path / "only.xml", SCHEMES[0], only=quantizer.layers[:1])
        assert [eight_bit_weights(tmp_path / name) for name in ("kept.xml", "only.xml")] == [1, 1]
        assert eight_bit_weights(made.file) == len(quantizer.layers) > 2
    from transformers.exporters import ExportedModel

    options = {"config": {"INFERENCE_PRECISION_HINT": "f32"}} if name == "openvino" else {}
    answer = ExportedModel.from_pretrained(folder, subfolder=name, **options)(pixel_values=images[:1]).logits
    assert torch.allclose(answer, found[:1], atol=1e-4), "int8, not the file in float32"


def test_layers_that_hurt_stay_in_float32_in_executorch(tmp_path):
    """As in ONNX, by the same search; by torchao's own filter."""
    for module in ("executorch", "torchao"):
        pytest.importorskip(module)
    from tests.test_deploy import Outlier

    model = Outlier().eval()
    images = torch.randn(8, *SIZE)
    quantizer = XnnpackQuantizer(Source.of(model, SIZE), [images])
    assert quantizer.layers == ["a", "b", "c", "d", "head"], "the model's own names"
    scheme = quantizer.schemes[0]
    with torch.no_grad():
        expected = model(images)

    def error(**which):
        quantizer.write(tmp_path / "model.pte", scheme, **which)
        return ((FORMATS["executorch"].open(tmp_path / "model.pte")(images) - expected).norm() / expected.norm()).item()

    whole, kept, alone = error(), error(kept=["b", "c"]), error(only=["d"])
    assert kept < whole / 3 and alone < whole / 3
    assert error(kept=quantizer.layers) < 1e-5, "nothing is in eight bits"


def test_what_to_install_is_said_exactly(tmp_path, monkeypatch):
    folder = save_checkpoint(tmp_path / "out", *pruned("test_efficientnet", num_classes=4))
    before = sorted(folder.rglob("*"))
    with pytest.raises(ModelError, match=r"pip install 'timmx\[coreml\]'"):
        scap_hub.export(folder, "coreml")
    absent = {"openvino", "executorch", "timmx"}
    real = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in absent else real(name))
    for name in ("openvino", "executorch"):
        with pytest.raises(ScapHubError, match=rf"{name} needs {name}: pip install 'scap-hub\[{name}\]'"):
            scap_hub.export(folder, name)
    absent |= {"nncf", "torchao"}
    absent -= {"openvino", "executorch"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in absent else "there")
    for name, quantizer in {"openvino": "nncf", "executorch": "torchao"}.items():
        with pytest.raises(ScapHubError, match=rf"{name} in int8 needs {quantizer}: pip install 'scap-hub\[{name}\]'"):
            scap_hub.export(folder, name, int8=True)
    with pytest.raises(ScapHubError, match=r"timmx: pip install 'scap-hub\[openvino,timmx\]'"):
        scap_hub.export(folder, "openvino")
    dense = Residual()
    own = save_checkpoint(tmp_path / "own", *pruned(dense))
    with pytest.raises(ModelError, match="this one is neither: export to onnx"):
        scap_hub.export(own, "openvino", model=dense)
    assert sorted(folder.rglob("*")) == before


def test_no_image_model_of_transformers_reads_a_size_for_each_layer():
    """As soon as one does, its config can say what was pruned, and plain transformers opens it."""
    import transformers as hf

    if not hasattr(hf.PreTrainedConfig, "per_layer_config"):
        pytest.skip("transformers before 5.24 has none")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    for name in ("ViT", "DeiT", "Beit"):
        config = getattr(hf, f"{name}Config")(**sizes, per_layer_config={1: {"intermediate_size": 8}})
        with pytest.raises(RuntimeError, match="per-layer attribute"):
            getattr(hf, f"{name}ForImageClassification")(config)
