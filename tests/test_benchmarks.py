"""The benchmarks' own parts; what they call is tested elsewhere."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import fashion_mnist
import numpy as np
import pytest
import torch

import scap_hub
from scap_hub.training.evaluate import count
from tests.nets import Clock

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import accuracy  # noqa: E402
import by_task  # noqa: E402
import collages  # noqa: E402
import finetune  # noqa: E402
import gpu  # noqa: E402
import latency  # noqa: E402
import repair  # noqa: E402
import scale  # noqa: E402
import spectra  # noqa: E402

needs_images = pytest.mark.skipif(not fashion_mnist.FOLDER.is_dir(), reason="needs Debian's dataset-fashion-mnist")


@pytest.mark.parametrize(
    ("name", "macs", "params"),
    [("vgg16", 0.312e9, 14.72e6), ("resnet56", 0.126e9, 0.856e6), ("resnet18", 0.141e9, 11.18e6)],
)
def test_the_nets_are_what_they_are_called(name, macs, params):
    build, size, _ = accuracy.nets(None)[name]
    cost = count(build(), size)
    assert (cost["macs"], cost["params"]) == (pytest.approx(macs, rel=0.02), pytest.approx(params, rel=0.01))


def test_torchvisions_weights_go_into_mobilenet_in_order(tmp_path):
    model = accuracy.mobilenetv2(None)
    theirs = {f"layer{number}": torch.randn(value.shape) if value.is_floating_point() else value.clone()
              for number, value in enumerate(model.state_dict().values())}  # fmt: skip
    theirs["layer313"], theirs["layer312"] = torch.randn(1000), torch.randn(1000, 1280)
    torch.save(theirs, tmp_path / "weights.pth")
    loaded = accuracy.mobilenetv2(tmp_path / "weights.pth").state_dict()
    assert torch.equal(loaded["conv_stem.weight"], theirs["layer0"]) and loaded["classifier.weight"].shape == (10, 1280)


@needs_images
def test_validation_images_are_held_out_of_training():
    splits = accuracy.loaders(fashion_mnist.FOLDER, (3, 64, 64), 500, 50)
    assert {name: len(loader.dataset) for name, loader in splits.items()} == {
        "train": 450, "validation": 50, "test": 83,
    }  # fmt: skip
    rows = {tuple(image.flatten().tolist()) for image in splits["validation"].dataset.images}
    assert not any(tuple(image.flatten().tolist()) in rows for image in splits["train"].dataset.images)
    images, labels = next(iter(splits["train"]))
    assert images.shape == (50, 3, 64, 64) and images.dtype == torch.float32 and labels.dtype == torch.int64


@pytest.mark.slow
@needs_images
def test_accuracy_runs_without_the_datasets_package_and_takes_up_where_it_stopped(tmp_path):
    code = (
        "import sys; sys.modules['datasets'] = None; sys.path.insert(0, 'benchmarks'); import accuracy; accuracy.main()"
    )
    options = ["--quick", "--out", tmp_path / "out", "--json", tmp_path / "found.json", "--images", "200"]
    options += ["--criteria", "l1", "--variants", "repaired"]
    earlier = {"vgg16": {"repaired": {"command": "python benchmarks/accuracy.py --nets vgg16"}}}
    (tmp_path / "found.json").write_text(json.dumps(earlier))
    # The second takes up, the third measures another seed beside it, in processes of their own.
    for more in ([], [], ["--jobs", "2", "--seeds", "2"]):
        command = [sys.executable, *(["-c", code] if not more else ["benchmarks/accuracy.py"]), *options, *more]
        ran = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=300,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    cells = found["resnet56"]["repaired"]["cells"]
    assert [cell["seed"] for cell in cells] == [0, 1] and all(cell["macs"] <= 0.5 for cell in cells)
    assert found["resnet56"]["repaired"]["dense"]["params"] == 855_482
    assert found["vgg16"] == earlier["vgg16"], "what was measured before stays"
    repeat = found["resnet56"]["repaired"]["command"]
    assert shlex.split(repeat)[:2] == ["python", "benchmarks/accuracy.py"] and str(tmp_path) not in repeat
    assert "--jobs" not in repeat
    # What was measured in another way is not taken for what is asked now.
    other = [sys.executable, "benchmarks/accuracy.py", *options, "--jobs", "2", "--seeds", "2", "--calibration", "16"]
    subprocess.run(other, cwd=ROOT, check=True, timeout=300, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert json.loads((tmp_path / "found.json").read_text()) == found


def test_latency_compares_dense_and_pruned(monkeypatch, tmp_path):
    monkeypatch.setattr(latency, "MODELS", ("test_resnet",))
    for module in (latency, scap_hub.selection.latency, scap_hub.timing.table):
        monkeypatch.setattr(module, "milliseconds", Clock())
    rows = latency.main(["--quick", "--only", "test_resnet", "--json", str(tmp_path / "latency.json")])
    assert {row["model"] for row in rows} == {"dense", "half", "half, any counts", "latency"} and len(rows) == 8
    assert all(0.4 < row["macs"] <= 0.5 for row in rows if row["model"].startswith("half"))
    assert json.loads((tmp_path / "latency.json").read_text())["rows"] == rows


def test_repair_is_measured_beside_an_epoch_of_training(tmp_path):
    found = repair.main(["--quick", "--json", str(tmp_path / "repair.json")])
    (row,) = found["rows"]
    assert row["images"] == 32 and row["ratio"] == row["repair_s"] / row["epoch_s"] > 0
    assert json.loads((tmp_path / "repair.json").read_text()) == found


@pytest.mark.parametrize("name", finetune.SETTINGS)
def test_fine_tuning_is_compared_one_change_at_a_time(name):
    default, own = (finetune.changed(setting, 1e-3, epochs=2).model_dump() for setting in ("default", name))
    different = [key for key in default if default[key] != own[key]]
    assert own["epochs"] == 2 and len(different) == (0 if name == "default" else 2 if name == "SGD" else 1)


def test_scale_divides_what_is_done_for_an_image_and_nothing_else():
    found = {
        "stages": {"scores": {"image_s": 1.0, "fixed_s": 60.0, "peak_bytes": 2e9}},
        "single": {"forward_s": 0.5, "training_s": 2.0, "decode_s": 0.01, "weight_bytes": 1e8, "activation_bytes": 1e7},
        "traffic": {"scores": 3e9},
    }
    given = ["--machines", "1", "4", "--devices", "8", "--batch", "32", "--cores", "10", "--network", "8"]
    rows = {(row["machines"], row["stage"]): row for row in scale.table(found, scale.parsed(given))}
    one, four = rows[1, "scores"], rows[4, "scores"]
    assert one["minutes"] == pytest.approx((60 + 256 / 8) / 60) and four["minutes"] == pytest.approx(
        (60 + 256 / 32) / 60
    )
    assert (one["traffic_gb"], four["traffic_gb"]) == (0, 2 * 3 / 4 * 3e9 / 1e9)
    images = scale.TRAIN / 60
    for stage, minutes in {"reading": 0.01 / 40 * images, "computing": 2 / 32 * images}.items():
        assert rows[4, f"an epoch, {stage}"]["minutes"] == pytest.approx(minutes)
    sending = 2 * 3 / 4 * 1e8 * 8 / 8e9 / (32 * 32) * images
    assert rows[4, "an epoch, sending"]["minutes"] == pytest.approx(sending)
    faster = scale.table(found, scale.parsed([*given, "--forward", "20"]))  # 10 times as fast
    assert faster[0]["minutes"] == pytest.approx((60 + 256 / 80) / 60)


@pytest.mark.slow
def test_scale_measures_what_it_computes_from(tmp_path):
    found = scale.main(["--quick", "--json", str(tmp_path / "scale.json")])
    assert json.loads((tmp_path / "scale.json").read_text())["rows"] == found["rows"]
    assert found["traffic"]["scores"] > 0 and found["stages"]["scores"]["peak_bytes"] > 0
    assert found["single"]["training_s"] > found["single"]["forward_s"] > 0
    assert found["single"]["activation_bytes"] > 0


def test_devices_are_compared_by_the_order_of_scores_and_by_what_stays(monkeypatch):
    monkeypatch.setattr(gpu, "CRITERIA", ("l1",))
    (same,) = gpu.parity(["test_resnet"], images=2, size=32)
    assert same["rank_correlation"] == pytest.approx(1) and same["kept_by_both"] == 1
    whole, seen = gpu.scored, []

    def reversed_at_last(*arguments):
        scores, plan = whole(*arguments)
        seen.append(plan)
        if len(seen) == 1:
            return scores, plan
        backwards = scap_hub.Scores({name: -scores[name] for name in scores}, scores.scope)
        return backwards, scap_hub.PruningPlan.from_json(seen[0].to_json())

    monkeypatch.setattr(gpu, "scored", reversed_at_last)
    (other,) = gpu.parity(["test_resnet"], images=2, size=32)
    assert other["rank_correlation"] == pytest.approx(-1) and other["kept_by_both"] == 1


def test_a_part_that_does_not_fit_into_the_time_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "set_quiet", lambda quiet: None)  # it would last
    found = gpu.main(["--quick", "--minutes", "0", "--json", str(tmp_path / "gpu.json")])
    assert {text.split(":")[0] for text in found["left_out"]} >= {"parity", "ranks", "latency", "scoring", "repair"}
    assert all(text.endswith(("no time left", "no data")) for text in found["left_out"])
    assert json.loads((tmp_path / "gpu.json").read_text()) == found


@pytest.mark.parametrize("name", spectra.NETS)
def test_the_small_networks_run_at_16_pixels(name):
    assert spectra.NETS[name]().eval()(torch.zeros(2, 1, 16, 16)).shape == (2, 10)


@needs_images
def test_masks_and_boxes_of_collages_say_the_same():
    splits = collages.collages(24, 6)
    assert {name: len(split) for name, split in splits.items()} == {"train": 24, "validation": 4, "test": 6}
    seen = 0
    for scene in (*splits["train"], *splits["test"]):
        mask = np.array(scene["annotation"])
        assert np.array(scene["image"]).shape == (collages.SIDE, collages.SIDE, 3)
        boxes, categories = scene["objects"]["bbox"], scene["objects"]["category"]
        assert set(np.unique(mask)) - {0} <= {category + 1 for category in categories}
        for (x, y, width, height), category in zip(boxes, categories, strict=True):
            window = mask[int(y) : int(y + height), int(x) : int(x + width)]
            assert window.shape == (height, width)
            seen += (window == category + 1).mean() > 0.1
        if len(boxes) == 1:
            rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
            assert boxes[0] == [columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1]
    assert seen > 0.9 * sum(len(scene["objects"]["bbox"]) for scene in (*splits["train"], *splits["test"]))
    again = collages.collages(24, 6)["test"][0]
    assert np.array_equal(np.array(again["image"]), np.array(splits["test"][0]["image"]))


@needs_images
@pytest.mark.slow
@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_the_benchmark_by_task_runs(task, tmp_path):
    path = tmp_path / "out.json"
    dense, cut = by_task.main(["--quick", "--tasks", task, "--targets", "macs=0.5", "--json", str(path)])
    assert dense["target"] == "dense" and 0 < cut["macs"] <= 0.5 and len(cut["latency_ms"]) == 2
    assert all(0 <= cut[name] <= 1 for name in ("repaired", "tuned", "fine-tuned"))
    assert json.loads(path.read_text()) == [dense, cut]


@needs_images
@pytest.mark.slow
def test_the_benchmark_of_features_runs_and_leaves_other_tasks_alone(tmp_path):
    path, other = tmp_path / "out.json", {"task": "detection", "target": "dense", "metric": "mAP", "dense": 0.5}
    path.write_text(json.dumps([other]))
    rows = by_task.main(["--quick", "--tasks", "features", "--targets", "macs=0.5", "--json", str(path)])
    assert [row["metric"] for row in rows] == 2 * ["feature cosine", "kNN top-1"]
    assert rows[0]["dense"] == pytest.approx(1) and all(0 <= row["tuned"] <= 1 for row in rows[2:])
    assert json.loads(path.read_text()) == [other, *rows]
