"""Accuracy left on Fashion-MNIST: every criterion, with and without repair, with and without fine-tuning.

    python benchmarks/accuracy.py --json out/accuracy.json
    python benchmarks/accuracy.py --quick
    python benchmarks/accuracy.py --nets vgg16,resnet56 --targets macs=0.1 --criteria scap,obs --seeds 3 --epochs 10

The images come from Debian's package `dataset-fashion-mnist` (or `--data FOLDER` with its files). A tenth of the
training images is the validation split, which the tables show; the test images are looked at once for each finished
model, nothing is decided on them, and `--test` prints them. Each net is trained once; that, and every finished cell, is
kept under `--out`, and the same call takes up there. With `--jobs`, nets, variants and seeds are measured in processes
of their own, so many at a time; after `--minutes` they are stopped, and the cells that are finished are written. What
else the JSON holds stays in it, each part with the command that measured it. Runs on the GPU where there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import scap_hub
from scap_hub.recipe import FinetuneSettings
from scap_hub.run.comparison import Comparison
from scap_hub.training.data import augment, load_data
from scap_hub.training.finetune import finetune

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from fashion_mnist import FOLDER, arrays

VARIANTS: dict[str, dict[str, Any]] = {
    "pruned": {"repair_least_squares": False, "repair_batch_norm": False, "repair_tune_steps": 0, "finetune_epochs": 0},
    "repaired": {"repair_tune_steps": 0, "finetune_epochs": 0},
    "repaired in eights": {"repair_tune_steps": 0, "finetune_epochs": 0, "round_to": 8},
    "without labels": {"finetune_epochs": 0},
    "without labels in 400 steps": {"finetune_epochs": 0, "repair_tune_steps": 400},
    "without labels in 1000 steps": {"finetune_epochs": 0, "repair_tune_steps": 1000},
    "the same above a quarter": {"finetune_epochs": 0, "repair_tune_steps": 400, "target_floor": 0.25},
    "tuned without labels and trained": {"repair_tune_steps": 1000},
    "tuned": {"repair_least_squares": False, "repair_batch_norm": False},
    "repaired and tuned": {},
    # SCAP as published: importance threshold 0.6, no repair, no teacher.
    "paper": {
        "criteria": ["scap"], "targets": ["threshold=0.6"], "round_to": 1,
        "repair_least_squares": False, "repair_batch_norm": False, "finetune_distillation_weight": 0.0,
    },
}  # fmt: skip
"""What is done other than with the defaults and the options."""
CLASSES = 10


def vgg16() -> nn.Module:
    """VGG16-BN at full width for 32 x 32 pixels: one linear layer after the convolutions."""
    layers: list[nn.Module] = []
    channels = 1
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        if width:
            conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out")
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        else:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, CLASSES))


class Block(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or channels != width:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, channels, H, W) to (N, width, H / stride, W / stride)."""
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.shortcut(x))


def resnet56() -> nn.Module:
    """The CIFAR ResNet-56 (He et al., arXiv 1512.03385)."""
    return cifar_resnet(9)


def cifar_resnet(blocks: int) -> nn.Module:
    """Three stages of so many blocks, 16, 32 and 64 channels wide."""
    layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
    channels = 16
    for width in (16, 32, 64):
        for number in range(blocks):
            layers.append(Block(channels, width, 2 if number == 0 and width > 16 else 1))
            channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


def mobilenetv2(weights: Path | None) -> nn.Module:
    """Timm's `mobilenetv2_100`; torchvision's ImageNet weights list their layers in the same order."""
    model = timm.create_model("mobilenetv2_100", num_classes=CLASSES)
    if weights is not None:
        state = dict(zip(model.state_dict(), torch.load(weights, weights_only=True).values(), strict=True))
        body = {name: value for name, value in state.items() if not name.startswith("classifier")}
        model.load_state_dict(body, strict=False)
    return model


# What builds each net, its input size, and the highest learning rate of its first training.
Net = tuple[Callable[[], nn.Module], tuple[int, int, int], float]


def nets(weights: Path | None) -> dict[str, Net]:
    """The nets by name."""
    return {
        "vgg16": (vgg16, (1, 32, 32), 2e-3),
        "resnet56": (resnet56, (1, 32, 32), 4e-3),
        "resnet18": (partial(timm.create_model, "resnet18", in_chans=1, num_classes=CLASSES), (1, 64, 64), 2e-3),
        "mobilenetv2": (partial(mobilenetv2, weights), (3, 64, 64), 2e-3),
        "convnext": (partial(timm.create_model, "convnext_atto", in_chans=1, num_classes=CLASSES), (1, 64, 64), 2e-3),
    }


def layout(name: str, precision: str) -> dict[str, Any]:
    """Settings of a net's trainings: precision, and NHWC where it is faster.

    On the CPU in float32, torch 2.15 corrupts memory in strided 1 x 1 convolutions of few channels in this layout; the
    ResNets have some.
    """
    channels_last = torch.cuda.is_available() or precision == "bf16" or name == "mobilenetv2"
    return {"precision": precision, "channels_last": channels_last}


class Images(Dataset):
    """Images in memory, a whole batch at a time: (N, 1, 28, 28) uint8 and (N,) int64."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.images[indices], self.labels[indices]


def collate(batch: tuple[Tensor, Tensor], size: tuple[int, int, int], train: bool = False) -> tuple[Tensor, Tensor]:
    """What the net reads: framed to 32 x 32 or enlarged, shifted and mirrored for training, normalised."""
    images, labels = batch
    images = F.pad(images, (2, 2, 2, 2))
    if train:
        images = augment(images, mirror=True)
    images = images.float().div_(255)
    if size[1] != images.shape[2]:
        images = F.interpolate(images, size[1:], mode="bilinear", antialias=True)
    return images.sub_(0.286).div_(0.353).expand(-1, size[0], -1, -1).contiguous(), labels


def loaders(folder: Path, size: tuple[int, int, int], images: int, batch: int) -> dict[str, DataLoader]:
    """Training images, a tenth of them held out for validation, and a sixth as many test images."""
    splits = {}
    whole = [torch.from_numpy(part.copy()) for part in arrays(folder, "train")]
    order = torch.randperm(len(whole[1]), generator=torch.Generator().manual_seed(0))[:images]
    spared = len(order) // 10
    final = [torch.from_numpy(part.copy())[: max(1, images // 6)] for part in arrays(folder, "t10k")]
    for name, (pixels, labels) in {
        "train": [part[order[spared:]] for part in whole],
        "validation": [part[order[:spared]] for part in whole],
        "test": final,
    }.items():
        train = name == "train"
        splits[name] = DataLoader(
            Images(pixels[:, None], labels.long()),
            batch_size=batch if train else 500,
            shuffle=train,
            drop_last=train,
            collate_fn=partial(collate, size=size, train=train),
        )
    return splits


def trained(name: str, net: Net, splits: dict[str, DataLoader], settings: FinetuneSettings, out: Path) -> nn.Module:
    """The dense net, trained once; its weights are kept."""
    build, _, rate = net
    torch.manual_seed(0)
    model, path = build(), out / f"{name}-{settings.epochs}.safetensors"
    with FileLock(out / f".{path.name}.lock"):
        if path.is_file():
            model.load_state_dict(load_file(path))
            return model.eval()
        settings = settings.model_copy(update={"learning_rate": rate, "schedule": "onecycle"})
        finetune(model, load_data(splits, None), settings, output_dir=out / f".{name}-training")
        save_file(model.state_dict(), out / f".{path.name}")
        (out / f".{path.name}").rename(path)
    return model


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="benchmarks/accuracy.py", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one net, 400 images, one epoch, one target, one seed")
    parser.add_argument("--json", type=Path, help="where to write everything that was found")
    parser.add_argument("--out", type=Path, help="where nets and finished cells are kept; out/accuracy")
    parser.add_argument("--data", type=Path, default=FOLDER, help="folder of the idx files")
    parser.add_argument("--nets", default="vgg16,resnet56,mobilenetv2,resnet18")
    parser.add_argument("--targets", default="macs=0.5,macs=0.3,macs=0.1")
    parser.add_argument("--criteria", default="all", help="names, or all; Torch-Pruning is torch-pruning and its kin")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--images",
        type=int,
        default=60_000,
        help="training images, validation included, and as large a share of the test images",
    )
    parser.add_argument("--calibration", type=int, default=512)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--dense-epochs", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=10, help="of fine-tuning after pruning")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of fine-tuning")
    parser.add_argument("--round-to", type=int, default=1)
    parser.add_argument("--precision", default="bf16", choices=("bf16", "no"))
    parser.add_argument("--mobilenet-weights", type=Path, help="torchvision's mobilenet_v2-b0353104.pth")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--minutes", type=float, help="after which jobs are stopped")
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--test", action="store_true", help="print the test split's tables, not the validation split's")
    options = parser.parse_args(arguments)
    if options.quick:
        small = {"nets": "resnet56", "targets": "macs=0.5", "criteria": "scap,l1", "seeds": 1, "images": 400}
        small |= {"calibration": 32, "batch": 64, "dense_epochs": 1, "epochs": 1, "precision": "no"}
        vars(options).update(small | given(parser, options))
    out = options.out or Path("out/accuracy-quick" if options.quick else "out/accuracy")
    out.mkdir(parents=True, exist_ok=True)

    found: dict[str, Any] = {}
    if options.json and options.json.is_file():
        found = json.loads(options.json.read_text())
    if options.jobs > 1:
        compared = spread(options, arguments, out)
    else:
        compared = ((name, variant, cells(name, variant, options, out)) for name, variant in pairs(options))
    for name, variant, comparison in compared:
        own = argparse.Namespace(**vars(options) | {"nets": name, "variants": variant, "jobs": 1, "minutes": None})
        found.setdefault(name, {})[variant] = {"command": repeated(parser, own), **comparison.to_dict()}
        for row in comparison.rows("test" if options.test else "validation"):
            print("  ".join(f"{cell:>20}" for cell in row), flush=True)
        if options.json and options.seed is None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            unfinished = options.json.with_name(f".{options.json.name}.unfinished")
            unfinished.write_text(json.dumps(found, indent=1) + "\n")
            unfinished.replace(options.json)
    return found


def pairs(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Every net with every variant, variant by variant."""
    return [(name, variant) for variant in options.variants.split(",") for name in options.nets.split(",")]


def place(out: Path, name: str, variant: str, seed: int | None) -> Path:
    """Where the cells of a net are kept: of one seed, or of all."""
    return out / f"{name}-{variant.replace(' ', '-')}{'' if seed is None else f'-{seed}'}.json"


def cells(name: str, variant: str, options: argparse.Namespace, out: Path) -> Comparison:
    """The cells of a net in one variant, kept under `out` as they are finished."""
    print(f"\n{name}, {variant}", flush=True)
    net = nets(options.mobilenet_weights)[name]
    precision = layout(name, options.precision)
    splits = loaders(options.data, net[1], options.images, options.batch)
    settings = FinetuneSettings(epochs=options.dense_epochs, weight_decay=0.05, **precision)
    recipe = {
        "data": {"calibration_images": options.calibration, "batch_size": options.batch},
        "finetune": {"epochs": options.epochs, "learning_rate": options.learning_rate, **precision},
    }
    criteria = options.criteria.split(",")
    if VARIANTS[variant].get("finetune_epochs") == 0:
        criteria = [own for own in criteria if not own.startswith("scratch")]  # nothing is trained there
    asked: dict[str, Any] = {
        "targets": options.targets.split(","),
        "criteria": "all" if options.criteria == "all" else criteria,
        "round_to": options.round_to,
        **VARIANTS[variant],
    }
    return scap_hub.compare(
        trained(name, net, splits, settings, out), splits, recipe,
        seeds=options.seeds if options.seed is None else [options.seed], model_input_size=net[1],
        output=place(out, name, variant, options.seed), **asked,
    )  # fmt: skip


def spread(
    options: argparse.Namespace, arguments: Sequence[str] | None, out: Path
) -> Iterator[tuple[str, str, Comparison]]:
    """The cells of all nets and variants, each seed in a process of its own; what is finished when time is over."""
    began = time.time()
    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // options.jobs))}

    def run(name: str, variant: str, seed: int) -> Path | None:
        """Where the cells of a seed are; None if what is there was measured in another way, which a process refuses."""
        left = None if deadline is None else deadline - time.monotonic()
        path, done = place(out, name, variant, seed), False
        if left is None or left > 0:
            own = ["--nets", name, "--variants", variant, "--seed", str(seed), "--jobs", "1"]
            command = [sys.executable, __file__, *(sys.argv[1:] if arguments is None else arguments), *own]
            with contextlib.suppress(subprocess.TimeoutExpired):
                done = not subprocess.run(command, timeout=left, check=False, env=os.environ | threads).returncode
        return path if path.is_file() and (done or path.stat().st_mtime >= began) else None

    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = [(pair, pool.submit(run, *pair, seed)) for seed in range(options.seeds) for pair in pairs(options)]
    for name, variant in pairs(options):
        kept = [path for pair, job in jobs if pair == (name, variant) and (path := job.result())]
        if kept:
            yield name, variant, merged([json.loads(path.read_text()) for path in kept])


def merged(documents: Sequence[dict[str, Any]]) -> Comparison:
    """One comparison of what was found seed by seed."""
    about = {key: documents[0][key] for key in ("model", "data", "recipe", "metric")}
    return Comparison(about, documents[0]["dense"], [cell for document in documents for cell in document["cells"]])


def given(parser: argparse.ArgumentParser, options: argparse.Namespace) -> dict[str, Any]:
    """The options that differ from their defaults."""
    return {key: value for key, value in vars(options).items() if value != parser.get_default(key)}


def repeated(parser: argparse.ArgumentParser, options: argparse.Namespace) -> str:
    """The command that measures the same, without this machine's files."""
    settings = {key: value for key, value in given(parser, options).items() if not isinstance(value, Path | bool)}
    words = [word for key, value in settings.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    return shlex.join(["python", parser.prog, *words])


if __name__ == "__main__":
    main()
