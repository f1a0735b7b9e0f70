"""From a pruned model to int8 for a device: what is written, what is measured, and what is refused."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import scap_hub
from scap_hub.deploy.quantizers.base import SCHEMES
from scap_hub.deploy.search import MOST_KEPT, harmful, search
from scap_hub.errors import CalibrationError, DataError, ModelError, ScapHubError
from scap_hub.hub.checkpoint import save_checkpoint
from scap_hub.hub.publish import _files
from tests.test_adapters import tiny_resnet
from tests.test_checkpoint import SIZE, pruned

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


QUICK = {
    "data": {"calibration_images": 16, "batch_size": 8},
    "criterion": {"name": "l1", "diagnostics": False},
    "finetune": {"epochs": 0},
    "repair": {"tune": {"steps": 0}},
    "evaluate": {"latency": False},
}


def images_of(seed, count=32):
    """Images of unequal contrast."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *SIZE, generator=generator) * torch.rand(count, 1, 1, 1, generator=generator) * 4


@torch.no_grad()
def answered(model, head):
    """Splits whose labels are the answers of a model; its head is changed so that it gives all of them."""
    logits_of = lambda images: getattr(output := model(images), "logits", output)  # noqa: E731
    logits = logits_of(images_of(0))
    head.weight /= logits.std()
    head.bias -= logits.mean(0)
    head.bias /= logits.std()
    splits = {name: images_of(seed) for seed, name in enumerate(("train", "validation", "test"))}
    data = {name: TensorDataset(images, logits_of(images).argmax(1)) for name, images in splits.items()}
    return {name: DataLoader(split, batch_size=8) for name, split in data.items()}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tiny_resnet(num_labels=4).eval()


@pytest.fixture(scope="module")
def data(model):
    return answered(model, model.classifier[1])


@pytest.fixture(scope="module")
def folder(model, data, tmp_path_factory):
    place = tmp_path_factory.mktemp("run") / "out"
    scap_hub.prune(
        model, data, QUICK, output_dir=place, model_input_size=SIZE, target="macs=0.7",
        deploy_int8=True, deploy_max_loss=0.2,
    )  # fmt: skip
    return place


def runs(path, images):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"pixel_values": images.numpy()})[0]


def test_a_run_saves_both_files_and_tells_what_they_are_worth(folder, data):
    told = json.loads((folder / "deploy.json").read_text())
    dense, pruned_float, int8 = told["variants"]
    assert [dense["name"], pruned_float["name"], int8["name"]] == ["dense fp32", "pruned fp32", "pruned int8"]
    assert (pruned_float["file"], int8["file"]) == ("onnx/model.onnx", "onnx/model_quantized.onnx")
    images, labels = data["test"].dataset.tensors
    answers = {name: runs(folder / name, images).argmax(1) for name in (pruned_float["file"], int8["file"])}
    for variant in (pruned_float, int8):
        own = answers[variant["file"]]
        assert variant["top1"] == pytest.approx(float((own == labels.numpy()).mean()))
        assert variant["agreement"] == pytest.approx(float((own == answers["onnx/model.onnx"]).mean()))
        assert variant["bytes"] == (folder / variant["file"]).stat().st_size
    report = json.loads((folder / "report.json").read_text())
    assert report["deploy"] == told and dense["top1"] == report["before"]["top1"]
    assert pruned_float["top1"] == pytest.approx(report["after"]["top1"])
    assert told["int8"]["images"] == 16 and all(variant["latency_ms"] > 0 for variant in told["variants"])

    import onnx

    graph = onnx.load(folder / int8["file"]).graph
    weights = [tensor for tensor in graph.initializer if len(tensor.dims) == 4]
    assert weights and all(tensor.data_type == onnx.TensorProto.INT8 for tensor in weights)
    card = (folder / "README.md").read_text()
    page = (folder / "report.html").read_text()
    for text in (card, page):
        assert text.count("On a device</h2>" if text is page else "## On a device") == 1
        assert all(f"{variant['bytes'] / 1e6:,.2f} MB" in text for variant in told["variants"])
    assert {"deploy.json", "onnx/model.onnx", "onnx/model_quantized.onnx"} <= set(_files(folder))


def test_exporting_again_tells_anew_and_keeps_the_rest(folder, data, tmp_path):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(folder), str(copy)], check=True)
    unlabelled = DataLoader(TensorDataset(data["train"].dataset.tensors[0]), batch_size=8)
    made = scap_hub.export(copy, int8=True, dataset=unlabelled, max_loss=0.5)
    assert made.file == copy / "onnx" / "model_quantized.onnx"
    assert "same answers" in made.deployment.int8.decided_on
    assert all(variant.top1 is None for variant in made.deployment.variants)
    assert json.loads((copy / "deploy.json").read_text()) == made.deployment.to_dict()
    card, before = (copy / "README.md").read_text(), (folder / "README.md").read_text()
    assert card.count("## On a device") == 1 and card.partition("## On a device")[0] == before.partition("## On")[0]
    assert card.partition("## Limits")[2] == before.partition("## Limits")[2]
    page = (copy / "report.html").read_text()
    assert page.count("On a device</h2>") == 1, "the page is made again"
    assert all(f"{variant.latency_ms:.2f} ms" in page for variant in made.deployment.variants)


class Bessel(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)


@pytest.mark.parametrize("asked", [{"deploy_int8": True}, {"target": "latency=0.5", "target_runtime": "onnxruntime"}])
def test_a_model_that_cannot_be_exported_is_told_before_any_work(asked, data, tmp_path):
    convolutions = (nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3))
    net = nn.Sequential(*convolutions, Bessel(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    started = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scap_hub.run.pruning.prune_loaded", lambda *_, **__: started.append(True))
        with pytest.raises(ModelError, match=r"no operator for aten\.special_bessel_j0.* in module '3' of Sequential"):
            scap_hub.prune(
                net, data, QUICK, output_dir=tmp_path / "out", model_input_size=SIZE, **{"target": "ratio=0.5"} | asked
            )
    assert not started and not list(tmp_path.iterdir())


def test_int8_without_calibration_images_is_told_before_any_work(data, model, monkeypatch):
    without = lambda *_, **__: replace(found(*_, **__), calibration=[])  # noqa: E731
    found = sys.modules["scap_hub.run.inputs"].data_for
    monkeypatch.setattr("scap_hub.run.inputs.data_for", without)
    monkeypatch.setattr("scap_hub.run.pruning.prune_loaded", lambda *_, **__: pytest.fail("work began"))
    with pytest.raises(CalibrationError, match="needs calibration images, and the data set has none"):
        scap_hub.prune(model, data, QUICK, model_input_size=SIZE, target="ratio=0.5", deploy_int8=True)


def test_where_only_the_pruned_model_cannot_be_exported_it_is_saved_all_the_same(model, data, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise ModelError("no such scale")

    monkeypatch.setattr("scap_hub.run.deploying.deploy_int8", fails)
    with pytest.warns(UserWarning, match="not in int8: no such scale"):
        scap_hub.prune(
            model, data, QUICK, output_dir=tmp_path / "out", model_input_size=SIZE, target="ratio=0.5", deploy_int8=True
        )
    assert (tmp_path / "out" / "model.safetensors").is_file() and not (tmp_path / "out" / "deploy.json").exists()


def test_images_of_another_size_than_the_files_cost_the_files_alone(model):
    pixels = torch.randn(8, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    images = DataLoader(TensorDataset(pixels, torch.arange(8) % 4), batch_size=4)
    with pytest.warns(UserWarning, match="not in int8: onnxruntime does not run .* on images of 3x48x48: .* set model"):
        result = scap_hub.prune(model, images, QUICK, model_input_size=SIZE, target="ratio=0.5", deploy_int8=True)
    assert result.report.deploy is None and result.report.after.macs < result.report.before.macs


def test_beside_somebody_elses_files_nothing_is_told(folder, data, tmp_path, monkeypatch):
    """A Hub id has no folder: the files go below the working directory, whose card is another project's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("# Mine\n\n## Limits\n")
    (tmp_path / "report.json").write_text("{}")
    monkeypatch.setattr("scap_hub.zoo.pruned._local", lambda *_, **__: folder)
    made = scap_hub.export("me/model", int8=True, dataset=data, max_loss=0.5)
    assert made.file.resolve() == tmp_path / "onnx" / "model_quantized.onnx" and made.file.is_file()
    assert (tmp_path / "README.md").read_text() == "# Mine\n\n## Limits\n" and not (tmp_path / "deploy.json").exists()
    assert made.deployment.dataset is None, "the data that was handed over has no name"


def test_the_published_file_runs_with_neither_scap_hub_nor_torch(folder, tmp_path):
    """The card's own code, with the download taken out."""
    card = (folder / "README.md").read_text()
    code = card.partition("## On a device")[2].partition("```python\n")[2].partition("```")[0]
    code = code.replace('hf_hub_download("path/to/this/folder", ', f'"{folder}/" + (')
    hidden = "import sys\nfor name in ('scap_hub', 'torch', 'timm', 'transformers'): sys.modules[name] = None\n"
    images = torch.randn(3, *SIZE)
    np.save(tmp_path / "images.npy", images.numpy())
    text = f"{hidden}import numpy\nimages = numpy.load('images.npy')\n{code}\nnumpy.save('logits.npy', logits)\n"
    subprocess.run([sys.executable, "-c", text], check=True, cwd=tmp_path)
    assert np.array_equal(np.load(tmp_path / "logits.npy"), runs(folder / "onnx/model_quantized.onnx", images))


class Outlier(nn.Module):
    """One channel between the second and the third convolution is a thousand times as large as the others."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(size, 16, 3, padding=1) for size in (3, 16, 16, 16))
        self.head = nn.Linear(16, 4)
        with torch.no_grad():
            self.b.weight[0] *= 1000
            self.b.bias[0] *= 1000
            self.c.weight[:, 0] /= 1000

    def forward(self, x):
        for conv in (self.a, self.b, self.c, self.d):
            x = conv(x).relu()
        return self.head(x.mean((2, 3)))


def test_layers_that_hurt_are_found_and_stay_in_float32(tmp_path):
    dense = Outlier().eval()
    small, loaded, plan = pruned(dense, share=1.0)
    data = answered(small, small.head)
    assert len(set(data["validation"].dataset.tensors[1].tolist())) > 2
    folder = save_checkpoint(tmp_path / "out", small, loaded, plan)
    made = scap_hub.export(folder, model=dense, int8=True, dataset=data, max_loss=0.05)
    int8 = made.deployment.int8
    assert int8.loss <= 0.05 and int8.missed is None
    assert {name.partition("/")[0] for name in int8.kept} >= {"b", "c"}, "the model's own names"
    assert len(int8.kept) < 6 and len(int8.attempts) > 3
    # In the table and on the card it says what was done.
    assert any("in float32 stay" in note for note in made.deployment.notes())


def test_halving_finds_the_worst_first():
    harm = {"c": 5.0, "f": 3.0, "a": 0.1}
    order = list(harmful("abcdefgh", lambda names: sum(harm.get(name, 0.0) for name in names)))
    assert order[:3] == ["c", "f", "a"] and sorted(order) == list("abcdefgh")


def test_a_search_without_success_says_so():
    found = search(
        SCHEMES, "abcdefgh", 0.01, lambda scheme, kept: 0.5 - 0.01 * len(kept), lambda scheme, names: len(names)
    )
    assert found.best.loss > 0.01 and len(found.best.kept) <= MOST_KEPT * 8
    assert found.best.loss == min(attempt.loss for attempt in found.attempts)


def test_bad_input(folder, tmp_path, monkeypatch):
    before = sorted(path.stat().st_mtime_ns for path in folder.rglob("*.*"))
    with pytest.raises(ModelError, match="int8 is made for 'onnx', 'openvino', 'executorch', not for 'torch-export'"):
        scap_hub.export(folder, "torch-export", int8=True)
    with pytest.raises(DataError, match="was given no data set"):
        scap_hub.export(folder, int8=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ScapHubError, match=r"onnx needs onnx, .*pip install 'scap-hub\[onnx\]'"):
        scap_hub.export(folder, int8=True)
    with pytest.raises(ScapHubError, match=r"pip install 'scap-hub\[onnx\]'"):
        scap_hub.prune(tiny_resnet(), None, QUICK, deploy_int8=True)
    assert before == sorted(path.stat().st_mtime_ns for path in folder.rglob("*.*"))


RANKS = """
import sys, torch
from tests.test_deploy import *
torch.manual_seed(0)
dense = Outlier().eval()
data = answered(dense, dense.head)
result = scap_hub.prune(
    dense, data, QUICK, output_dir=sys.argv[1], model_input_size=SIZE, target="ratio=1.0", round_to=1,
    repair_least_squares=False, repair_batch_norm=False, deploy_int8=True, deploy_max_loss=0.05,
)
assert result.report.deploy.int8.kept
"""


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_several_processes_find_the_same_layers(ranks, tmp_path):
    (tmp_path / "run.py").write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, str(tmp_path / "run.py"), str(tmp_path / "out")], check=True, env=environment, timeout=300
    )
    told = json.loads((tmp_path / "out" / "deploy.json").read_text())["int8"]
    assert {name.partition("/")[0] for name in told["kept"]} >= {"b", "c"} and told["loss"] <= 0.05
