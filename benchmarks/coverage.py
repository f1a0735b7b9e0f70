"""How much of the zoo can be pruned, proven by the masking oracle: one subprocess a model, resumable.

    python benchmarks/coverage.py --json out/coverage.json                    # the development list
    python benchmarks/coverage.py --quick --json out/coverage.json            # four models
    python benchmarks/coverage.py --models benchmarks/models-extended.txt --json out/extended.json
    python benchmarks/coverage.py --models benchmarks/models-tasks.txt --json out/tasks.json
    python benchmarks/coverage.py --reload --train --json out/coverage.json   # rebuilt and trained one step as well
    python benchmarks/coverage.py --peer torch-pruning --json out/coverage.json   # Torch-Pruning beside it

Weights are random and randomised once more (norms and statistics too), so that no zero hides a fault. Every model is
pruned to half of each group and to a random fraction of each, and each time its float64 output must equal that of the
masked original. A list has one model a line: library, name or call, input size, separated by tabs. A size is that of
square images, or all sizes of one input, channels first: 1x32x32x32.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODELS = Path(__file__).parent / "models.txt"
LIBRARIES = {
    "torchvision": "torchvision.models",
    "segmentation_models_pytorch": "segmentation_models_pytorch",
    "monai": "monai.networks.nets",
    "detectors": "detectors",
    "prompted": "prompted",
}
"""The module that calls of each further library are looked up in; the last two stand beside this file."""
QUICK = ("resnet18", "mobilenetv2_100", "convnext_atto", "regnety_002")


def build(library: str, name: str) -> Any:
    """An untrained model."""
    if library in LIBRARIES:
        return _called(importlib.import_module(LIBRARIES[library]), ast.parse(name, mode="eval").body)
    return {"timm": _timm_model, "transformers": _transformers_model}[library](name)


def _called(root: Any, written: ast.expr) -> Any:
    """What a call such as `detection.ssd300_vgg16(weights=None).backbone` makes, looked up in a module."""
    if isinstance(written, ast.Name):
        return getattr(root, written.id)
    if isinstance(written, ast.Attribute):
        return getattr(_called(root, written.value), written.attr)
    if isinstance(written, ast.Call):
        options = {keyword.arg: ast.literal_eval(keyword.value) for keyword in written.keywords}
        return _called(root, written.func)(*map(ast.literal_eval, written.args), **options)
    raise ValueError(f"{ast.unparse(written)!r} is no call, attribute or name")


def _timm_model(name: str) -> Any:
    """A model by name; `resnet18(features_only=True)` hands timm's own options on."""
    import timm

    written = ast.parse(name, mode="eval").body if name.endswith(")") else None
    if not isinstance(written, ast.Call):
        return timm.create_model(name)
    options = {keyword.arg: ast.literal_eval(keyword.value) for keyword in written.keywords}
    return timm.create_model(ast.unparse(written.func), **options)


def _transformers_model(name: str) -> Any:
    import transformers

    call = ast.parse(name, mode="eval").body
    if call.args:
        # Model(Config(...)): a class by name.
        return getattr(transformers, call.func.id)(configured(call.args[0]))
    config = configured(call)
    # Some configs of two model classes need to be told which.
    config.architectures = [type(config).__name__.replace("Config", "ForImageClassification")]
    return transformers.AutoModelForImageClassification.from_config(config)


def configured(call: ast.Call) -> Any:
    """The transformers config that a call writes down; configs may stand in it, such as that of a backbone."""
    import transformers

    def written(value: ast.expr) -> Any:
        return configured(value) if isinstance(value, ast.Call) else ast.literal_eval(value)

    return getattr(transformers, call.func.id)(**{keyword.arg: written(keyword.value) for keyword in call.keywords})


def shape(size: int | str) -> tuple[int, ...]:
    """Sizes of one input, from those of a list."""
    return (3, size, size) if isinstance(size, int) else tuple(map(int, size.split("x")))


def measure(library: str, name: str, size: int | str) -> dict[str, Any]:
    """Analyses, prunes and verifies one model; CPU seconds."""
    import torch

    from scap_hub import apply_plan, channel_groups, select, verify
    from scap_hub.channels.oracle import randomize
    from scap_hub.errors import ModelError
    from scap_hub.graph.copies import without_weights
    from scap_hub.graph.record import capture
    from scap_hub.graph.shapes import result_like
    from scap_hub.graph.values import on_meta
    from scap_hub.training.evaluate import count

    model = randomize(build(library, name)).eval()
    example = torch.randn(1, *shape(size), generator=torch.Generator().manual_seed(0))
    row: dict[str, Any] = {}
    start = time.process_time()
    groups = channel_groups(model, example)
    row["analysis_s"] = time.process_time() - start  # its own capture included
    result_like.cache_clear()
    start = time.process_time()
    with contextlib.suppress(ModelError):
        capture(without_weights(model), on_meta((example,)))
    row["capture_s"] = time.process_time() - start
    row["groups"], row["prunable"] = len(groups), sum(group.prunable for group in groups)
    row["pinned"] = sorted({group.pinned_because for group in groups if group.pinned_because})
    row["coverage"], row["returned"] = covered(model, groups)
    scores, fractions = drawn(groups)
    before = count(model, shape(size))["macs"]
    for kind, target in (("uniform", "ratio=0.5"), ("random", fractions)):
        start = time.process_time()
        plan = select(groups, scores, target, round_to=1, floor=0.0)
        row[f"{kind}_select_s"] = time.process_time() - start
        start = time.process_time()
        small = apply_plan(model, plan, verify=False)  # `verify` below
        row[f"{kind}_surgery_s"] = time.process_time() - start
        row[f"{kind}_pruned"] = len(plan.groups)
        row[f"{kind}_error"] = verify(model, plan, example)
        row[f"{kind}_macs"] = count(small, shape(size))["macs"] / before
    row["status"] = "ok"
    return row


def covered(model: Any, groups: Any) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """Shares of the output channels of convolutions and of linear layers: that can be removed, and that the model
    returns, so that they can not. Layers that do not run count for nothing.
    """
    import numpy as np
    from torch import nn

    computed, free, returned = (np.zeros(groups.whole.partition.count, dtype=bool) for _ in range(3))
    for group in groups:
        computed[group.channels] = True
        free[group.channels] = group.prunable
        returned[group.channels] = group.pinned_because == "is an output of the model"
    rows = {"conv": [0, 0, 0], "linear": [0, 0, 0]}
    for path, module in model.named_modules():
        transposed = isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
        conv = transposed or isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        kind = "conv" if conv else "linear" if isinstance(module, nn.Linear) else None
        labels = groups.whole.partition.tensors.get(f"{path}.weight")
        own = labels.along(int(transposed)) if kind and labels is not None else None
        if kind and own is not None and own.size > 1:
            counts = (int(mask[own].sum()) for mask in (free, returned, computed))
            rows[kind] = [a + b for a, b in zip(rows[kind], counts, strict=True)]
    able, out = ({kind: row[i] / row[2] if row[2] else None for kind, row in rows.items()} for i in range(2))
    return able, out


def drawn(groups: list[Any]) -> tuple[dict[str, Any], dict[str, float]]:
    """Random scores of the prunable groups, and a random fraction to keep of each."""
    import numpy as np
    import torch

    rng = np.random.default_rng(0)
    scores = {group.name: torch.from_numpy(rng.random(group.size)) for group in groups if group.prunable}
    return scores, {name: float(rng.uniform(0.2, 0.9)) for name in scores}


def cut_at_random(library: str, name: str, size: int | str) -> tuple[Any, Any, Any]:
    """An untrained model pruned at random ratios, its plan, and an example of its input."""
    import torch

    from scap_hub import apply_plan, channel_groups, select

    torch.manual_seed(1)
    model = build(library, name).eval()
    example = torch.randn(1, *shape(size))
    groups = channel_groups(model, example)
    plan = select(groups, *drawn(groups), round_to=1, floor=0.0)
    return apply_plan(model, plan, verify=False).eval(), plan, example


def train(library: str, name: str, size: int | str) -> dict[str, Any]:
    """Trains a pruned model for one step on two images, towards outputs of one; there are no targets for all tasks.

    Not of zero, which is what a head returns that starts with weights of zero.

    Returns:
        loss: Mean squared distance of the outputs from it, summed over them.
        gradients: How many parameters get one; all of them are finite, and one of them at least is not zero.
    """
    import torch

    small, _, example = cut_at_random(library, name, size)
    optimizer = torch.optim.SGD(small.train().parameters(), lr=1e-3)
    outputs = _tensors(small(torch.cat([example, torch.randn_like(example)])))
    trained = [leaf for leaf in outputs if leaf.is_floating_point() and leaf.requires_grad]
    loss = torch.stack([(leaf.float() - 1).square().mean() for leaf in trained]).sum()
    loss.backward()
    gradients = [weight.grad for weight in small.parameters() if weight.grad is not None]
    optimizer.step()
    found = [loss, *gradients, *small.parameters()]
    if not all(bool(tensor.isfinite().all()) for tensor in found):
        raise FloatingPointError("the loss, a gradient or a weight is not finite after one step")
    if not any(bool(gradient.any()) for gradient in gradients):
        raise FloatingPointError("no gradient reaches any weight")
    return {"loss": loss.item(), "gradients": len(gradients)}


def save_pruned(library: str, name: str, size: int | str, folder: str) -> dict[str, Any]:
    """Prunes an untrained model at random ratios; leaves its plan, its weights and one output in a folder."""
    import torch
    from safetensors.torch import save_file

    small, plan, example = cut_at_random(library, name, size)
    Path(folder, "plan.json").write_text(plan.to_json())
    weights = {key: tensor.contiguous().clone() for key, tensor in small.state_dict().items()}
    with torch.no_grad():
        made = {f"output.{index}": leaf.contiguous().clone() for index, leaf in enumerate(_tensors(small(example)))}
    save_file({**{f"weights.{key}": tensor for key, tensor in weights.items()}, **made, "example": example},
              Path(folder, "all.safetensors"))  # fmt: skip
    return {}


def reload(library: str, name: str, size: int | str, folder: str) -> dict[str, Any]:
    """Rebuilds it from the zoo's own constructor, the plan and the weights; the largest difference of the outputs."""
    import torch
    from safetensors.torch import load_file

    from scap_hub import PruningPlan, apply_plan
    from scap_hub.private import versioned

    held = load_file(Path(folder, "all.safetensors"))
    plan = PruningPlan.from_json(Path(folder, "plan.json").read_text())
    small = apply_plan(build(library, name), plan, verify=False).eval()
    weights = {key.removeprefix("weights."): value for key, value in held.items() if key.startswith("weights.")}
    small.load_state_dict(versioned(small, weights))
    with torch.no_grad():
        outputs = _tensors(small(held["example"]))
    return {"difference": max(float((leaf - held[f"output.{i}"]).abs().max()) for i, leaf in enumerate(outputs))}


def reloaded(library: str, name: str, size: int | str, limit: float) -> dict[str, Any]:
    """Saved by one process, loaded by another."""
    with tempfile.TemporaryDirectory() as folder:
        for job in (save_pruned, reload):
            row = isolated(lambda *model, job=job: job(*model, folder), (library, name, size), limit)
            if "status" in row:
                return row
    return row


def _tensors(output: Any) -> list[Any]:
    import torch

    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def measure_peer(library: str, name: str, size: int | str) -> dict[str, Any]:
    """Torch-Pruning at ratio 0.5 with the options of its own timm example: L2, heads kept, classifier ignored."""
    import torch
    import torch_pruning
    from torch import nn

    from scap_hub.training.evaluate import count

    model = build(library, name).eval()
    example = torch.randn(1, *shape(size))
    before = count(model, shape(size))["macs"]
    outputs = [tuple(x.shape) for x in torch.utils._pytree.tree_leaves(model(example)) if hasattr(x, "shape")]
    classes = getattr(model, "num_classes", None) or getattr(getattr(model, "config", None), "num_labels", None)
    ignored = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == classes]
    if hasattr(model, "get_classifier") and isinstance(model.get_classifier(), nn.Module):
        ignored.append(model.get_classifier())
    heads = {m.qkv: m.num_heads for m in model.modules() if hasattr(m, "qkv") and hasattr(m, "num_heads")}
    start = time.process_time()
    pruner = torch_pruning.pruner.MagnitudePruner(
        model, example, torch_pruning.importance.MagnitudeImportance(), pruning_ratio=0.5, ignored_layers=ignored,
        num_heads={layer: number for layer, number in heads.items() if isinstance(layer, nn.Module)},
    )  # fmt: skip
    analysed = time.process_time()
    pruner.step()
    pruned = time.process_time()
    after = [tuple(x.shape) for x in torch.utils._pytree.tree_leaves(model(example)) if hasattr(x, "shape")]
    return {
        "status": "ok" if after == outputs else "other output shapes",
        "analysis_s": analysed - start,
        "surgery_s": pruned - analysed,
        "macs": count(model, shape(size))["macs"] / before,
    }


def isolated(job: Callable[..., dict[str, Any]], model: tuple[str, str, int | str], limit: float) -> dict[str, Any]:
    """Runs a measurement in a process of its own, forked from this one so that nothing is imported twice."""
    fork = multiprocessing.get_context("fork")
    parent, child = fork.Pipe()

    def work() -> None:
        try:
            row = job(*model)
        except Exception as error:
            message = (str(error).strip() or type(error).__name__).split("\n")[0]
            row = {"status": type(error).__name__, "message": message[:300]}
        child.send(row)

    process = fork.Process(target=work)
    start = time.perf_counter()
    process.start()
    child.close()
    row: dict[str, Any] = {"status": "timeout"}
    if parent.poll(limit):
        try:
            row = parent.recv()
        except EOFError:
            row = {"status": "crash"}
    process.kill()
    process.join()
    return row | {"seconds": time.perf_counter() - start}


def run(
    models: list[tuple[str, str, int | str]],
    done: dict[str, Any],
    limit: float,
    path: Path | None,
    peer: bool = False,
    reload: bool = False,
    train_too: bool = False,
) -> dict[str, Any]:
    """Measures what is not done yet, and writes after each model."""
    for library, name, size in models:
        if name not in done:
            row = {"library": library, "name": name, "size": size}
            done[name] = row | isolated(measure, (library, name, size), limit)
            print(line(done[name]), flush=True)
        if peer and "torch_pruning" not in done[name]:
            done[name]["torch_pruning"] = isolated(measure_peer, (library, name, size), limit)
        if reload and "reloaded" not in done[name]:
            done[name]["reloaded"] = reloaded(library, name, size, limit)
        if train_too and "trained" not in done[name]:
            done[name]["trained"] = isolated(train, (library, name, size), limit)
        if path:
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(list(done.values()), indent=1) + "\n")
            temporary.replace(path)
    return done


def compared(rows: list[dict[str, Any]]) -> str:
    """What both did with the models that Torch-Pruning was given, and the ratio of their times."""
    tried = [row for row in rows if "torch_pruning" in row]
    theirs = [row for row in tried if row["torch_pruning"]["status"] == "ok"]
    both = [row for row in theirs if row["status"] == "ok"]
    if not both:
        return "Torch-Pruning: nothing to compare"
    ratio = statistics.median(row["analysis_s"] / row["torch_pruning"]["analysis_s"] for row in both)
    seconds = sum(row["analysis_s"] for row in both), sum(row["torch_pruning"]["analysis_s"] for row in both)
    ours, peer = (
        statistics.median(values)
        for values in ([r["uniform_macs"] for r in both], [r["torch_pruning"]["macs"] for r in both])
    )
    return (
        "Torch-Pruning, with the options of its own timm example and in the same run, returns a model for "
        f"{len(theirs)} of the {len(tried)} that it was given (whether the right one is not checked), scap_hub for "
        f"{sum(row['status'] == 'ok' for row in tried)}. Over the {len(both)} that both prune, finding groups takes "
        f"{ratio:.2f} times the CPU seconds of its constructor (median; {seconds[0]:.0f} s against {seconds[1]:.0f} s "
        f"for all of them), and {ours:.2f} of the MACs are left against {peer:.2f} (medians)"
    )


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    if row["status"] != "ok":
        return f"{row['name'][:44]:44} {row['status']}: {row.get('message', '')[:150]}"
    conv, linear = (row["coverage"][kind] for kind in ("conv", "linear"))
    shares = " ".join("  -  " if share is None else f"{share:5.3f}" for share in (conv, linear))
    return (
        f"{row['name'][:44]:44} ok {shares} macs x{row['uniform_macs']:.2f} x{row['random_macs']:.2f} "
        f"error {max(row['uniform_error'], row['random_error']):.0e} groups {row['prunable']}/{row['groups']} "
        f"analysis {row['analysis_s']:.1f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=MODELS)
    parser.add_argument("--json", type=Path, help="results; what is in there is not measured again")
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    parser.add_argument("--only", help="only names that contain this")
    parser.add_argument("--limit", type=float, default=300, help="seconds a model")
    parser.add_argument("--reload", action="store_true", help="rebuild every pruned model in another process as well")
    parser.add_argument("--train", action="store_true", help="train every pruned model for one step as well")
    parser.add_argument("--peer", choices=["torch-pruning"], help="prune with it as well")
    options = parser.parse_args()
    import timm  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    listed = [text.split("\t") for text in options.models.read_text().splitlines() if text and not text.startswith("#")]
    models = [(library, name, int(size) if size.isdigit() else size) for library, name, size, *_ in listed]
    for library in LIBRARIES.keys() & {library for library, *_ in models}:
        importlib.import_module(LIBRARIES[library])
    if options.quick:
        models = [model for model in models if model[1] in QUICK]
    if options.only:
        models = [model for model in models if options.only in model[1]]
    known = json.loads(options.json.read_text()) if options.json and options.json.is_file() else []
    done = run(
        models,
        {row["name"]: row for row in known},
        options.limit,
        options.json,
        options.peer is not None,
        options.reload,
        options.train,
    )
    rows = list(done.values())
    print(f"{sum(row['status'] == 'ok' for row in rows)} of {len(rows)} models pruned and proven")
    if options.reload:
        exact = sum(row.get("reloaded", {}).get("difference") == 0 for row in rows)
        print(f"{exact} of {len(rows)} rebuilt in another process with outputs that differ by 0")
    if options.train:
        print(f"{sum('loss' in row.get('trained', {}) for row in rows)} of {len(rows)} trained for one step")
    if options.peer:
        print(compared(rows))


if __name__ == "__main__":
    main()
