"""The page of supported models, from what benchmarks/coverage.py found; docs/generate.py writes it."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

COVERAGE = """\
<!-- Written by docs/generate.py from benchmarks/results/coverage.json; do not edit. -->
# Supported models

scap_hub supports any vision model of timm and transformers, and any plain module, whose forward pass can be recorded.
Channel groups are found from the operators that a model runs, not from a list of models. Below are {count} models of
{families} families, often the smallest of a family. Each was pruned twice: to half of every channel group, and to a
random fraction of each. A model counts as **proven** when both times its output, in float64, equals that of the dense
model with the same channels masked. {proven} of {count} are ({share:.1%}), and {wrong} gave a wrong result. {reloaded}
of the pruned models were rebuilt in another process from their library's own constructor, the plan and safetensors,
{exact} of them with outputs that differ by exactly 0.{trained}

- **conv, linear**: share of the output channels of convolutions and of linear layers that can be removed. In most rows
  only the classifier stays whole. `scap-hub inspect MODEL` says why anything else does.
- **MACs**: share that is left when every group is halved. **random**: the same at random fractions.
- **error**: the larger of the two differences, relative to the largest output.
- **seconds**: CPU seconds for finding the groups (recording the model included), and for the surgery with the proof
  that `apply_plan` makes of every plan.

Attention that scales by the width of its queries (`scaled_dot_product_attention` without a scale) keeps the scale of
the dense model when queries and keys shrink. A softmax over channels keeps them whole.

{peer}Repeat it: `make bench-coverage` (weights are random, nothing is downloaded).

| model | status | conv | linear | MACs | random | error | groups | seconds |
|---|---|---|---|---|---|---|---|---|
"""
FURTHER = """
## Further libraries

{count} models of torchvision, segmentation_models_pytorch and monai, and bodies of detectors from
`benchmarks/detectors.py`, are listed in `benchmarks/models-extended.txt`. {proven} are proven, and {wrong} gave a
wrong result; the others are refused, as one makes tensors of a size that follows from values, and one is random. Here
**conv** and **linear** leave out the channels that a model returns; in {wide} of {proven}, 0.95 or more of the
convolutions' channels can be removed. In the others, what stays is held for a reason: a reshape that mixes channels
with positions (MAnet), zeros that fill up channels (HighResNet), channels that stand alone in their group
(ShuffleNet), or an attention inside torch's own function, or that writes into its inputs (torchvision's ViT, Swin V2
and MViT).{trained}
Above, {main_wide} of {main} have 0.95 or more in the same sense.

| model | status | conv | linear | MACs | random | error | groups | seconds |
|---|---|---|---|---|---|---|---|---|
"""
TASKS = """
## By task

Models that are no classifiers, each as small as its library builds it: {count} of the {listed} that
`benchmarks/models-tasks.txt` lists. {proven} are proven, and {wrong} gave a wrong result. Refused are ZoeDepth with
several heads, which chooses one of them by what it sees, and OneFormer, whose decoder looks up which masks are empty:
of these a [part](tasks.md#a-part-of-a-model-whole-detectors) can be pruned, such as the backbone. **conv** and
**linear** leave out the channels that a model returns; a backbone returns its stages, a detector also what its encoder
has computed. What else stays whole is mostly the stream of a transformer to which positions are added that `forward`
computes.{trained}

| model | task | status | conv | linear | MACs | random | error | groups | seconds |
|---|---|---|---|---|---|---|---|---|---|
"""


def tasks() -> str:
    """The table of models that are no classifiers, by task."""
    listed = (ROOT / "benchmarks" / "models-tasks.txt").read_text(encoding="utf-8").splitlines()
    task_of = {name: task for _, name, _, task in (line.split("\t") for line in listed if not line.startswith("#"))}
    rows = json.loads((ROOT / "benchmarks" / "results" / "tasks.json").read_text(encoding="utf-8"))
    rows = sorted((row for row in rows if row["name"] in task_of), key=lambda row: [*task_of].index(row["name"]))
    text = TASKS.format(
        count=len(rows),
        listed=len(task_of),
        proven=sum(row["status"] == "ok" for row in rows),
        wrong=sum(row["status"] == "VerificationError" for row in rows) or "none",
        trained=_trained(rows),
    )
    for row in rows:
        name, cells = _coverage_row({**row, "name": _short(row["name"])}).split(" | ", 1)
        text += f"{name} | {task_of[row['name']]} | {cells}"
    return text


def _short(call: str) -> str:
    """A call with the names of what it builds alone: the model, and the configs inside its own."""
    model, *configs = re.findall(r"(\w+)\(", call)
    if not configs:
        return call
    inside = [config.removesuffix("Config") for config in configs[1:]]
    return model + (f" ({', '.join(inside)})" if inside else "")


def coverage() -> str:
    """The page of supported models."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "coverage.json").read_text(encoding="utf-8"))
    compared = runpy.run_path(str(ROOT / "benchmarks" / "coverage.py"))["compared"]
    proven = [row for row in rows if row["status"] == "ok"]
    text = COVERAGE.format(
        count=len(rows),
        families=len({re.match(r"[A-Za-z]+", row["name"])[0].lower() for row in rows}),  # type: ignore[index]
        proven=len(proven),
        share=len(proven) / len(rows),
        wrong=sum(row["status"] == "VerificationError" for row in rows) or "none",
        reloaded=sum("difference" in row.get("reloaded", {}) for row in rows),
        exact=sum(row.get("reloaded", {}).get("difference") == 0 for row in rows),
        trained=_trained(rows),
        peer=f"{compared(rows)}.\n\n" if any("torch_pruning" in row for row in rows) else "",
    )
    further = json.loads((ROOT / "benchmarks" / "results" / "extended.json").read_text(encoding="utf-8"))
    known = [row for row in further if row["status"] == "ok"]
    wide, main_wide = (sum(map(_wide, own)) for own in (known, proven))
    wrong = sum(row["status"] == "VerificationError" for row in further) or "none"
    more = FURTHER.format(
        count=len(further), proven=len(known), wrong=wrong, wide=wide, trained=_trained(further), main_wide=main_wide,
        main=len(proven),
    )  # fmt: skip
    return text + "".join(map(_coverage_row, rows)) + tasks() + more + "".join(map(_coverage_row, further))


def _trained(rows: list[dict[str, Any]]) -> str:
    """How many pruned models were trained for a step, in a sentence; nothing before any was."""
    tried = [row["trained"] for row in rows if "trained" in row]
    if not tried:
        return ""
    done = sum("loss" in row for row in tried)
    return f"\n{done} of the {len(tried)} that were trained for one step have a finite loss, gradients and weights."


def _shares(row: dict[str, Any]) -> list[float | None]:
    """Of convolutions and of linear layers, the share that can be removed of what the model does not return."""
    pairs = zip(row["coverage"].values(), row.get("returned", {"conv": 0, "linear": 0}).values(), strict=True)
    return [None if share is None or out == 1 else share / (1 - (out or 0)) for share, out in pairs]


def _wide(row: dict[str, Any]) -> bool:
    """Whether nearly all of the convolutions' channels can be removed that there are."""
    share = _shares(row)[0]
    return share is None or share >= 0.95


def _coverage_row(row: dict[str, Any]) -> str:
    name = f"`{row['name']}`"
    if row["status"] != "ok":
        return f"| {name} | {row['status']} | | | | | | | |\n"
    conv, linear = ("" if share is None else f"{share:.2f}" for share in _shares(row))
    return (
        f"| {name} | proven | {conv} | {linear} | {row['uniform_macs']:.2f} | {row['random_macs']:.2f} | "
        f"{max(row['uniform_error'], row['random_error']):.0e} | {row['prunable']} of {row['groups']} | "
        f"{row['analysis_s']:.1f} + {row['uniform_surgery_s']:.1f} |\n"
    )
