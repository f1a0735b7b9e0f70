"""Kills runs at random moments, resumes them, and compares their weights with an undisturbed run's; `make kills`.

    python tools/kills.py --kills 20 --ranks 1 2

Each trial sends SIGKILL to all processes of a run, resumes it with the same command, and compares.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMAND = [
    *("-m", "scap_hub", "prune", "test_resnet", "--data", "digits", "--target", "macs=0.6", "--quiet"),
    *("--set", "model_pretrained=false", "--set", "model_num_classes=10", "--set", "model_input_size=[3,32,32]"),
    *("--set", "criterion=l1", "--set", "evaluate_latency=false", "--set", "data_calibration_images=32"),
    *("--set", "finetune_epochs=3"),
]


def main() -> int:
    """Runs the trials; returns 1 if one of them ends with other weights, or does not end."""
    parser = argparse.ArgumentParser(description="Kills runs at random moments and resumes them.")
    parser.add_argument("--kills", type=int, default=20, help="trials, shared out over the numbers of ranks")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of processes")
    parser.add_argument("--seed", type=int, default=0, help="chooses the moments")
    options = parser.parse_args()
    moments, failed = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        for ranks in options.ranks:
            start = time.monotonic()
            run(Path(folder, f"whole-{ranks}"), ranks)
            seconds = time.monotonic() - start
            wanted = weights(Path(folder, f"whole-{ranks}"))
            for number in range(options.kills // len(options.ranks)):
                out, after = Path(folder, f"cut-{ranks}-{number}"), moments.uniform(0, seconds)
                stage = run(out, ranks, after)
                finished = out.exists() or run(out, ranks) == "ended"
                same = finished and weights(out) == wanted
                failed += not same
                print(f"{ranks} ranks, killed after {after:.1f} of {seconds:.1f} s, had kept {stage}: "
                      f"{'the same weights' if same else 'FAILED'}", flush=True)  # fmt: skip
    print(f"{failed} failed")
    return int(failed > 0)


def run(out: Path, ranks: int, kill_after: float | None = None) -> str:
    """Starts a run; returns the last thing that it kept if it was killed, else "ended" or "exit CODE"."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launch, *COMMAND, "--out", str(out)]
    process = subprocess.Popen(command, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        code = process.wait(kill_after)
    except subprocess.TimeoutExpired:
        # torchrun gives each rank a session of its own.
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        for pid in [process.pid, *map(int, children)]:
            os.kill(pid, signal.SIGKILL)
        process.wait()
        kept = sorted(out.with_name(f".{out.name}.unfinished").glob("**/*"), key=lambda path: path.stat().st_mtime)
        return kept[-1].name if kept else "nothing"
    return "ended" if code == 0 else f"exit {code}"


def weights(out: Path) -> bytes:
    """The saved weights, byte by byte."""
    path = out / "model.safetensors"
    return path.read_bytes() if path.is_file() else b""


if __name__ == "__main__":
    sys.exit(main())
