import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import custom_criterion
import datasets
import fashion_mnist
import no_training
import own_images
import pytest
import timm
import torch

import scap_hub
from scap_hub.training.data import DIGITS, load_data
from scap_hub.zoo.base import Preprocessing
from tests.hub_client import running_hub

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


@pytest.mark.skipif(not fashion_mnist.FOLDER.is_dir(), reason="needs Debian's dataset-fashion-mnist package")
def test_fashion_mnist_from_debians_package():
    splits = fashion_mnist.fashion_mnist()
    assert {name: len(split) for name, split in splits.items()} == {"train": 60_000, "test": 10_000}
    data = load_data(splits, Preprocessing((1, 28, 28), (0.5,), (0.5,)), num_classes=10)
    images, labels = next(iter(data.test))
    assert data.labels[:2] == ["T-shirt/top", "Trouser"] and images.shape == (64, 1, 28, 28)
    assert labels[:4].tolist() == [9, 2, 1, 1]


def test_fashion_mnist_says_how_to_install_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        fashion_mnist.fashion_mnist(tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A pretrained model's stand-in, in a folder of timm's layout."""
    folder = tmp_path_factory.mktemp("model")
    sizes = {"input_size": (3, 32, 32), "test_input_size": (3, 32, 32)}
    model = timm.create_model("test_resnet", num_classes=4, pretrained_cfg_overlay=sizes)
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    return f"local-dir:{folder}"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Some of the digits, as somebody's folder with one folder a class."""
    folder = tmp_path_factory.mktemp("images")
    for index, row in enumerate(datasets.Dataset.from_parquet(str(DIGITS / "train.parquet")).select(range(96))):
        path = folder / "train" / f"digit {row['label']}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        row["image"].save(path)
    return folder


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_own_images(model, images, tmp_path, capsys):
    out = tmp_path / "out"
    own_images.main([str(images), "--model", model, "--dense-epochs", "1", "--epochs", "1", "--out", str(out)])
    printed = capsys.readouterr().out
    assert "top-1" in printed and f"says the model in {out}" in printed
    assert json.loads((out / "config.json").read_text())["label_names"] == [f"digit {digit}" for digit in range(10)]


@pytest.mark.slow
def test_no_training(model, images, tmp_path, capsys):
    no_training.main([model, "--images", str(images), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "agrees with the dense model on " in printed and "top-1" not in printed
    assert scap_hub.load(tmp_path / "out").num_classes == 4


@pytest.fixture(scope="module")
def four_classes(images, tmp_path_factory):
    """The same images in as many classes as the model has."""
    folder = tmp_path_factory.mktemp("four")
    for image in images.rglob("*.png"):
        path = folder / "train" / str(int(image.parent.name[-1]) % 4) / image.name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, path)
    return folder


@pytest.mark.slow
def test_multi_gpu(model, four_classes, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, EXAMPLES / "multi_gpu.py", model, four_classes, "--recipe", "quick", "--epochs", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    options = ["--batch-size", "8", "--out", tmp_path / "out"]
    ran = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert f"saved in {tmp_path / 'out'} by 2 processes" in ran.stdout
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.slow
def test_publish(model, four_classes, tmp_path):
    with running_hub() as hub:
        environment = hub.environment(tmp_path / "home", HF_TOKEN="hf_write")
        command = [sys.executable, EXAMPLES / "publish.py", model, four_classes, "me/four", "--recipe", "no-training"]
        ran = subprocess.run([*command, "--private"], env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert f"published at {hub.endpoint}/me/four" in ran.stdout and "loaded again: " in ran.stdout


def test_slurm_file_starts_the_script():
    subprocess.run(["bash", "-n", EXAMPLES / "multi_node.slurm"], check=True)
    text = (EXAMPLES / "multi_node.slurm").read_text()
    assert "examples/multi_gpu.py" in text and (EXAMPLES / "multi_gpu.py").is_file()


TOUR = EXAMPLES / "tour.ipynb"


def test_notebook_shows_what_its_cells_give():
    """`python docs/tour.py` makes the outputs."""
    text = TOUR.read_text()
    assert len(text) < 150_000 and not re.search(r"/(work|home|root|tmp|Users)/", text)
    codes = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in codes)
    assert sum(bool(cell["outputs"]) for cell in codes) >= len(codes) - 1
    assert all(output["output_type"] != "error" and output.get("name") != "stderr" for cell in codes
               for output in cell["outputs"])  # fmt: skip
    assert text.count('"image/png"') == 2 and "the same logits: True" in text


@pytest.mark.slow
def test_notebook_runs(tmp_path, monkeypatch, capsys):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for cell in json.loads(TOUR.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]).replace("EPOCHS = (1, 32, 32), 12", "EPOCHS = (1, 16, 16), 3"), names)
    assert "the same logits: True" in capsys.readouterr().out
    assert names["EPOCHS"] == 3 and "top-1" in repr(names["result"])


def test_custom_criterion_is_registered_by_its_definition():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 2, 1))
    groups = scap_hub.channel_groups(net, torch.zeros(1, 3, 5, 5))
    scores = scap_hub.score(net, [], "spread", groups=groups)["0"]
    expected = net[0].weight.detach().double().flatten(1).std(1)
    torch.testing.assert_close(scores, expected / expected.mean(), rtol=1e-5, atol=0)
    assert custom_criterion.Spread.name == "spread"
