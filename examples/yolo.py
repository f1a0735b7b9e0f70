"""Prunes a YOLO of ultralytics: plan, surgery and repair are ours, the training is ultralytics' own.

pip install ultralytics            # AGPL-3.0, so it is no dependency of scap_hub
python examples/yolo.py            # minutes on a CPU: a nano model on squares and discs that are made here
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer

import scap_hub


def shapes(folder: Path, size: int, counts: dict[str, int]) -> Path:
    """Images with a bright square or disc each, on noise, in the layout that ultralytics reads; its data.yaml."""
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for number in range(count):
            image = Image.fromarray(rng.integers(0, 96, (size, size, 3), dtype=np.uint8))
            label, side = int(rng.integers(2)), int(rng.integers(size // 4, size // 2))
            left, top = (int(rng.integers(size - side)) for _ in range(2))
            draw, box = ImageDraw.Draw(image), (left, top, left + side - 1, top + side - 1)
            (draw.ellipse if label else draw.rectangle)(box, fill=tuple(rng.integers(128, 256, 3).tolist()))
            image.save(folder / "images" / split / f"{number}.png")
            middle = ((left + side / 2) / size, (top + side / 2) / size)
            text = f"{label} {middle[0]:.6f} {middle[1]:.6f} {side / size:.6f} {side / size:.6f}\n"
            (folder / "labels" / split / f"{number}.txt").write_text(text)
    data = folder / "data.yaml"
    data.write_text(f"path: {folder}\ntrain: images/train\nval: images/val\nnames: [square, disc]\n")
    return data


def trained(yolo: YOLO, network: torch.nn.Module, **options: object) -> torch.nn.Module:
    """The network after ultralytics' training; its trainer would otherwise build the dense one again from the yaml."""

    class Trainer(DetectionTrainer):
        def get_model(self, cfg=None, weights=None, verbose=True):
            return network

    yolo.train(trainer=Trainer, **options)
    return yolo.model.float().eval()


def quality(yolo: YOLO, network: torch.nn.Module, **options: object) -> float:
    """mAP50 on the validation images; of a copy, because a validation folds the batch norms away."""
    yolo.model = copy.deepcopy(network)
    return float(yolo.val(**options).box.map50)


def calibration(folder: Path, size: int) -> list[torch.Tensor]:
    """The training images as ultralytics feeds them: RGB, 0 to 1."""
    files = sorted(folder.glob("*.png"))[:64]
    images = [torch.from_numpy(np.asarray(Image.open(file))).permute(2, 0, 1) / 255 for file in files]
    return list(torch.stack(images).split(16))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="yolo11n.yaml", help="an ultralytics .yaml, or .pt with weights")
    parser.add_argument("--target", default="macs=0.6")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=10, help="of the dense and of the pruned model")
    parser.add_argument("--images", type=int, default=128)
    args = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = shapes(folder, args.size, {"train": args.images, "val": 32})
        shared = {"data": str(data), "imgsz": args.size, "device": "cpu", "workers": 0, "verbose": False,
                  "plots": False, "project": scratch}  # fmt: skip
        learn = {**shared, "epochs": args.epochs, "batch": 16, "amp": False}
        yolo = YOLO(args.model)
        yolo.train(**learn)
        dense = yolo.model.float().eval()

        batches = calibration(folder / "images" / "train", args.size)
        groups = scap_hub.channel_groups(dense, batches[0][:1])
        scores = scap_hub.score(dense, batches, "l1", groups=groups)
        plan = scap_hub.select(groups, scores, args.target, round_to=8)
        print(f"verified: difference {scap_hub.verify(dense, plan, batches[0][:1]):.1e}")
        small = scap_hub.apply_plan(dense, plan)
        scap_hub.repair(dense, small, plan, batches)

        rows = [("dense", dense, quality(yolo, dense, **shared)), ("repaired", small, quality(yolo, small, **shared))]
        tuned = trained(yolo, copy.deepcopy(small), **learn)
        rows.append(("fine-tuned", tuned, quality(yolo, tuned, **shared)))
        (folder / "plan.json").write_text(plan.to_json())  # with the weights, all that another process needs
    for name, network, found in rows:
        print(f"{name:11} parameters {sum(weight.numel() for weight in network.parameters()):>9,}  mAP50 {found:.3f}")


if __name__ == "__main__":
    main()
