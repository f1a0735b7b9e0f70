"""Models side by side in the runtimes that people deploy on."""

import json
import shlex
import subprocess
import sys

import pytest
import timm

from scap_hub.errors import RecipeError, ScapHubError
from scap_hub.hub.checkpoint import save_checkpoint
from scap_hub.run.bench_runtimes import bench_runtimes
from tests.test_adapters import tiny_resnet
from tests.test_checkpoint import pruned

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("saved") / "out", *pruned(tiny_resnet()))


def test_a_pruned_model_beside_its_dense_one(folder):
    asked = []

    def timer(calls):
        asked.append([(module.session.get_session_options().intra_op_num_threads, x.shape[0]) for module, x in calls])
        return [float(number) for number, _ in enumerate(calls, 1)]

    rows = bench_runtimes(folder, int8=True, threads=(1, 2), batch_sizes=(3,), timer=timer)
    assert asked == [[(threads, 3)] * 4 for threads in (1, 2)], "all of a setting take turns"
    assert [(row.model, row.precision) for row in rows[:4]] == [
        (model, precision) for model in ("dense", str(folder)) for precision in ("fp32", "int8")
    ]
    dense, dense_int8, small, small_int8 = rows[:4]
    assert dense.file_bytes > small.file_bytes and dense_int8.file_bytes < dense.file_bytes
    assert (small.speedup, small_int8.speedup) == (pytest.approx(1 / 3), pytest.approx(1 / 4))
    assert rows[-1].images_per_second == pytest.approx(750)
    if sys.platform == "linux":
        assert all(10e6 < row.peak_bytes < 2e9 for row in rows)


@pytest.mark.slow
def test_the_command_prints_what_it_measured(folder):
    command = [sys.executable, "-m", "scap_hub", "bench", str(folder), "--runtime", "onnxruntime", "--batch", "1"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert [row["model"] for row in found["rows"]] == ["dense", str(folder)] and found["rows"][0]["ms"] > 0


def test_bad_input(folder, monkeypatch):
    with pytest.raises(RecipeError, match=r"runtime 'onnxruntim' is unknown.*did you mean 'onnxruntime'"):
        bench_runtimes(folder, runtimes=["onnxruntim"])
    with pytest.raises(RecipeError, match=r"threads \[0\]"):
        bench_runtimes(folder, threads=[0])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ScapHubError, match=r"pip install 'scap-hub\[onnx\]'"):
        bench_runtimes(folder)


@pytest.mark.slow
def test_the_benchmark_compares_four_variants(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend("benchmarks")
    import deploy  # of benchmarks/

    monkeypatch.setattr(deploy, "MODELS", ("test_efficientnet",))
    monkeypatch.setattr(deploy, "liked_multiple", lambda *_: 8)
    arguments = ["--quick", "--only", "test_", "--json", str(tmp_path / "found.json")]
    rows = deploy.main(arguments)
    assert [(row["model"], row["precision"]) for row in rows] == [
        (model, precision) for model in ("dense", "pruned") for precision in ("fp32", "int8")
    ]
    assert json.loads((tmp_path / "found.json").read_text())["rows"] == rows
    found = json.loads((tmp_path / "found.json").read_text())
    other = {**rows[0], "network": "other"}
    stale = {**rows[1], "ms": -1.0}
    (tmp_path / "found.json").write_text(json.dumps({**found, "rows": [other, stale]}))
    again = deploy.main(arguments)
    kept = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert kept[0] == other and stale not in kept and len(kept) == 5, "what was not measured again stays"
    assert sorted(map(deploy.key, kept[1:])) == sorted(map(deploy.key, again))
    assert shlex.split(other["command"])[1] == "benchmarks/deploy.py" and str(tmp_path) not in other["command"]
    (tmp_path / "found.json").write_text(json.dumps({**found, "torch": "0.1"}))
    with pytest.raises(SystemExit, match=r"torch 0\.1, now"):
        deploy.main(arguments)
    assert timm.is_model("test_efficientnet") and rows[0]["file_bytes"] > rows[2]["file_bytes"]
