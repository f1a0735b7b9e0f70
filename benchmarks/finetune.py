"""Which defaults fine-tuning should have: one setting changed at a time, on networks pruned by the default criterion.

    python benchmarks/finetune.py --json out/finetune.json
    python benchmarks/finetune.py --quick
    python benchmarks/finetune.py --nets mobilenetv2 --targets macs=0.3 --epochs 3 --seeds 1

Networks, images and splits are those of `accuracy.py`, as are the dense weights under `--out`. The figure is the best
validation top-1 of the epochs, whose weights are what is kept. Test images are not used. Runs on the GPU where there is
one.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from accuracy import FOLDER, given, layout, loaders, nets, repeated, trained

import scap_hub
from scap_hub.recipe import FinetuneSettings
from scap_hub.training.data import load_data
from scap_hub.training.finetune import finetune

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "rate / 2": {"learning_rate": 0.5},
    "rate x 2": {"learning_rate": 2.0},
    "rate x 4": {"learning_rate": 4.0},
    "rate x 8": {"learning_rate": 8.0},
    "one cycle": {"schedule": "onecycle"},
    "smoothing 0.1": {"label_smoothing": 0.1},
    "mixup 0.2": {"mixup": 0.2},
    "average 0.99": {"ema": 0.99},
    "no teacher": {"distillation": {"weight": 0.0}},
    "teacher 0.9": {"distillation": {"weight": 0.9}},
    "temperature 4": {"distillation": {"temperature": 4.0}},
    "features 1": {"distillation": {"features": 1.0}},
    "features 10": {"distillation": {"features": 10.0}},
    "no decay": {"weight_decay": 0.0},
    "SGD": {"optimizer": "sgd", "learning_rate": 40.0},
}
"""What is changed; learning rates are multiples of the one that all others have."""


def changed(name: str, rate: float, **options: Any) -> FinetuneSettings:
    """The default settings at this learning rate, with one change."""
    change = dict(SETTINGS[name])
    rate *= change.pop("learning_rate", 1.0)
    return FinetuneSettings.model_validate({"learning_rate": rate, **options, **change})


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="benchmarks/finetune.py", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one net, 400 images, one epoch, one seed, two settings")
    parser.add_argument("--json", type=Path, help="where to write everything that was found")
    parser.add_argument("--out", type=Path, default=Path("out/accuracy"), help="where dense nets are kept")
    parser.add_argument("--data", type=Path, default=FOLDER, help="folder of the idx files")
    parser.add_argument("--nets", default="mobilenetv2,resnet56")
    parser.add_argument("--targets", default="macs=0.3,macs=0.1", help="one for each net")
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--seeds", type=int, default=3, help="of the training's order")
    parser.add_argument("--images", type=int, default=60_000, help="training images, validation included")
    parser.add_argument("--calibration", type=int, default=512)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--dense-epochs", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--learning-rate", type=float, default=FinetuneSettings().learning_rate)
    parser.add_argument("--precision", default="no", choices=("bf16", "no"))
    parser.add_argument("--mobilenet-weights", type=Path, help="torchvision's mobilenet_v2-b0353104.pth")
    options = parser.parse_args(arguments)
    if options.quick:
        small = {"nets": "resnet56", "targets": "macs=0.5", "settings": "default,no teacher", "seeds": 1, "images": 400}
        small |= {"calibration": 32, "batch": 64, "dense_epochs": 1, "epochs": 1, "out": Path("out/accuracy-quick")}
        vars(options).update(small | given(parser, options))
    options.out.mkdir(parents=True, exist_ok=True)

    found: dict[str, Any] = {}
    for name, target in zip(options.nets.split(","), options.targets.split(","), strict=True):
        net = nets(options.mobilenet_weights)[name]
        precision = layout(name, options.precision)
        splits = loaders(options.data, net[1], options.images, options.batch)
        settings = FinetuneSettings(epochs=options.dense_epochs, weight_decay=0.05, **precision)
        dense = trained(name, net, splits, settings, options.out)
        recipe = {
            "data": {"calibration_images": options.calibration, "batch_size": options.batch},
            "target": target, "finetune": {"epochs": 0}, "evaluate": {"latency": False},
            "criterion": {"diagnostics": False}, "model": {"input_size": net[1]},
        }  # fmt: skip
        pruned = scap_hub.prune(dense, splits, recipe).model
        data = load_data(splits, None)
        case: dict[str, Any] = {"settings": {}}
        found[f"{name}, {target}"] = case
        print(f"\n{name}, {target}, {options.epochs} epochs", flush=True)
        for setting in options.settings.split(","):
            top1 = []
            for seed in range(options.seeds):
                own = changed(setting, options.learning_rate, epochs=options.epochs, **precision)
                rows = finetune(copy.deepcopy(pruned), data, own, dense, seed=seed)
                top1.append(max(row["top1"] for row in rows))
            case.setdefault("repaired", rows[0]["top1"])
            case["settings"][setting] = {"mean": statistics.mean(top1), "top1": top1}
            print(f"{setting:16}" + "".join(f"{100 * value:8.2f}" for value in top1), flush=True)
            if options.json:
                options.json.parent.mkdir(parents=True, exist_ok=True)
                about = {"epochs": options.epochs, "rate": options.learning_rate}
                document = {"command": repeated(parser, options), **about, "nets": found}
                options.json.write_text(json.dumps(document, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
