"""Pruning and int8 together: dense and pruned networks, in float32 and in int8, in turns in the runtimes of a CPU.

    python benchmarks/deploy.py --json out/deploy.json
    python benchmarks/deploy.py --quick
    python benchmarks/deploy.py --only segformer --size 128 --threads 1,2 --batches 1,8 --json out/deploy.json
    python benchmarks/deploy.py --widths

The pruned networks keep half of the MACs, every group the same fraction, with channel counts that are multiples of
what ONNX Runtime likes here (see `scap_hub.deploy.widths`). Weights, scores and int8 ranges are random: speed and size
depend on shapes only. What int8 does to answers is measured by `scap-hub export --int8`, on a trained model and its
images. Rows in the JSON file that were not measured again stay.

`--widths` measures what `round_to: auto` rests on instead: stacks of convolutions of a few widths, in turns, in
float32 and int8.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    ResNetConfig,
    SegformerConfig,
    SegformerForSemanticSegmentation,
)

sys.path.insert(0, str(Path(__file__).parent))
from accuracy import repeated

import scap_hub
from scap_hub.deploy.widths import liked_multiple, width_times
from scap_hub.run.bench_runtimes import runtime_speeds
from scap_hub.timing.clock import device_name, milliseconds

SEGMENTER, DETECTOR = "segformer_b0", "detr_r50"
MODELS = ("resnet50", "mobilenetv2_100", "convnext_tiny", "fastvit_t8", SEGMENTER, DETECTOR)
CPU = torch.device("cpu")


def built(name: str) -> nn.Module:
    """A network with random weights; segmenter and detector are those of transformers, with 150 and 91 classes."""
    torch.manual_seed(0)
    if name == SEGMENTER:
        return SegformerForSemanticSegmentation(SegformerConfig(num_labels=150)).eval()
    if name == DETECTOR:
        config = DetrConfig(backbone_config=ResNetConfig(out_features=["stage4"]), num_labels=91)
        return DetrForObjectDetection(config).eval()
    return timm.create_model(name).eval()


def measure(name: str, multiple: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one network."""
    dense, size = built(name), (3, options.size, options.size)
    groups = scap_hub.channel_groups(dense, torch.zeros(1, *size))
    scores = {group.name: torch.rand(group.size) for group in groups if group.prunable}
    plan = scap_hub.select(groups, scores, f"macs={options.fraction}", round_to=multiple, scope="uniform")
    models = {"dense": dense, "pruned": scap_hub.apply_plan(dense, plan)}
    numbers = [[int(text) for text in given.split(",")] for given in (options.threads, options.batches)]
    timer = partial(milliseconds, seconds=options.seconds, turns=options.turns)
    with tempfile.TemporaryDirectory() as scratch:
        rows = runtime_speeds(models, size, Path(scratch), options.runtimes.split(","), True, *numbers, timer)
    command = repeated(PARSER, argparse.Namespace(**{**vars(options), "only": name}))
    about = {"network": name, "size": options.size, "multiple": multiple, "command": command}
    return [{**about, **asdict(row)} for row in rows]


def earlier(path: Path | None, about: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows in a file of results."""
    if path is None or not path.is_file():
        return []
    found = json.loads(path.read_text())
    if different := [f"{key} {found[key]}, now {value}" for key, value in about.items() if found[key] != value]:
        raise SystemExit(f"{path} was measured with {'; '.join(different)}: give another --json")
    return found["rows"]


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row is of."""
    return tuple(row[name] for name in ("network", "size", "model", "runtime", "precision", "threads", "batch"))


def parsed() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks/deploy.py", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one network at 64 pixels")
    parser.add_argument("--widths", action="store_true", help="only times relative to 128 channels, by runtime")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--only", default="", help="only networks whose name contains this")
    parser.add_argument("--runtimes", default="onnxruntime")
    parser.add_argument("--threads", default="1")
    parser.add_argument("--batches", default="1")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--fraction", type=float, default=0.5, help="of the MACs, that stays")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each figure, at least")
    parser.add_argument("--turns", type=int, default=7, help="of each model, for each figure")
    return parser


PARSER = parsed()


def measure_widths(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Times of stacks of convolutions, relative to the widest."""
    timer, rows = partial(milliseconds, seconds=options.seconds, turns=options.turns), []
    for runtime in options.runtimes.split(","):
        for int8 in (False, True) if runtime != "torch" else (False,):
            times = width_times(runtime, int8, timer)
            rows.append({"runtime": runtime, "precision": "int8" if int8 else "fp32", "relative": times})
            cells = "".join(f"{width:>6}: {time:.2f}" for width, time in times.items())
            print(f"{runtime:13}{rows[-1]['precision']:6}{cells}", flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    options = PARSER.parse_args(arguments)
    if options.quick:
        vars(options).update(size=64, seconds=0.05)
    if options.widths:
        return measure_widths(options)
    names = [name for name in MODELS if options.only in name]
    if options.quick and not options.only:
        names = ["mobilenetv2_100"]
    about = {"device": device_name(CPU), "torch": torch.__version__}
    before = earlier(options.json, about)
    multiple = liked_multiple("onnxruntime", False, CPU)
    print(f"on {about['device']}; channel counts are multiples of {multiple}")
    head = ("threads", "batch", "ms", "faster", "file MB", "peak MB")
    print(f"{'network':18}{'':8}{'runtime':13}{'':6}" + "".join(f"{text:>9}" for text in head))
    rows: list[dict[str, Any]] = []
    for name in names:
        for row in measure(name, multiple, options):
            rows.append(row)
            peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"
            cells = (
                row["threads"], row["batch"], f"{row['ms']:.2f}", f"{row['speedup']:.2f}x",
                f"{row['file_bytes'] / 1e6:.1f}", peak,
            )  # fmt: skip
            what = f"{name:18}{row['model']:8}{row['runtime']:13}{row['precision']:6}"
            print(what + "".join(f"{cell:>9}" for cell in cells), flush=True)
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            found = {key(row): row for row in (*before, *rows)}
            options.json.write_text(json.dumps({**about, "rows": list(found.values())}, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
