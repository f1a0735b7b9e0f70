"""What pruning costs a segmenter, a detector and a feature extractor, at two sizes.

    python benchmarks/by_task.py --json out/by_task.json       # about ten CPU minutes a task
    python benchmarks/by_task.py --tasks segmentation --targets macs=0.5
    python benchmarks/by_task.py --tasks features --mobilenet-weights mobilenet_v2-b0353104.pth
    python benchmarks/by_task.py --quick                       # that it runs

Segmenter and detector are trained from scratch on the scenes that `collages.py` makes of the items in Debian's
`dataset-fashion-mnist`. The extractor is a MobileNetV2 without its head, with torchvision's ImageNet weights if they
are given; it sees the items alone, and nothing of it is trained on them. Each size is measured as repaired, as tuned on
the calibration images without labels, and, but for the extractor, as fine-tuned with labels and the dense model as
teacher; the metrics (mean IoU, mAP, cosine to the dense features, kNN top-1) are those of the test images. Latency is
that of one image, measured in turns with the dense model. The fine-tuned model is then exported by
`scap_hub.export(..., int8=True)`, and its metric, latency and size in ONNX Runtime noted, in float32 and in int8. Rows
of the JSON of tasks that are not measured stay.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import DatasetDict
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from accuracy import mobilenetv2
from collages import LABELS, SIDE, collages
from fashion_mnist import fashion_mnist

import scap_hub
from scap_hub.recipe import Recipe
from scap_hub.run.inputs import load_dense, shard_calibration
from scap_hub.run.pruning import prune_loaded
from scap_hub.run.result import Result
from scap_hub.run.stages import Stages
from scap_hub.training.data import Data
from scap_hub.training.evaluate import evaluate
from scap_hub.training.finetune import finetune

SIZE = (3, SIDE, SIDE)


def segmenter() -> nn.Module:
    """UperNet on a ResNet of basic blocks."""
    body = transformers.ResNetConfig(
        embedding_size=24, hidden_sizes=[24, 48, 96, 128], depths=[2, 2, 2, 2], layer_type="basic",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    names = dict(enumerate(["background", *LABELS]))
    config = transformers.UperNetConfig(
        backbone_config=body, hidden_size=48, auxiliary_channels=32, id2label=names, num_labels=len(names),
        label2id={name: number for number, name in names.items()},
    )  # fmt: skip
    return transformers.UperNetForSemanticSegmentation(config)


def detector() -> nn.Module:
    """RT-DETR on its small ResNet."""
    body = transformers.RTDetrResNetConfig(
        embedding_size=24, hidden_sizes=[24, 48, 96, 128], depths=[2, 2, 2, 2], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    names = dict(enumerate(LABELS))
    config = transformers.RTDetrConfig(
        backbone_config=body, encoder_hidden_dim=64, encoder_in_channels=[48, 96, 128], encoder_attention_heads=4,
        encoder_ffn_dim=128, d_model=64, num_queries=20, decoder_in_channels=[64, 64, 64], decoder_ffn_dim=128,
        decoder_layers=2, decoder_attention_heads=4, num_denoising=20, freeze_backbone_batch_norms=False,
        id2label=names, label2id={name: number for number, name in names.items()},
    )  # fmt: skip
    return transformers.RTDetrForObjectDetection(config)


TASKS: dict[str, tuple[Callable[[], nn.Module], str, float]] = {
    "segmentation": (segmenter, "annotation", 2e-3),
    "detection": (detector, "objects", 1e-3),
}
"""The model, the column of its targets, and the learning rate from scratch."""
FEATURES = "features"


def shared(options: argparse.Namespace) -> Recipe:
    """What is the same for all tasks."""
    return Recipe.resolve(
        None, model_input_size=SIZE, data_calibration_images=min(256, options.images), data_batch_size=32,
        data_augmentation="crop", finetune_epochs=0, repair_tune_steps=0, criterion=options.criterion,
        criterion_diagnostics=False, round_to=8,
    )  # fmt: skip


def extracted(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Two rows for the dense extractor, and two for each target: cosine to the dense features, and kNN top-1."""
    torch.manual_seed(0)
    dense = mobilenetv2(options.mobilenet_weights).eval()
    dense.reset_classifier(0)
    items = fashion_mnist()
    splits = DatasetDict(
        train=items["train"].select(range(options.images)), test=items["test"].select(range(2 * options.images))
    )
    recipe = shared(options)
    loaded, data, _ = load_dense(dense, splits, recipe, Stages(0))
    assert data.test is not None
    dense = loaded.module
    metrics = [data.task.metric, *data.task.others]

    def figures(model: nn.Module) -> dict[str, float]:
        found = evaluate(model, data.test, task=data.task, teacher=dense)
        return {metric.name: found[metric.key] for metric in metrics}

    whole = figures(dense)
    rows = [{"task": FEATURES, "target": "dense", "metric": name, "dense": value} for name, value in whole.items()]
    for target in options.targets:
        result = prune_loaded(loaded, data, Recipe.resolve(recipe, target=target), detailed=False)
        tuned = copy.deepcopy(result.model)
        scap_hub.tune(dense, tuned, shard_calibration(data, 32), steps=options.steps, task=data.task)
        repaired, after = figures(result.model), figures(tuned)
        for name in whole:
            rows.append(
                {"task": FEATURES, "target": target, "metric": name, **cost(result), "repaired": repaired[name],
                 "tuned": after[name]}
            )  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    return rows


def cost(result: Result) -> dict[str, Any]:
    """Shares of the MACs and parameters that stay, and milliseconds before and after."""
    before, after = result.report.before, result.report.after
    return {"macs": after.macs / before.macs, "params": after.params / before.params,
            "latency_ms": [before.latency_ms, after.latency_ms]}  # fmt: skip


def measured(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for the dense model, and one for each target."""
    build, column, rate = TASKS[name]
    torch.manual_seed(0)
    splits = collages(options.images, options.images // 3).select_columns(["image", column])
    recipe = shared(options)
    loaded, data, _ = load_dense(build().eval(), splits, recipe, Stages(0))
    learn = recipe.finetune.model_copy(update={"learning_rate": rate, "schedule": "onecycle"})
    dense = loaded.module
    finetune(dense, data, learn.lasting(options.epochs))
    rows = [{"task": name, "target": "dense", "metric": data.task.metric.name, "dense": quality(dense, data)}]
    for target in options.targets:
        cut = Recipe.resolve(recipe, target=target)
        result = prune_loaded(loaded, data, cut, detailed=False)
        row = {"task": name, "target": target, **cost(result), "repaired": result.report.after.top1}
        tuned = copy.deepcopy(result.model)
        scap_hub.tune(dense, tuned, shard_calibration(data, 32), steps=options.steps, task=data.task)
        row["tuned"] = quality(tuned, data)
        trained = copy.deepcopy(result.model)
        finetune(trained, data, learn.model_copy(update={"learning_rate": rate / 2}).lasting(options.finetune), dense)
        row["fine-tuned"] = quality(trained, data)
        row["exported"] = exported(replace(result, model=trained), splits)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def exported(result: Result, splits: DatasetDict) -> dict[str, Any]:
    """What the exported files of a model are like: the metric, milliseconds of an image, and MB."""
    with tempfile.TemporaryDirectory() as folder:
        deployment = scap_hub.export(
            result.save_pretrained(Path(folder) / "model"), int8=True, dataset=splits
        ).deployment
    assert deployment is not None and deployment.int8 is not None
    variants = {
        own.name.removeprefix("pruned "): {"metric": own.top1, "latency_ms": own.latency_ms, "mb": own.bytes / 1e6}
        for own in deployment.variants
    }
    return {**variants, "layers in float32": len(deployment.int8.kept), "ranges": deployment.int8.scheme}


def quality(model: nn.Module, data: Data) -> float:
    """The metric on the test images."""
    assert data.test is not None
    return evaluate(model, data.test, task=data.task)[data.task.metric.key]


def of_dense(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row of the dense model that belongs to a row."""
    same = (own for own in rows if own["target"] == "dense" and own["task"] == row["task"])
    return next(own for own in same if own["metric"] == row.get("metric", own["metric"]))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """In Markdown."""
    lines = [
        "| task | target | metric | dense | repaired | tuned | fine-tuned | latency |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["target"] == "dense":
            continue
        dense = of_dense(row, rows)
        before, after = row["latency_ms"]
        figures = [dense["dense"], *(row.get(name) for name in ("repaired", "tuned", "fine-tuned"))]
        shown = " | ".join("" if figure is None else f"{100 * figure:.1f}" for figure in figures)
        lines.append(
            f"| {row['task']} | {row['target']} | {dense['metric']} | {shown} | {before:.2f} to {after:.2f} ms |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(prog="benchmarks/by_task.py", description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=lambda text: text.split(","), default=[*TASKS, FEATURES])
    parser.add_argument("--targets", type=lambda text: text.split(","), default=["macs=0.5", "macs=0.3"])
    parser.add_argument("--images", type=int, default=1024, help="to train on, or to calibrate from")
    parser.add_argument("--epochs", type=int, default=20, help="of the dense model")
    parser.add_argument("--finetune", type=int, default=5, help="epochs of a pruned model")
    parser.add_argument("--steps", type=int, default=200, help="of the tuning without labels")
    parser.add_argument("--criterion", default="scap-set")
    parser.add_argument("--mobilenet-weights", type=Path, help="torchvision's mobilenet_v2-b0353104.pth")
    parser.add_argument("--quick", action="store_true", help="a few images and steps")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.quick:
        options.images, options.epochs, options.finetune, options.steps, options.criterion = 48, 1, 1, 2, "l1"
    rows = [
        row for name in options.tasks for row in (extracted(options) if name == FEATURES else measured(name, options))
    ]
    print(table(rows))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        known = json.loads(options.json.read_text()) if options.json.is_file() else []
        kept = [row for row in known if row["task"] not in options.tasks]
        options.json.write_text(json.dumps([*kept, *rows], indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
