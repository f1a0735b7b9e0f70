"""Several processes under torchrun: one that is lost ends the run, mistakes are told once."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

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
    assert run.returncode == 0 and out.split() == ["done"] and not told(error), error
