"""Prune a pretrained model on your own images, then use it.

    python examples/own_images.py flowers --model resnet50.a1_in1k --out out/flowers

The folder holds one folder a class: flowers/train/rose/1.jpg, flowers/train/tulip/7.jpg, and so on; beside `train`
there may be `validation` and `test`. The pretrained model gets a new head for these classes and is tuned first, then it
is pruned, repaired, and fine-tuned with its dense self as teacher.
"""

import argparse
from pathlib import Path

import timm
import torch
from PIL import Image

import scap_hub
from scap_hub.cli import show_report


def classify(folder: Path, image: Path) -> int:
    """What somebody does who has nothing but the saved folder: load it, prepare an image, ask for its class."""
    model = scap_hub.load(folder)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    with torch.no_grad():
        return int(model(transform(Image.open(image).convert("RGB"))[None]).argmax())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, help="folder with train/CLASS/*.jpg")
    parser.add_argument("--model", default="resnet50.a1_in1k", help="timm name, Hub id or folder")
    parser.add_argument("--target", default="macs=0.5", help="what stays")
    parser.add_argument("--dense-epochs", type=int, default=5, help="training of the dense model and its new head")
    parser.add_argument("--epochs", type=int, default=10, help="fine-tuning of the pruned model")
    parser.add_argument("--out", type=Path, default=Path("out/own_images"), help="absent or empty")
    options = parser.parse_args(arguments)

    result = scap_hub.prune(
        options.model,
        options.images,
        "half-macs",
        target=options.target,
        finetune_dense_epochs=options.dense_epochs,
        finetune_epochs=options.epochs,
        output_dir=options.out,
    )
    show_report(result.report)

    image = next(path for path in sorted(options.images.glob("train/*/*")) if path.is_file())
    label = result.loaded.labels[classify(options.out, image)]
    print(f"{image} is a {label!r}, says the model in {options.out}")


if __name__ == "__main__":
    main()
