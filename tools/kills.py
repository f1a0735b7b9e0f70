"""Kills runs at random moments, resumes them, and compares their weights with an undisturbed run's; `make kills`.

    python tools/kills.py --kills 20 --ranks 1 2

Each trial sends SIGKILL to all processes of a run, resumes it with the same command, and compares. The run has every
stage: a tuned dense model, scores, diagnostics, a plan with its verification, repair and fine-tuning in two steps,
measurements, saving. Each kill comes at a random moment after a random one of the files that it keeps: seconds alone
would miss the short stages.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

COMMAND = [
    *("-m", "scap_hub", "prune", "test_resnet", "--data", "digits", "--target", "macs=0.6", "--quiet"),
    *("--set", "model_pretrained=false", "--set", "model_num_classes=10", "--set", "model_input_size=[3,32,32]"),
    *("--set", "evaluate_latency=false", "--set", "data_calibration_images=32", "--set", "schedule_steps=2"),
    *("--set", "finetune_dense_epochs=1", "--set", "finetune_epochs=2"),
]


def main() -> int:
    """Runs the trials; returns 1 if one of them ends with other weights, or does not end."""
    parser = argparse.ArgumentParser(description="Kills runs at random moments and resumes them.")
    parser.add_argument("--kills", type=int, default=20, help="trials for each number of ranks")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of processes")
    parser.add_argument("--seed", type=int, default=0, help="chooses the moments")
    options = parser.parse_args()
    moments, failed = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        for ranks in options.ranks:
            whole = run(Path(folder, f"whole-{ranks}"), ranks)
            wanted = weights(Path(folder, f"whole-{ranks}"))
            assert whole.ended and wanted, "the undisturbed run failed"
            for number in range(options.kills):
                out = Path(folder, f"cut-{ranks}-{number}")
                files, later = moments.randint(1, whole.files), moments.uniform(0, 2 * whole.seconds / whole.files)
                cut = run(out, ranks, files, later)
                finished = cut.ended or run(out, ranks).ended
                same = finished and weights(out) == wanted
                failed += not same
                print(f"{ranks} ranks, {'ended' if cut.ended else 'killed'} {cut.seconds:.1f} s after its first file, "
                      f"when it had kept {cut.files} of {whole.files} files, last {cut.last}: "
                      f"{'the same weights' if same else 'FAILED'}", flush=True)  # fmt: skip
    print(f"{failed} failed")
    return int(failed > 0)


class Ran(NamedTuple):
    """A run that ended or was killed: how many files it has kept, the last of them, seconds after the first."""

    ended: bool
    files: int
    last: str
    seconds: float


def run(out: Path, ranks: int, kill_at: int | None = None, later: float = 0.0) -> Ran:
    """Starts a run, and kills it so many seconds after it has kept so many files."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launch, *COMMAND, "--out", str(out)]
    hidden = out.with_name(f".{out.name}.unfinished")
    process = subprocess.Popen(command, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    seen: dict[str, float] = {}
    code = None
    while code is None:
        code, now = process.poll(), time.monotonic()
        with contextlib.suppress(FileNotFoundError):  # a folder that a finishing run removes meanwhile
            for path in hidden.glob("**/*"):
                seen.setdefault(path.relative_to(hidden).as_posix(), now)
        if kill_at is not None and len(seen) >= kill_at and now - sorted(seen.values())[kill_at - 1] >= later:
            kill(process)
            break
        time.sleep(0.02)
    times = [*seen.values(), time.monotonic()]
    return Ran(code == 0, len(seen), [*seen, "nothing"][-2] if seen else "nothing", times[-1] - times[0])


def kill(process: subprocess.Popen[bytes]) -> None:
    """Sends SIGKILL to a process and its children; torchrun gives each rank a session of its own."""
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    for pid in [process.pid, *map(int, children)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def weights(out: Path) -> bytes:
    """The saved weights, byte by byte."""
    path = out / "model.safetensors"
    return path.read_bytes() if path.is_file() else b""


if __name__ == "__main__":
    sys.exit(main())
