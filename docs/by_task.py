"""What pruning costs a segmenter and a detector, from benchmarks/results/by_task.json."""

import json
from pathlib import Path

HEAD = """
## Segmentation and detection

UperNet on a small ResNet, and RT-DETR on one, were trained from scratch on 1,024 collages of Fashion-MNIST's items for
20 epochs, which is little for a detector. They were pruned by `scap-set`, and each size was measured on the test
images three times: repaired, then tuned on calibration images without labels, and, from the repaired one, fine-tuned
for 5 epochs with labels and the dense model as teacher. Latency is that of one image on a CPU that had other work too;
dense and pruned took turns.

```bash
python benchmarks/by_task.py --json benchmarks/results/by_task.json
```

| task | target | metric | dense | repaired | tuned | fine-tuned | latency |
|---|---|---|---|---|---|---|---|
"""
TAIL = """
The same 5 epochs would also have moved the dense model, which is measured as it was pruned. Tuning is kept only where
it brings the outputs nearer to the dense model's on the calibration images. For the detector, whose queries are matched
first, it did not, so nothing changed. Compared place by place it seemed to, and the mAP fell by two points: that is why
detectors are tuned by their task's own distance.
"""


def by_task(results: Path) -> str:
    """The section."""
    rows = json.loads((results / "by_task.json").read_text(encoding="utf-8"))
    dense = {row["task"]: row for row in rows if row["target"] == "dense"}
    lines = []
    for row in rows:
        if row["target"] != "dense":
            whole = dense[row["task"]]
            figures = (whole["dense"], row["repaired"], row["tuned"], row["fine-tuned"])
            shown = " | ".join(f"{100 * figure:.1f} %" for figure in figures)
            before, after = row["latency_ms"]
            lines.append(
                f"| {row['task']} | {row['target']} | {whole['metric']} | {shown} | {before:.0f} to {after:.0f} ms |\n"
            )
    return HEAD + "".join(lines) + TAIL
