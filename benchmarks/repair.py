"""What repair costs, against one epoch of training on the same images.

    python benchmarks/repair.py --json out/repair.json
    python benchmarks/repair.py --quick                        # ResNet-18 on small images

Half of the MACs go by L1 norm. Repair is least squares in every layer that lost inputs, then batch-norm statistics; the
epoch is fine-tuning of the pruned model with its defaults. Weights are random, and so are images and labels: neither
changes the cost. Runs on the GPU where there is one; `OMP_NUM_THREADS` is yours.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

import scap_hub
from scap_hub.compensation.least_squares import compensate
from scap_hub.recipe import FinetuneSettings
from scap_hub.timing.clock import device_name
from scap_hub.training.data import load_data
from scap_hub.training.distributed import accelerator
from scap_hub.training.finetune import finetune

MODELS = (("resnet50", 224), ("mobilenetv2_100", 224), ("convnext_tiny", 224), ("vgg16_bn", 32))


def measured(name: str, size: int, images: int, batch: int) -> dict[str, Any]:
    """Seconds of repair and of an epoch for one model."""
    torch.manual_seed(0)
    device = accelerator().device
    dense = timm.create_model(name, num_classes=10).eval().to(device)
    pixels, labels = torch.randn(images, 3, size, size), torch.arange(images) % 10
    groups = scap_hub.channel_groups(dense, pixels[:1].to(device))
    plan = scap_hub.select(groups, scap_hub.score(dense, [], "l1", groups=groups), target="macs=0.5")
    small = scap_hub.apply_plan(dense, plan)
    batches = list(pixels.to(device).split(batch))

    start = time.perf_counter()
    compensate(dense, small, plan, batches, batch_norm=True)
    repair = time.perf_counter() - start

    loader = DataLoader(TensorDataset(pixels, labels), batch_size=batch, shuffle=True)
    settings = FinetuneSettings(epochs=1, precision="no")
    start = time.perf_counter()
    finetune(small, load_data({"train": loader}, None), settings, dense)
    epoch = time.perf_counter() - start
    return {
        "model": name,
        "size": size,
        "images": images,
        "repair_s": repair,
        "epoch_s": epoch,
        "ratio": repair / epoch,
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="benchmarks/repair.py", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small model, 32 images")
    parser.add_argument("--only", help="one of the models")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--json", type=Path, help="where to write everything that was found")
    options = parser.parse_args(arguments)
    models = (("resnet18", 32),) if options.quick else MODELS
    images = 32 if options.quick else options.images
    rows = []
    for name, size in models:
        if options.only in (None, name):
            rows.append(measured(name, size, images, min(options.batch, images // 2)))
            row = rows[-1]
            print(
                f"{name:>16} {size:>4}  repair {row['repair_s']:8.1f} s  epoch {row['epoch_s']:8.1f} s  "
                f"ratio {row['ratio']:.2f}",
                flush=True,
            )
    found = {"device": device_name(accelerator().device), "rows": rows}
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
