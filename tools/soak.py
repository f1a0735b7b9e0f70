"""Prunes, saves, loads and scores a tiny model again and again in one process; `make soak`.

    python tools/soak.py --cycles 200

Memory and open files must stay flat: neither may be more after the last cycle than after a tenth of them, but for a
margin.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

import scap_hub
from scap_hub.hub.checkpoint import load, save_checkpoint
from scap_hub.zoo import load_model

MARGIN = 24 * 2**20
"""Bytes that the allocator may hold more of."""


def main() -> int:
    """Runs the cycles; returns 1 if something grows."""
    parser = argparse.ArgumentParser(description="Prunes, saves, loads and scores again and again.")
    parser.add_argument("--cycles", type=int, default=200)
    options = parser.parse_args()
    process, start = psutil.Process(), time.monotonic()
    memory, files = [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.cycles):
            cycle(Path(folder, "out"))
            gc.collect()
            memory.append(process.memory_info().rss)
            files.append(process.num_fds())
    warm = max(1, options.cycles // 10)
    grown, more = max(memory[-warm:]) - max(memory[:warm]), files[-1] - files[warm - 1]
    print(f"{options.cycles} cycles in {time.monotonic() - start:.0f} s: memory {memory[warm - 1] / 2**20:.0f} MiB "
          f"after {warm}, {memory[-1] / 2**20:.0f} at the end; {files[-1]} open files, {more:+}")  # fmt: skip
    return int(grown > MARGIN or more > 0)


def cycle(folder: Path) -> None:
    """One model: scored, pruned, saved, loaded, and scored again."""
    loaded = load_model("test_resnet", pretrained=False, input_size=(3, 32, 32))
    batches = [torch.randn(4, 3, 32, 32)]
    groups = scap_hub.channel_groups(loaded.module, batches[0])
    scores = scap_hub.score(loaded.module, batches, criterion="l1", groups=groups)
    plan = scap_hub.select(groups, scores, target="ratio=0.5")
    save_checkpoint(folder, scap_hub.apply_plan(loaded.module, plan, verify=False), loaded, plan)
    again = load(folder)
    scap_hub.score(again, batches, criterion="l1", groups=scap_hub.channel_groups(again, batches[0]))
    shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
