"""Real speed: dense networks beside pruned ones at half their MACs, measured in turns in one process.

    python benchmarks/latency.py --json out/latency.json
    python benchmarks/latency.py --quick
    python benchmarks/latency.py --only resnet50 --batches 64 --dtypes bf16 --modes compile

"half" keeps half the MACs with channel counts that are multiples of 8, "half, any counts" with any counts; "latency" is
pruned to half the dense time, eager, in the first dtype, at `--latency-batch`. Weights and scores are random, and every
group keeps the same fraction: speed depends on shapes only. Runs on the GPU where there is one; `OMP_NUM_THREADS` is
yours. Several of these processes can share a GPU: with `--lock` they compile at once and measure one after the other.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import timm
import torch
from filelock import FileLock
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from accuracy import repeated

import scap_hub
from scap_hub.run.bench import DTYPES, speeds
from scap_hub.selection.latency import select_latency
from scap_hub.timing.clock import Call, Timer, device_name, milliseconds
from scap_hub.training.distributed import accelerator
from scap_hub.training.evaluate import count

MODELS = ("resnet50", "vgg16", "mobilenetv2_100", "convnext_tiny")


def measure(name: str, size: int, options: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """The rows of one network, setting by setting."""
    device = accelerator().device
    torch.manual_seed(0)
    dense = timm.create_model(name).to(device).eval()
    groups = scap_hub.channel_groups(dense, torch.zeros(1, 3, size, size, device=device))
    scores = {group.name: torch.rand(group.size) for group in groups if group.prunable}
    lock = FileLock(options.lock) if options.lock else contextlib.nullcontext()
    timer = alone(partial(milliseconds, seconds=options.seconds, turns=options.turns), lock)
    plans = {}
    budget, asked = f"macs={options.fraction}", options.plans.split(",")
    if "half" in asked:
        plans["half"] = scap_hub.select(groups, scores, budget, round_to=8, scope="uniform")
    if "any" in asked:
        plans["half, any counts"] = scap_hub.select(groups, scores, budget, round_to=1, scope="uniform")
    if "latency" in asked:
        with lock:
            plans |= half_the_time(name, dense, groups, scores, options, (options.latency_batch, 3, size, size))
    models = {"dense": dense, **{kind: scap_hub.apply_plan(dense, plan) for kind, plan in plans.items()}}
    macs = {kind: count(model, (3, size, size))["macs"] for kind, model in models.items()}
    settings = product(options.modes.split(","), options.dtypes.split(","), map(int, options.batches.split(",")))
    for mode, dtype, batch in settings:
        rows = speeds(models, (3, size, size), [batch], [dtype], [mode], timer)
        yield [{"network": name, "macs": macs[row.model] / macs["dense"], **asdict(row)} for row in rows]


def half_the_time(
    name: str,
    dense: nn.Module,
    groups: scap_hub.ChannelGroups,
    scores: dict[str, Tensor],
    options: argparse.Namespace,
    shape: tuple[int, int, int, int],
) -> dict[str, scap_hub.PruningPlan]:
    """The plan for so much of the time, if there is one."""
    dtype = DTYPES[options.dtypes.split(",")[0]]
    images = torch.randn(shape, device=accelerator().device, dtype=dtype)
    quick = None if options.plan_seconds is None else partial(milliseconds, seconds=options.plan_seconds)
    model = copy.deepcopy(dense).to(dtype)
    try:
        choice = select_latency(model, groups, scores, options.fraction, images, scope="uniform", timer=quick)
    except scap_hub.ScapHubError as error:
        print(f"{name}: {error}")
        return {}
    print(f"{name}: asked for {options.fraction:.3f} of the time, found a plan that takes {choice.share:.3f}")
    return {"latency": choice.plan}


def alone(timer: Timer, lock: contextlib.AbstractContextManager) -> Timer:
    """A timer that measures under a lock what has run before, so what is compiled is compiled outside of it."""

    def measure(calls: Sequence[Call]) -> list[float]:
        with torch.no_grad():
            for module, images in calls:
                module.eval()(images)
        with lock:
            return timer(calls)

    return measure


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(prog="benchmarks/latency.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="two networks at 64 pixels, batches of 1 and 4, eager, fp32"
    )
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--only", default="", help="only networks whose name contains this")
    parser.add_argument("--batches", default="1,64")
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--modes", default="eager,compile")
    parser.add_argument("--plans", default="half,any,latency", help="what is measured beside dense")
    parser.add_argument("--latency-batch", type=int, default=1, help="images at once, where half the time is sought")
    parser.add_argument(
        "--plan-seconds", type=float, help="for each figure that this plan is chosen by; 0.5 for a model"
    )
    parser.add_argument("--lock", help="file that processes hold while they measure")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--fraction", type=float, default=0.5, help="of the MACs, and of the time, that stays")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each figure and model, at least")
    parser.add_argument("--turns", type=int, default=10, help="of each model, for each figure")
    options = parser.parse_args(arguments)
    if options.quick:
        vars(options).update(batches="1,4", dtypes="fp32", modes="eager", size=64, seconds=0.05)
    names = [name for name in MODELS if options.only in name]
    if options.quick and not options.only:
        names = ["resnet50", "mobilenetv2_100"]
    rows: list[dict[str, Any]] = []
    print(f"on {device_name(accelerator().device)}")
    head = ("MACs", "batch", "dtype", "mode", "ms", "images/s", "faster")
    print(f"{'network':34}" + "".join(f"{text:>10}" for text in head))
    for name in names:
        for setting in measure(name, options.size, options):
            rows += setting
            for row in setting:
                cells = (
                    f"{row['macs']:.3f}", row["batch"], row["dtype"], row["mode"], f"{row['ms']:.3f}",
                    f"{row['images_per_second']:.1f}", f"{row['speedup']:.2f}x",
                )  # fmt: skip
                print(f"{name:17}{row['model']:17}" + "".join(f"{cell:>10}" for cell in cells), flush=True)
            if options.json:
                options.json.parent.mkdir(parents=True, exist_ok=True)
                about = {"device": device_name(accelerator().device), "torch": torch.__version__}
                own = argparse.Namespace(**vars(options) | {"lock": None})
                document = {"command": repeated(parser, own), **about, "rows": rows}
                options.json.write_text(json.dumps(document, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
