"""What the spectra give: top-1 after repair alone, by criteria and their controls, on four small networks.

    python benchmarks/spectra.py --out out/spectra --json out/spectra.json
    python benchmarks/spectra.py --nets mobile --seeds 1 --rows "scap-set;random" --out out/spectra
    python benchmarks/spectra.py --images 16 --out out/spectra --json out/spectra.json

Data: Fashion-MNIST, shifted, with a faint piece of another image on each and noise, at 16 x 16 pixels; 16,000 images to
train on, 256 or fewer to calibrate, 3,000 others to measure. Networks are trained for three epochs, once for each seed,
and kept in --out. Targets in MACs let each criterion choose its widths; "ratio" gives all of them the same ones. Every
row is pruned once and repaired by least squares; nothing is tuned.

Rows in quotes are controls that only this file knows: "scap inverted" has the fidelity's ranks the other way round,
"scap random" has random ranks in their place.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from scap_hub import Scores, apply_plan, channel_groups, repair, score, select
from scap_hub.progress import set_quiet

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from accuracy import cifar_resnet
from fashion_mnist import FOLDER, arrays

CLASSES = 10
TARGETS = ("macs=0.3", "macs=0.15", "ratio=0.5", "ratio=0.3")
Split = tuple[Tensor, Tensor]


# Networks


def vgg() -> nn.Module:
    """Six convolutions and two linear layers."""
    layers: list[nn.Module] = []
    channels = 1
    for width in (32, 32, 0, 64, 64, 0, 128, 128, 0):
        if width:
            conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        else:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, CLASSES))


def resnet() -> nn.Module:
    """Nine residual blocks of two convolutions."""
    return cifar_resnet(3)


class InvertedResidual(nn.Module):
    """MobileNetV2's block, four times as wide inside."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        inner = 4 * channels
        self.shortcut = stride == 1 and channels == width
        self.path = nn.Sequential(
            nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU6(),
            nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False), nn.BatchNorm2d(inner), nn.ReLU6(),
            nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.path(x) if self.shortcut else self.path(x)


def mobile() -> nn.Module:
    """Eight inverted residuals."""
    layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6()]
    channels = 16
    for width, stride in ((16, 1), (24, 2), (24, 1), (40, 2), (40, 1), (40, 1), (64, 2), (64, 1)):
        layers.append(InvertedResidual(channels, width, stride))
        channels = width
    layers += [nn.Conv2d(channels, 160, 1, bias=False), nn.BatchNorm2d(160), nn.ReLU6()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(160, CLASSES))


def convnext() -> nn.Module:
    """timm's, narrow, for small images."""
    return ConvNeXt(
        in_chans=1, num_classes=CLASSES, depths=(2, 2, 2, 1), dims=(24, 48, 96, 128), patch_size=1, kernel_sizes=5
    )


NETS: dict[str, Callable[[], nn.Module]] = {"mobile": mobile, "resnet": resnet, "vgg": vgg, "convnext": convnext}


# Data


def cluttered(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (N, 1, 32, 32), shifted by up to 4 pixels, a piece of another one over each, and noise."""
    images = F.pad(images, (2, 2, 2, 2))
    shifts = torch.randint(-4, 5, (len(images), 2), generator=generator).tolist()
    images = torch.stack([torch.roll(image, tuple(by), (1, 2)) for image, by in zip(images, shifts, strict=True)])
    others = images[torch.randperm(len(images), generator=generator)]
    places = torch.randint(0, 20, (len(images), 2), generator=generator).tolist()
    for image, other, (top, left) in zip(images, others, places, strict=True):
        window = image[:, top : top + 12, left : left + 12]
        window.copy_(0.4 * window + 0.6 * other[:, 10:22, 10:22])
    return images + 0.1 * torch.randn(images.shape, generator=generator)


def splits() -> tuple[Split, Split, Tensor]:
    """Training and validation images with their labels, and calibration images."""
    generator = torch.Generator().manual_seed(0)
    pixels, classes = arrays(FOLDER, "train")
    images, labels = torch.tensor(pixels)[:, None].float() / 255, torch.tensor(classes).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    parts = order[:16000], order[40000:43000], order[50000:50256]
    train, validation, calibration = (
        (F.avg_pool2d(cluttered(images[part], generator), 2), labels[part]) for part in parts
    )
    return train, validation, calibration[0]


def accuracy(model: nn.Module, split: Split) -> float:
    """Top-1."""
    images, labels = split
    with torch.no_grad():
        answers = torch.cat([model.eval()(batch).argmax(1) for batch in images.split(250)])
    return float((answers == labels).float().mean())


def trained(name: str, seed: int, train: Split, folder: Path, epochs: int = 3) -> nn.Module:
    """A network, trained once and kept in a folder."""
    torch.manual_seed(seed)
    model, path = NETS[name](), folder / f"{name}-{seed}.safetensors"
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    (images, labels), batch = train, 128
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    steps = len(images) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, epochs * steps)
    for _ in range(epochs):
        model.train()
        for index in torch.randperm(len(images)).split(batch)[:steps]:
            shifted = torch.roll(images[index], tuple(torch.randint(-1, 2, (2,)).tolist()), (2, 3))
            loss = F.cross_entropy(model(shifted), labels[index], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    return model.eval()


# Rows


def _scap(model: nn.Module, groups: Any, batches: Any, change: Callable[[Tensor], Tensor]) -> Scores:
    """`scap` without its norm, its ranks changed."""
    found = score(model, batches, "scap", groups=groups, weight=1.0)
    return Scores({name: change(found[name]) for name in found}, found.scope)


def _shuffled(ranks: Tensor) -> Tensor:
    return ranks[torch.randperm(len(ranks), generator=torch.Generator().manual_seed(len(ranks)))]


Row = Callable[[nn.Module, Any, Any], Scores]
ROWS: dict[str, Row] = {
    "scap-set": lambda model, groups, batches: score(model, batches, "scap-set", groups=groups),
    "scap-set, frequencies alike": lambda model, groups, batches: score(
        model, batches, "scap-set", groups=groups, frequency_weights=False
    ),
    "scap-set, blend 0.5": lambda model, groups, batches: score(
        model, batches, "scap-set", groups=groups, blend=0.5
    ),
    "scap-set, frequencies alike, blend 0.5": lambda model, groups, batches: score(
        model, batches, "scap-set", groups=groups, frequency_weights=False, blend=0.5
    ),
    "scap-set, frequencies alike, ridge 0.1": lambda model, groups, batches: score(
        model, batches, "scap-set", groups=groups, frequency_weights=False, ridge=0.1
    ),
    "obs": lambda model, groups, batches: score(model, batches, "obs", groups=groups),
    "l1": lambda model, groups, batches: score(model, batches, "l1", groups=groups),
    "random": lambda model, groups, batches: score(model, batches, "random", groups=groups),
    "scap": lambda model, groups, batches: score(model, batches, "scap", groups=groups),
    "scap, fidelity alone": lambda model, groups, batches: _scap(model, groups, batches, lambda ranks: ranks),
    '"scap inverted"': lambda model, groups, batches: _scap(model, groups, batches, lambda ranks: 1 - ranks),
    '"scap random"': lambda model, groups, batches: _scap(model, groups, batches, _shuffled),
}  # fmt: skip


def cells(model: nn.Module, row: str, calibration: Tensor, validation: Split) -> dict[str, Any]:
    """Top-1 at every target, and the CPU seconds of scoring."""
    batches = list(calibration.split(64))
    groups = channel_groups(model, calibration[:1]).prunable
    start = time.process_time()
    scores = ROWS[row](model, groups, batches)
    found: dict[str, Any] = {"seconds": time.process_time() - start}
    for target in TARGETS:
        scope = "uniform" if target.startswith("ratio") else None
        plan = select(groups, scores, target, scope=scope, round_to=1)
        small = apply_plan(model, plan)
        repair(model, small, plan, batches)
        found[target] = accuracy(small, validation)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", default=",".join(NETS))
    parser.add_argument("--rows", default="", help="which rows, with semicolons between; all if left out")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--images", type=int, default=256, help="to calibrate with, at most 256")
    parser.add_argument("--out", type=Path, required=True, help="folder of the trained networks")
    parser.add_argument("--json", type=Path, help="where to write the results; what it holds is not measured again")
    options = parser.parse_args()
    set_quiet(True)
    rows = options.rows.split(";") if options.rows else list(ROWS)
    done = json.loads(options.json.read_text()) if options.json and options.json.exists() else []
    train, validation, calibration = splits()
    calibration = calibration[: options.images]
    for name in options.nets.split(","):
        for seed in range(options.seeds):
            model = trained(name, seed, train, options.out)
            print(f"{name}, seed {seed}: dense {accuracy(model, validation):.2%}", flush=True)
            for row in rows:
                cell = {"net": name, "seed": seed, "row": row, "images": len(calibration)}
                if any(cell.items() <= kept.items() for kept in done):
                    continue
                done.append(cell | cells(model, row, calibration, validation))
                print(
                    f"  {row:40}", *(f"{done[-1][t]:.2%}" for t in TARGETS), f"{done[-1]['seconds']:.1f} s", flush=True
                )
                if options.json:
                    options.json.write_text(json.dumps(done, indent=1) + "\n")
    print(f"\n{'mean over networks':42}", *(f"{target:>9}" for target in TARGETS))
    for row in rows:
        mine = [cell for cell in done if (cell["row"], cell["images"]) == (row, len(calibration))]
        print(f"{row:42}", *(f"{statistics.mean(cell[t] for cell in mine):9.2%}" for t in TARGETS))


if __name__ == "__main__":
    main()
