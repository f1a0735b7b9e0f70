"""Compress a model without labels and without training: a few hundred images, a few minutes.

    python examples/no_training.py resnet50.a1_in1k --images photos --target macs=0.75 --out out/no_training

Removed channels are expressed in those that stay, by least squares on the images, and batch-norm statistics are taken
anew. Without `--images`, models trained on ImageNet use a small public set. How often the pruned model agrees with the
dense one needs no labels either.
"""

import argparse
from pathlib import Path

import torch

import scap_hub
from scap_hub.cli import show_report
from scap_hub.placement import fed
from scap_hub.recipe import DataSettings
from scap_hub.training.data import load_data
from scap_hub.zoo import logits


@torch.no_grad()
def agreement(result: scap_hub.Result, images: Path) -> float:
    """Share of the images to which the pruned and the dense model give the same class."""
    settings = DataSettings(labels=False, augmentation="none")
    same = []
    for (batch,) in load_data(images, result.loaded.preprocessing, settings).train:
        dense, pruned = (logits(model(fed(model, batch))).argmax(1) for model in (result.loaded.module, result.model))
        same.append((dense == pruned).float())
    return float(torch.cat(same).mean())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="timm name, Hub id or folder")
    parser.add_argument("--images", type=Path, help="folder of images like those the model was trained on; no labels")
    parser.add_argument("--target", default="macs=0.75", help="what stays")
    parser.add_argument("--out", type=Path, default=Path("out/no_training"), help="absent or empty")
    options = parser.parse_args(arguments)

    result = scap_hub.prune(
        options.model, options.images, "no-training", target=options.target, data_labels=False, output_dir=options.out
    )
    show_report(result.report)
    if options.images:
        print(f"agrees with the dense model on {agreement(result, options.images):.1%} of the images")
    print(f"saved in {options.out}")


if __name__ == "__main__":
    main()
