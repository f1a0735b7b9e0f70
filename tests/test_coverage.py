"""The whole list of benchmarks/models.txt, each model proven by the masking oracle; hours, not for every day."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
MODELS = [
    line.split("\t")[:3]
    for line in (ROOT / "benchmarks" / "models.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("coverage_benchmark", ROOT / "benchmarks" / "coverage.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize(("library", "name", "size"), MODELS, ids=[name for _, name, _ in MODELS])
def test_pruned_equals_masked(benchmark, library, name, size):
    row = benchmark.isolated(benchmark.measure, (library, name, int(size)), 600)
    assert row["status"] == "ok", row.get("message")
    # A random fraction near 1 may round to all channels of a small group.
    assert row["uniform_pruned"] == row["prunable"]
    assert benchmark.reloaded(library, name, int(size), 600)["difference"] == 0


def test_a_measurement_that_dies_or_hangs_is_a_row(benchmark):
    import os
    import time

    assert benchmark.isolated(lambda *_: os._exit(1), ("timm", "x", 1), 10)["status"] == "crash"
    assert benchmark.isolated(lambda *_: time.sleep(60), ("timm", "x", 1), 0.1)["status"] == "timeout"
    row = benchmark.isolated(benchmark.measure, ("timm", "no_such_model", 64), 60)
    assert row["status"] == "RuntimeError" and "no_such_model" in row["message"]


@pytest.mark.slow
def test_one_model_from_end_to_end(tmp_path):
    """As a command, because a process that has run a backward pass cannot be forked into one that runs another."""
    models, results = tmp_path / "models.txt", tmp_path / "coverage.json"
    models.write_text("timm\ttest_byobnet\t64\n", encoding="utf-8")
    command = [sys.executable, str(ROOT / "benchmarks" / "coverage.py"), "--models", str(models)]
    command += ["--json", str(results), "--reload", "--train"]
    subprocess.run(command, check=True, timeout=500)
    written = results.read_text(encoding="utf-8")
    (row,) = json.loads(written)
    assert row["reloaded"]["difference"] == 0
    assert "loss" in row["trained"], row["trained"]
    assert 0 < row["trained"]["loss"] < float("inf") and row["trained"]["gradients"] > 0
    assert row["status"] == "ok" and row["coverage"]["conv"] == 1.0 and row["uniform_macs"] < 0.4
    subprocess.run(command, check=True, timeout=500)
    assert results.read_text(encoding="utf-8") == written, "what is in the file is not measured again"


@pytest.mark.parametrize(("spoil", "message"), [(float("nan"), "not finite"), (0.0, "no gradient reaches")])
def test_a_training_step_that_does_nothing_is_told(benchmark, monkeypatch, spoil, message):
    first, last = (torch.nn.Conv2d(width, 4, 1, bias=False) for width in (3, 4))
    net = torch.nn.Sequential(first, torch.nn.ReLU(), last)
    for weight in net.parameters():
        torch.nn.init.constant_(weight, spoil)
    monkeypatch.setattr(benchmark, "cut_at_random", lambda *_: (net, None, torch.randn(1, 3, 8, 8)))
    with pytest.raises(FloatingPointError, match=message):
        benchmark.train("timm", "net", 8)
