"""Code run on two processes under torchrun."""

import os
import subprocess
import sys

import torch


def on_two_ranks(code, folder):
    """Runs code that leaves `{rank}.pt` in the folder that is its first argument; what the ranks left."""
    (folder / "job.py").write_text(code)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*launch, folder / "job.py", folder], check=True, env=environment, timeout=300)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]
