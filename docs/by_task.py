"""What pruning costs a segmenter, a detector and a feature extractor, from benchmarks/results/by_task.json."""

import json
from pathlib import Path
from typing import Any

HEAD = """
## Segmentation, detection and features

UperNet on a small ResNet, and RT-DETR on one, were trained from scratch on 1,024 collages of Fashion-MNIST's items for
20 epochs, which is little for a detector. They were pruned by `scap-set`, and each size was measured on the test
images three times: repaired, then tuned on calibration images without labels, and, from the repaired one, fine-tuned
for 5 epochs with labels and the dense model as teacher. Latency is that of one image on a CPU that had other work too;
dense and pruned took turns.

The feature extractor is MobileNetV2 without its head, with torchvision's ImageNet weights. It was never trained on
these images (single items, at 64 x 64 pixels). It was scored, repaired and tuned on 256 of them without labels. Its
metrics are the cosine to the dense model's features, and the top-1 accuracy of the 10 nearest neighbours among 2,048
test images.

```bash
{command}
```

| task | target | metric | dense | repaired | tuned | fine-tuned | latency |
|---|---|---|---|---|---|---|---|
"""
TAIL = """
The same 5 epochs would also have moved the dense model, which is measured as it was pruned. Tuning is kept only where
it brings the outputs nearer to the dense model's on the calibration images. For the detector, whose queries are matched
first, it did so at macs=0.5 and not at macs=0.3, where nothing changed. Compared place by place it seemed to, and the
mAP fell by two points: that is why detectors are tuned by their task's own distance.

The extractor's features point elsewhere than the dense ones until they are tuned, but even so most images keep
neighbours of their own class. One draw of calibration images was measured: half a point of kNN says nothing.
"""
INT8 = """
The fine-tuned models, exported to ONNX in float32 and in int8 by `scap_hub.export(..., int8=True)` with its defaults;
metric on the same test images, size and latency of the file in ONNX Runtime, one image, one thread, beside other
work. Layers that hurt are kept in float32 where more than a point is lost on the validation images; on
the test images the detector, which finds little, loses a little more:

| task | target | metric | float32 | int8 | layers kept in float32 | latency | size |
|---|---|---|---|---|---|---|---|
"""
COMMAND = (
    "python benchmarks/by_task.py --mobilenet-weights mobilenet_v2-b0353104.pth --json benchmarks/results/by_task.json"
)


def by_task(results: Path) -> str:
    """The section."""
    rows = json.loads((results / "by_task.json").read_text(encoding="utf-8"))
    lines = [_line(row, _dense(row, rows)) for row in rows if row["target"] != "dense"]
    exported = [_exported(row, _dense(row, rows)) for row in rows if "exported" in row]
    return HEAD.format(command=COMMAND) + "".join(lines) + TAIL + (INT8 + "".join(exported) if exported else "")


def _dense(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of the dense model; rows of a task with one metric leave it out."""
    same = (own for own in rows if own["target"] == "dense" and own["task"] == row["task"])
    return next(own for own in same if own["metric"] == row.get("metric", own["metric"]))


def _line(row: dict[str, Any], whole: dict[str, Any]) -> str:
    figures = [whole["dense"], *(row.get(name) for name in ("repaired", "tuned", "fine-tuned"))]
    shown = " | ".join("" if figure is None else f"{100 * figure:.1f} %" for figure in figures)
    before, after = row["latency_ms"]
    return f"| {row['task']} | {row['target']} | {whole['metric']} | {shown} | {before:.0f} to {after:.0f} ms |\n"


def _exported(row: dict[str, Any], whole: dict[str, Any]) -> str:
    """The row of a model's exported files."""
    own = row["exported"]
    before, after = own["fp32"], own["int8"]
    return (
        f"| {row['task']} | {row['target']} | {whole['metric']} | {100 * before['metric']:.1f} % | "
        f"{100 * after['metric']:.1f} % | {own['layers in float32']} | {before['latency_ms']:.1f} to "
        f"{after['latency_ms']:.1f} ms | {before['mb']:.1f} to {after['mb']:.1f} MB |\n"
    )
