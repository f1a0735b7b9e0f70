"""Several processes under torchrun: one that is lost ends the run, mistakes are told once."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.test_cli import TINY

ROOT = Path(__file__).parents[1]
ALONE = ("--standalone", "--nproc_per_node", "2")


def torchrun(*arguments, ranks=ALONE, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *ranks, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(run, timeout):
    """Its standard error."""
    try:
        return run.communicate(timeout=timeout)[1]
    finally:
        for process in [*psutil.Process(run.pid).children(recursive=True), run] if run.poll() is None else []:
            process.kill()


def told(error):
    """The lines that are ours."""
    return re.findall(r"scap-hub: .*", error)


def worker(run, rank):
    """The process of a rank."""
    found = [child for child in psutil.Process(run.pid).children() if child.environ().get("RANK") == str(rank)]
    return found[0]


@pytest.mark.parametrize(
    ("number", "rank", "line"),
    [
        (signal.SIGKILL, 1, r"rank 1 \(process {pid} on .*\) is gone: it was killed, for lack of memory perhaps"),
        pytest.param(
            *(signal.SIGSTOP, 0, r"rank 0 \(process {pid} on .*\) is stopped, for 2\d s now"), marks=pytest.mark.slow
        ),
    ],
)
def test_a_lost_rank_ends_the_run_and_is_told_once(number, rank, line, tmp_path):
    run = torchrun("-m", "scap_hub", *TINY, "--set", "finetune_epochs=900", "--out", tmp_path / "out")
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob(".out.unfinished/training-0/checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.2)
    lost, begin = worker(run, rank), time.monotonic()
    lost.send_signal(number)
    error = ended(run, 150)
    assert time.monotonic() - begin < 90 and run.returncode == 1
    (only,) = told(error)
    assert re.search(line.format(pid=lost.pid), only) and only.endswith("the same command goes on where it was")
    assert "Connection closed" not in error and list(tmp_path.glob(".out.unfinished/training-0/checkpoint-*"))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["prune", "no-such-model", "--data", "digits"], "unknown model 'no-such-model'"),
        pytest.param(["prune", "--no-such-option"], "No such option", marks=pytest.mark.slow),
        pytest.param([*TINY, "--set", "finetune_epoch=1"], "finetune_epochs", marks=pytest.mark.slow),
    ],
)
def test_a_mistake_is_told_once_and_ends_every_rank_with_2(arguments, line):
    run = torchrun("-m", "scap_hub", *arguments)
    error = ended(run, 200)
    (only,) = told(error)
    assert line in only and run.returncode == 1  # torchrun's own
    root = error[error.index("Root Cause") :]
    assert re.search(r"exitcode  : 2 ", root)


OWN = """
import scap_hub
from scap_hub.cli.app import main
from scap_hub.errors import DataError
from scap_hub.training.distributed import accelerator

def prune(*_, **__):
    if accelerator().process_index == 1:
        raise DataError("image 7 cannot be read")
    accelerator().wait_for_everyone()

scap_hub.prune = prune
main()
"""


@pytest.mark.slow
def test_what_only_one_rank_finds_is_told_too(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    error = ended(torchrun(tmp_path / "own.py", "prune", "resnet18", "--data", "digits"), 200)
    assert told(error) == ["scap-hub: image 7 cannot be read"]
    assert "Connection closed" not in error and "interrupted" not in error


BUSY = """
import os, sys, time
from scap_hub.training import heartbeat
heartbeat.PERIOD, heartbeat.STOPPED, heartbeat.SILENT = 0.2, 1.0, 2.0
from scap_hub.training.distributed import accelerator, from_main, main_first
rank = accelerator().process_index
assert from_main(lambda: time.sleep(5) or 7) == 7
main_first(lambda: time.sleep(1.5))
if rank == 1:
    sys.exit()
time.sleep(4)
print("done")
"""


def test_a_rank_that_works_long_or_has_finished_is_not_lost(tmp_path):
    (tmp_path / "busy.py").write_text(BUSY)
    run = torchrun(tmp_path / "busy.py")
    out, error = run.communicate(timeout=200)
    # torch 2.9 has lines of its own before, "[Gloo] Rank 0 is connected".
    assert run.returncode == 0 and out.split()[-1:] == ["done"] and out.count("done") == 1 and not told(error), error


def plan(folder):
    return json.loads((folder / "pruning_plan.json").read_text())


def files(folder, count=5):
    """A data set in files of unlike sizes, and so of unlike shares."""
    for number in range(count):
        images = [
            Image.fromarray(np.random.default_rng(k).integers(0, 255, (8, 8), np.uint8)) for k in range(number, 9)
        ]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
        part = datasets.Dataset.from_dict({"image": images, "label": list(range(number, 9))}, features=features)
        part.to_parquet(folder / "data" / f"train-{number}.parquet")
    return folder / "data"


def nodes():
    """One worker on each of two machines, which are this one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test")
    return [("--nnodes", 2, "--nproc-per-node", 1, "--local-addr", "127.0.0.1", *meeting)] * 2


@pytest.mark.slow
@pytest.mark.parametrize("how", ["two machines", "four ranks"])
def test_the_plan_of_one_process(how, tmp_path):
    command = ["-m", "scap_hub", *TINY, "--set", "criterion=scap", "--set", "data_calibration_images=18", "--quiet"]
    if how == "four ranks":  # of a stream, trained on by steps
        command += ["--data", files(tmp_path), "--set", "data_streaming=true", "--set", "finetune_steps=3"]
        command += ["--set", "data_batch_size=2", "--set", "data_labels=false"]
        launches = [("--standalone", "--nproc_per_node", 4)]
    else:
        command += ["--set", "finetune_epochs=1"]
        launches = nodes()
    alone = subprocess.run([sys.executable, *map(str, [*command, "--out", tmp_path / "alone"])], cwd=ROOT)
    assert alone.returncode == 0
    runs = [torchrun(*command, "--out", tmp_path / "many", ranks=map(str, ranks)) for ranks in launches]
    errors = [ended(run, 400) for run in runs]
    assert [run.returncode for run in runs] == [0] * len(runs), errors
    assert plan(tmp_path / "many") == plan(tmp_path / "alone")


@pytest.mark.slow
def test_data_that_is_handed_over_on_two_ranks(tmp_path):
    run = torchrun("-m", "tests.handed_ranks", tmp_path)
    error = ended(run, 400)
    assert run.returncode == 0, error
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second and len(first) == 7
    assert first.pop("too few").startswith("too few training images for a batch of 8 on each of 2 processes; lower")
    assert all(losses[1] > 0 for _, losses, _ in first.values())


@pytest.mark.slow
def test_a_killed_training_on_a_stream_goes_on_where_it_was(tmp_path):
    """Two ranks, each with files of its own; the weights are those of an undisturbed run."""
    data = files(tmp_path)

    def start(out):
        changes = {"data_streaming": "true", "data_labels": "false", "data_batch_size": 2, "finetune_steps": 40}
        changes |= {"finetune_epochs": 20, "data_calibration_images": 8}
        options = [part for name, value in changes.items() for part in ("--set", f"{name}={value}")]
        return torchrun("-m", "scap_hub", *TINY, "--data", data, *options, "--quiet", "--out", tmp_path / out)

    whole = start("whole")
    assert (ended(whole, 400), whole.returncode)[1] == 0
    cut, deadline = start("cut"), time.monotonic() + 200
    while not list(tmp_path.glob(".cut.unfinished/training-0/checkpoint-0000[3-9]")) and time.monotonic() < deadline:
        time.sleep(0.02)
    for process in [*psutil.Process(cut.pid).children(recursive=True), cut]:
        process.kill()
    cut.wait(60)
    assert list(tmp_path.glob(".cut.unfinished/training-0/checkpoint-*"))
    resumed = start("cut")
    assert (error := ended(resumed, 400), resumed.returncode)[1] == 0, error
    left, right = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(left[name], right[name]) for name in left)
