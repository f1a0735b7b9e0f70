"""Writes the pages of docs/ that follow from code and results, and the schema of recipes. `--check` compares."""

import json
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from by_task import by_task
from repairs import repairs
from spectra import spectra
from speed import speed
from supported import coverage

from scap_hub.recipe import recipe_schema, shipped_recipes
from scap_hub.run.comparison import Comparison

ROOT = Path(__file__).parents[1]
HEAD = """\
<!-- Written by docs/generate.py from the code; do not edit. -->
# Recipes

A recipe is one YAML document that says everything a run does. Every block and every key may be left out. It is saved
beside the weights, and running it again repeats the run: `scap_hub.prune(recipe="out/recipe.yaml")`.

```yaml
model: {name: resnet50.a1_in1k}
data: {dataset: me/flowers}
target: {macs: 0.5}
finetune:
  epochs: 10
  distillation: {weight: 0.7}
```

A value in the recipe replaces the default, and a keyword override replaces both; of several overrides the last one
wins. An override is named `<block>_<key>`, such as `finetune_epochs=3` in Python or `--set finetune_epochs=3` on the
command line. Short forms: `criterion="l1"`, `target="macs=0.5"`, `target={group name: fraction}`, `round_to=8`. A new
budget replaces the old one, and a new criterion drops the options of the old one. A wrong key or value is refused: the
error names the line, the key and the nearest valid name.

```bash
scap-hub recipe list                                # shipped recipes, and when to use each
scap-hub recipe show half-macs > mine.yaml          # every default filled in
scap-hub recipe schema > recipe.schema.json         # for editors that complete YAML
```

An editor with the YAML language server completes and checks a recipe whose first lines hold
`# yaml-language-server: $schema=recipe.schema.json`.
"""


def reference() -> str:
    """The page of all recipes and all keys."""
    schema = recipe_schema()
    lines = [HEAD, "## Shipped recipes", "", "| name | when | what it does |", "|---|---|---|"]
    for name, path in shipped_recipes().items():
        when, what = (line.removeprefix("# ") for line in path.read_text(encoding="utf-8").splitlines()[:2])
        lines.append(f"| `{name}` | {when.removeprefix('When: ')} | {what} |")
    loose = {}
    for name, key in schema["properties"].items():
        if "$ref" in key:
            lines += _block(name, _resolved(schema, key), schema)
        else:
            loose[name] = key
    lines += ["", "## protect and seed", "", *_table(loose, schema)]
    return "\n".join(lines) + "\n"


ACCURACY = """\
<!-- Written by docs/generate.py from benchmarks/results/accuracy.json; do not edit. -->
# Accuracy

The tables show top-1 accuracy on the test images of Fashion-MNIST after pruning, in percent. All criteria start from
the same dense networks and have the same budgets and the same repair, from {calibration} calibration images. Unless a
heading says otherwise, nothing is trained after pruning. Nothing was decided on the test images.

The dense networks are below what they can be: all of this was measured on two slow CPU cores, so they were trained for
a few epochs on part of the training images. A ± is the standard deviation over up to {seeds} seeds, which choose the
calibration images. Without a ±, one seed was measured, and rows that differ by a point are ties. Tables of one network
may come from trainings on different days. Each has its own dense row, and criteria are ranked within one training only.

- `torch-pruning` is Torch-Pruning's own pipeline (L2 group norm, local ratios) without our repair. `torch-pruning-bn`
  is the same with new batch-norm statistics. Training renews them anyway, so after training the two are the same.
- **mean rank** is over the budgets and seeds: 1 is best.

What the tables say:

- Repair is worth more than any criterion. Without it (`pruned`) the networks are near chance even at half the MACs.
  With it a wide network hardly needs training. Two epochs of training do not make up for it: compare `tuned`, which is
  not repaired, with `repaired and tuned`.
- `scap`, the published criterion, does not lead. It judges channels one by one, so two channels with the same
  information are kept or removed together, and all groups keep equal shares. `scap-set` improves on both points. Most
  of its lead comes from the widths of groups.
- The published setting (`paper`: threshold 0.6, no repair, no teacher) leaves VGG16 a tenth of its MACs, as it
  would with any scores, and costs about as much accuracy as published for CIFAR-10. On ResNet-56 it costs ten points.
- Some networks have far more channels than these images need: VGG16, and ResNet-18 down to three tenths of its MACs.
  There the criteria hardly differ, and L1 norms do as well.
- Without labels, at a tenth of the MACs, MobileNetV2 shows no lead of `scap-set` (one seed): `obs` is two points
  better, and random scores are level.
- 400 steps of tuning without labels beat the default's 200 in nine of nine cells of MobileNetV2: by half a point at
  half and three tenths of the MACs, by three points at a tenth. On ResNet-56 they are a tie but at a tenth of the MACs,
  where they are a point better on the test images and level on the validation images.
- 1,024 calibration images instead of 256, with the same 400 steps, make MobileNetV2 better in all six cells of two
  draws on the test images, and in five on the validation images: by 0.6, 1.2 and 2.3 points there at half, three tenths
  and a tenth of the MACs. Tuning takes no longer for it; scores and repair do. A floor of a quarter (see next) gives
  nothing beside them (one draw).
- 1,000 steps on these 1,024 images are better again in all six cells, by 0.3, 1.4 and 3.7 points on the validation
  images. So the recipe `no-training` has both. Without any label, MobileNetV2 keeps 90.25 % with half of its MACs, and
  82.8 % with a tenth, where two epochs of training with 10,800 labelled images end at 84.3 %.
- Trained for these two epochs, with three seeds, `scap-set` leads `obs` by a point on the mean at a tenth of the MACs,
  random scores by four and L1 norms by eight, but its seeds differ more: one of them is level with `obs`.
- Trained for seven epochs instead (`trained longer`, three seeds), MobileNetV2 with a tenth of its MACs comes within
  two points of the dense network, which was itself trained for five. `obs` ends 0.8 points below `scap-set`, within
  what seeds differ by, with three times its parameters. Random scores end three points below, and above L1 norms and
  Torch-Pruning (six and seven points below). The same small network trained from random weights reaches 66 %: the
  others begin with weights from ImageNet. With half and three tenths `scap-set` ends above the dense network, which
  seven more epochs would have moved too. Random scores end a point lower with three tenths.
- ResNet-56 with a tenth of its MACs, trained for three epochs (`a third training`, two seeds), ends within a point of
  the dense network by `scap-set`. `obs` and L1 norms stay a point below it, and random scores half a point below these.
- Tuning without labels before the training gives 2.4 points where two epochs follow, at a tenth of the MACs. Its 1,000
  steps take as long as five epochs, though, and in that time more training does as much: tuned and then trained for
  five epochs, or trained for seven, is a tie (one draw of 1,024 images). So nothing is tuned by default where something
  is trained.
- `the same above a quarter` keeps a quarter of every group (`target.floor: 0.25`; the default is a twentieth). After
  tuning, MobileNetV2 is better for it with a tenth of its MACs, by a point on the validation images and by 1.7 on the
  test images, and differs less from draw to draw. With three tenths it is a tie on the first, one point better on
  the second. The widths that lose least before tuning need not be those that lose least after it.
- `repaired in eights` is `repaired` with `round_to: 8`, the default, whose speed is on the page [speed](speed.md). It
  costs no more than what seeds differ by.

To repeat it, get `mobilenet_v2-b0353104.pth` from torchvision:

```bash
{commands}
```

## All cells together

A cell is one network, one budget and one seed, with or without training. These are the {cells} cells in which all of
the following criteria have a result.

| criterion | mean rank |
|---|---|
{ranks}
The next table compares `scap-set` with each of them, over the cells that both have: in how many it is better, and by
how many points on average.

| rival | not trained | | trained | |
|---|---|---|---|---|
{pairs}"""
RIVALS = ("scap-set", "obs", "scap", "l1", "taylor", "fpgm", "torch-pruning-bn")


def accuracy() -> str:
    """The page of what is left of the accuracy."""
    document = json.loads((ROOT / "benchmarks" / "results" / "accuracy.json").read_text(encoding="utf-8"))
    comparisons = [own for variants in document.values() for own in variants.values()]
    text = ACCURACY.format(
        commands="\n".join(own["command"] for own in comparisons),
        calibration=comparisons[0]["recipe"]["data"]["calibration_images"],
        seeds=max(cell["seed"] for own in comparisons for cell in own["cells"]) + 1,
        **_together(document),
    )
    for name, variants in document.items():
        for variant, found in variants.items():
            comparison = Comparison({}, found["dense"], found["cells"])
            head, *rows = comparison.rows("test")
            epochs = found["recipe"]["finetune"]["epochs"]
            text += f"\n## {name}, {variant}{f' ({epochs} epochs)' if epochs else ''}\n\n"
            text += f"| {' | '.join(head)} |\n|{'---|' * len(head)}\n"
            text += "".join(f"| {' | '.join(row)} |\n" for row in rows)
            if len({cell["target"] for cell in found["cells"]}) == 1:
                text += "\nWhat stays:\n\n" + "".join(_stays(found["cells"]))
    return text


def _stays(cells: list[dict[str, Any]]) -> Iterator[str]:
    for criterion in dict.fromkeys(cell["criterion"] for cell in cells):
        macs, params = (
            statistics.mean(cell[key] for cell in cells if cell["criterion"] == criterion) for key in ("macs", "params")
        )
        yield f"- `{criterion}`: {macs:.1%} of the MACs, {params:.1%} of the parameters\n"


def _together(nets: dict[str, Any]) -> dict[str, Any]:
    """How many cells the rivals share, their mean ranks, and each of them beside the first, as rows of tables."""
    cells = [
        {**cell, "target": f"{net} {variant} {cell['target']}", "trained": own["recipe"]["finetune"]["epochs"] > 0}
        for net, variants in nets.items()
        for variant, own in variants.items()
        for cell in own["cells"]
        if cell["criterion"] in RIVALS
    ]
    everyone = Counter((cell["target"], cell["seed"]) for cell in cells)
    rows = Comparison({}, {"test": 0.0}, cells).summary("test")
    return {
        "cells": sum(count == len(RIVALS) for count in everyone.values()),
        "ranks": "".join(f"| {row['criterion']} | {row['rank']:.2f} |\n" for row in rows),
        "pairs": "".join(_pair(cells, rival) for rival in RIVALS[1:]),
    }


def _pair(cells: list[dict[str, Any]], rival: str) -> str:
    """`scap-set` beside one rival, without and with training."""
    row = f"| {rival} |"
    for trained in (False, True):
        top1 = {
            (cell["criterion"], cell["target"], cell["seed"]): cell["test"]
            for cell in cells
            if cell["trained"] == trained
        }
        both = [key for criterion, *key in top1 if criterion == rival and ("scap-set", *key) in top1]
        leads = [100 * (top1[("scap-set", *key)] - top1[(rival, *key)]) for key in both]
        better = sum(lead > 0 for lead in leads)
        row += f" {better} of {len(leads)} | {statistics.mean(leads):+.1f} |" if leads else " | |"
    return row + "\n"


TRAINING = """\

## Settings of fine-tuning

The table shows the best validation top-1 after {epochs} epochs, in percent, of networks pruned by `scap-set` and
repaired. One setting is changed at a time; seeds: {seeds}. Learning rates are multiples of {rate:g}, the default, here
with batches of 128. There are 1,200 images, so with one seed a difference below a point says nothing. Rates within a
factor of four, smoothing, weight decay and the schedule make no visible difference. Without the teacher the result is a
point worse, so distillation is on by default. Mixup and averaging gain nothing in so short a training, and SGD (at
0.04, with momentum 0.9) loses three points, so they are off by default.

```bash
{command}
```

| setting | {nets} |
|---|{rule}
"""


def training() -> str:
    """The part about what fine-tuning should do by default."""
    document = json.loads((ROOT / "benchmarks" / "results" / "finetune.json").read_text(encoding="utf-8"))
    nets = document["nets"]
    text = TRAINING.format(
        **{key: document[key] for key in ("epochs", "rate", "command")},
        seeds=max(len(found["top1"]) for net in nets.values() for found in net["settings"].values()),
        nets=" | ".join(nets),
        rule="---|" * len(nets),
    )
    rows = {"repaired, not trained": {name: net["repaired"] for name, net in nets.items()}}
    for name, net in nets.items():
        for setting, found in net["settings"].items():
            rows.setdefault(setting, {})[name] = found["mean"]
    for setting, row in rows.items():
        text += f"| {setting} | {' | '.join(f'{100 * row[name]:.2f}' if name in row else '' for name in nets)} |\n"
    return text


def _block(name: str, block: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    about = [block["description"], ""] if "description" in block else []
    return ["", f"## {name}", "", *about, *_table(block["properties"], schema)]


def _table(keys: dict[str, Any], schema: dict[str, Any], above: str = "") -> list[str]:
    rows = [] if above else ["| key | values | default | |", "|---|---|---|---|"]
    for name, key in keys.items():
        if "$ref" in key:
            rows += _table(_resolved(schema, key)["properties"], schema, f"{above}{name}.")
            continue
        default = json.dumps(key["default"]) if key.get("default") is not None else ""
        description = " ".join(key["description"].split())
        rows.append(f"| `{above}{name}` | {_values(key)} | {default and f'`{default}`'} | {description} |")
    return rows


def _values(key: dict[str, Any]) -> str:
    """The allowed values in words."""
    if "enum" in key:
        return ", ".join(f"`{value}`" for value in key["enum"])
    if "anyOf" in key:
        return " or ".join(_values(kind) for kind in key["anyOf"] if kind["type"] != "null")
    if key["type"] == "array":
        count = f"{key['minItems']} values" if "minItems" in key else "list"
        return f"{count}, each {_values((key.get('prefixItems') or [key.get('items')])[0])}"
    if key["type"] == "object":
        inner = key.get("additionalProperties")
        return f"mapping to {_values(inner)}" if isinstance(inner, dict) else "mapping"
    limits = {"minimum": ">= ", "exclusiveMinimum": "> ", "maximum": "<= ", "exclusiveMaximum": "< "}
    bounds = ", ".join(f"{sign}{key[limit]}" for limit, sign in limits.items() if limit in key)
    name = {"string": "text", "boolean": "true or false"}.get(key["type"], key["type"])
    return f"{name} {bounds}".strip()


def _resolved(schema: dict[str, Any], key: dict[str, Any]) -> dict[str, Any]:
    return schema["$defs"][key["$ref"].rpartition("/")[2]]


def main(check: bool) -> int:
    texts = {
        ROOT / "docs" / "recipes.md": reference(),
        ROOT / "docs" / "coverage.md": coverage(),
        ROOT / "docs" / "accuracy.md": accuracy() + training() + by_task(ROOT / "benchmarks" / "results"),
        ROOT / "docs" / "speed.md": speed(ROOT / "benchmarks" / "results"),
        ROOT / "docs" / "spectra.md": spectra(ROOT / "benchmarks" / "results"),
        ROOT / "docs" / "repairs.md": repairs(ROOT / "benchmarks" / "results"),
        ROOT / "recipes" / "recipe.schema.json": json.dumps(recipe_schema(), indent=1) + "\n",
    }
    stale = [path for path, text in texts.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if check:
            print(f"{path.relative_to(ROOT)} is out of date: run docs/generate.py", file=sys.stderr)
        else:
            path.write_text(texts[path], encoding="utf-8")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv))
