"""The page of measured speed: of the CPU, and of a GPU where `make bench-gpu` has run on one."""

import json
from pathlib import Path
from typing import Any

SPEED = """\
<!-- Written by docs/generate.py from benchmarks/results/latency.json; do not edit. -->
# Speed

This page shows how much faster pruned models are. The dense model and its pruned ones take turns in one process, and
each figure is a ratio of times from the same turns. Measured on {device}, torch {torch}. {note}

- **half**: half of the MACs, channel counts in multiples of 8 (`target: macs=0.5`, the default `round_to`).
  **any counts** is the same with `round_to: 1`.
- **latency**: pruned to half of the dense time at batch 1, eager, in fp32 (`target: latency=0.5`), planned from a table
  of layer times measured there. The other rows show how fast this model is in other settings.

Weights are random and every group keeps the same share, because speed depends on shapes only.

On Linux the C library may give memory back to the system after each forward pass. For a small network on a CPU that can
take a third of the time. It is switched off while times are measured. To have the same speed where you serve the model,
use jemalloc, or set `MALLOC_TRIM_THRESHOLD_=1073741824 MALLOC_MMAP_THRESHOLD_=33554432` in the environment.

```bash
{command}
```

"""
TABLE = """\
| network | batch | dtype | mode | dense, images/s | half | any counts | latency |
|---|---|---|---|---|---|---|---|
"""
GPU = """
## On a GPU

Measured on one {device}, torch {torch}; without options, as by `make bench-gpu`, the command measures all there is.
`latency` is pruned to half of the dense time at 256 images, in bf16, eager. While one process measured, others compiled
on the same card, so compare models of one row only, and take a few percent for noise.{left_out}

```bash
{command}
```

At one image a GPU waits for Python and for the launch of each operator, however few channels there are: pruning gains
nothing there. At 256 images and half of the MACs it gains a sixth to a third, eager; half of the time takes a fifth to
a quarter of the MACs. Compiled, ConvNeXt gains 41 %, MobileNetV2 20 %, ResNet-50 3 to 17 %, and VGG16 gets slower by 5
to 14 %, perhaps because the compiler has faster kernels for the counts of the dense network than for other multiples of
8. Counts that are no multiples of 8 make all of them slower than the dense network.

"""
SCORING = """
What scoring by the default criterion, repair and an epoch of training cost there, on {images} images of {size} pixels.
The first run of scoring, which tunes kernels, does not count.

| network | forward pass, s | scoring, s | repair, s | epoch, s |
|---|---|---|---|---|
"""
PARITY = """
Scores and plans of the GPU beside those of the CPU, in float32 without TF32: the lowest rank correlation of a group,
and the share of channels kept by both among those kept by either.{ranks}

| network | criterion | rank correlation | kept by both |
|---|---|---|---|
"""


def speed(results: Path) -> str:
    """The page."""
    document = json.loads((results / "latency.json").read_text(encoding="utf-8"))
    text = SPEED.format(**{key: document[key] for key in ("device", "torch", "command", "note")})
    text += _latencies(document["rows"])
    path = results / "gpu.json"
    return text + (_gpu(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else "")


def _latencies(rows: list[dict[str, Any]]) -> str:
    """The table of what pruned models are faster by."""
    settings: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("network", "batch", "dtype", "mode"))
        settings.setdefault(key, {})[row["model"]] = row
    text = TABLE
    for key, models in settings.items():
        faster = [
            f"{models[name]['speedup']:.2f}x ({models[name]['macs']:.2f} of the MACs)" if name in models else ""
            for name in ("half", "half, any counts", "latency")
        ]
        cells = [*map(str, key), f"{models['dense']['images_per_second']:,.1f}", *faster]
        text += f"| {' | '.join(cells)} |\n"
    return text


def _gpu(found: dict[str, Any]) -> str:
    """The part about a GPU."""
    left_out = f" Not measured: {'; '.join(found['left_out'])}." if found["left_out"] else ""
    text = GPU.format(device=found["device"], torch=found["torch"], command=found["command"], left_out=left_out)
    text += _latencies(sorted(found["latency"], key=lambda row: (row["network"], row["dtype"], row["batch"])))

    scoring = {(row["model"], row["what"]): row for row in found["scoring"]}
    repairs = {row["model"]: row for row in found["repair"]}
    if repairs and scoring:
        text += SCORING.format(images=found["repair"][0]["images"], size="224 x 224 (VGG16: 32 x 32)")
        for name, row in repairs.items():
            parts = [scoring.get((name, what), {}).get("seconds") for what in ("forward", "scap-set")]
            times = [*parts, row["repair_s"], row["epoch_s"]]
            text += f"| {name} | {' | '.join('' if time is None else f'{time:.2f}' for time in times)} |\n"

    if found["parity"]:
        shares = ", ".join(f"{row['kept_by_both']:.1%} for {row['network']}" for row in found["ranks"])
        ranks = f" The same share for two processes on one card beside one: {shares}." if shares else ""
        text += PARITY.format(ranks=ranks)
    for row in found["parity"]:
        text += (
            f"| {row['network']} | {row['criterion']} | {row['rank_correlation']:.4f} | {row['kept_by_both']:.1%} |\n"
        )
    return text
