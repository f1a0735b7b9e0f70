"""What it costs to find channel groups and to verify a plan, against forward passes of the calibration images.

    python benchmarks/analysis.py --json out/analysis.json
    python benchmarks/analysis.py --quick                   # ResNet-50 and MobileNetV2 only

CPU seconds of all threads, the smallest of three. "Groups" is `channel_groups`, all trials included; "untried" is the
same with the trials switched off, as a tool pays that takes its first answer for right. "Verification" is what `prune`
does with a plan before repair: the pruned model against the masked dense one, on two images in float64. "Forward"
is 64 images through the dense model in float32. Weights are random: the cost does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODELS = (
    "resnet50", "mobilenetv2_100", "convnext_tiny", "swin_tiny_patch4_window7_224", "densenet121", "regnety_002",
    "fastvit_t8", "pvt_v2_b0", "xcit_nano_12_p16_224", "coat_lite_tiny",
)  # fmt: skip
QUICK = MODELS[:2]
IMAGES = 64


def seconds(work: Callable[[], Any], repeats: int = 3) -> float:
    """CPU seconds of all threads of one call, the smallest of a few."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def measure(name: str) -> dict[str, float]:
    """Analyses, verifies and runs one model."""
    from unittest.mock import patch

    import timm
    import torch

    from scap_hub import channel_groups, select, verify
    from scap_hub.channels import discovery
    from scap_hub.channels.oracle import randomize

    model = randomize(timm.create_model(name)).eval()
    size = model.pretrained_cfg["input_size"]
    example, images = torch.zeros(1, *size), torch.randn(IMAGES, *size, generator=torch.Generator().manual_seed(0))
    groups = channel_groups(model, example)
    scores = {group.name: torch.rand(group.size) for group in groups.prunable}
    plan = select(groups, scores, target="ratio=0.5")
    with patch.object(discovery._Analysis, "_stuck", lambda *_: None):
        untried = seconds(lambda: channel_groups(model, example))
    with torch.no_grad():
        return {
            "groups": seconds(lambda: channel_groups(model, example)),
            "untried": untried,
            "verification": seconds(lambda: verify(model, plan, images[:2]), repeats=1),
            "forward": seconds(lambda: model(images), repeats=1),
        }


def main() -> None:
    """Prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description="Times channel groups and verification.")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: dict[str, dict[str, float]] = {}
    heads = f"{'groups':>10}{'untried':>10}{'verification':>14}{'forward, 64':>14}{'verification / forward':>24}"
    print(f"{'model':32}{heads}")
    for name in QUICK if options.quick else MODELS:
        row = rows[name] = measure(name)
        share = row["verification"] / row["forward"]
        print(
            f"{name:32}{row['groups']:10.2f}{row['untried']:10.2f}{row['verification']:14.2f}{row['forward']:14.2f}"
            f"{share:24.2f}",
            flush=True,
        )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
