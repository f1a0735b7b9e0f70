"""Accuracy left on Fashion-MNIST after pruning and repair, without training: SCAP beside its rivals in one run.

    python benchmarks/fashion_mnist.py --json out/fashion.json
    python benchmarks/fashion_mnist.py --quick

The images come from Debian's package `dataset-fashion-mnist`. One small timm ResNet is trained once; every criterion
prunes the same network to the same budgets. Top-1 is on test images.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import datasets
import timm
import torch

import scap_hub
from scap_hub.adapters import load_model
from scap_hub.recipe import DataSettings, FinetuneSettings
from scap_hub.training.data import load_data
from scap_hub.training.finetune import finetune

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from fashion_mnist import fashion_mnist

SIZE = (1, 28, 28)
CRITERIA = ("scap", "l1", "random")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2,000 images, one epoch, one budget")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    images, epochs, budgets = (2_000, 1, (0.5,)) if options.quick else (20_000, 4, (0.5, 0.3, 0.1))
    try:
        splits = fashion_mnist()
    except FileNotFoundError as error:
        sys.exit(f"skipped: {error}")
    splits = datasets.DatasetDict(
        train=splits["train"].shuffle(seed=0).select(range(images)),
        test=splits["test"].select(range(min(images, 10_000))),
    )
    torch.manual_seed(0)
    grey = {"mean": (0.5,), "std": (0.5,)}
    dense = timm.create_model("resnet10t", in_chans=1, num_classes=10, pretrained_cfg_overlay=grey)
    data = load_data(splits, load_model(dense, input_size=SIZE).preprocessing, DataSettings(), num_classes=10)
    finetune(dense, data, FinetuneSettings(epochs=epochs, learning_rate=2e-3))

    rows = []
    for budget in budgets:
        for criterion in CRITERIA:
            options_ = dict(criterion=criterion, target=f"macs={budget}", finetune_epochs=0, evaluate_latency=False)
            report = scap_hub.prune(dense, splits, "half-macs", model_input_size=SIZE, **options_).report
            macs = report.after.macs / report.before.macs
            row = {"criterion": criterion, "macs": macs, "dense": report.before.top1, "pruned": report.after.top1}
            rows.append(row)
            print(f"{criterion:8} macs x{macs:.3f}  top-1 {row['dense']:.4f} -> {row['pruned']:.4f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
