"""How much of the zoo can be pruned, proven by the masking oracle: one subprocess a model, resumable.

    python benchmarks/coverage.py --json out/coverage.json                    # the development list
    python benchmarks/coverage.py --quick --json out/coverage.json            # four models
    python benchmarks/coverage.py --models my-list.txt --json out/coverage.json

Weights are random and randomised once more (norms and statistics too), so that no zero hides a fault. Every model is
pruned to half of each group and to a random fraction of each, and each time its float64 output must equal that of the
masked original. A list has one model a line: library, name or config call, input size, separated by tabs.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MODELS = Path(__file__).parent / "models.txt"
QUICK = ("resnet18", "mobilenetv2_100", "convnext_atto", "regnety_002")


def build(library: str, name: str) -> Any:
    """An untrained model."""
    if library == "timm":
        import timm

        return timm.create_model(name)
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
    """The transformers config that a call writes down."""
    import transformers

    options = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    return getattr(transformers, call.func.id)(**options)


def measure(library: str, name: str, size: int) -> dict[str, Any]:
    """Analyses, prunes and verifies one model."""
    import numpy as np
    import torch
    from torch import nn

    from scap_hub import apply_plan, channel_groups, select, verify
    from scap_hub.channels.oracle import randomize
    from scap_hub.training.evaluate import count

    torch.set_num_threads(1)
    model = randomize(build(library, name)).eval()
    example = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    row: dict[str, Any] = {}
    start = time.process_time()
    groups = channel_groups(model, example)
    row["analysis_s"] = time.process_time() - start
    row["groups"], row["prunable"] = len(groups), sum(group.prunable for group in groups)
    row["pinned"] = sorted({group.pinned_because for group in groups if group.pinned_because})
    free = np.zeros(groups[0].space.count, dtype=bool)
    for group in groups:
        free[group.channels] = group.prunable
    rows: dict[str, list[int]] = {"conv": [0, 0], "linear": [0, 0]}
    for path, module in model.named_modules():
        kind = (
            "conv" if isinstance(module, nn.Conv1d | nn.Conv2d) else "linear" if isinstance(module, nn.Linear) else None
        )
        ids = groups[0].space.tensors.get(f"{path}.weight")
        if kind and ids is not None and module.weight.shape[0] > 1:
            own = ids.along(0)
            rows[kind][0] += 0 if own is None else int(free[own].sum())
            rows[kind][1] += module.weight.shape[0]
    row["coverage"] = {kind: able / whole if whole else None for kind, (able, whole) in rows.items()}
    rng = np.random.default_rng(0)
    scores = {group.name: torch.from_numpy(rng.random(group.size)) for group in groups if group.prunable}
    fractions = {name: float(rng.uniform(0.2, 0.9)) for name in scores}
    before = count(model, tuple(example.shape[1:]))["macs"]
    for kind, target in (("uniform", "ratio=0.5"), ("random", fractions)):
        start = time.process_time()
        plan = select(groups, scores, target, round_to=1, floor=0.0)
        row[f"{kind}_select_s"] = time.process_time() - start
        start = time.process_time()
        small = apply_plan(model, plan)
        row[f"{kind}_surgery_s"] = time.process_time() - start
        row[f"{kind}_pruned"] = len(plan.groups)
        row[f"{kind}_error"] = verify(model, plan, example)
        row[f"{kind}_macs"] = count(small, tuple(example.shape[1:]))["macs"] / before
    row["status"] = "ok"
    return row


def worker(library: str, name: str, size: int) -> None:
    """Prints one JSON line, whatever happens."""
    start = time.perf_counter()
    row: dict[str, Any] = {"library": library, "name": name, "size": size}
    try:
        row |= measure(library, name, size)
    except Exception as error:
        row |= {"status": type(error).__name__, "message": str(error).strip().split("\n")[0][:300]}
    print(json.dumps(row | {"seconds": time.perf_counter() - start}))


def run(models: list[tuple[str, str, int]], done: dict[str, Any], limit: float, path: Path | None) -> dict[str, Any]:
    """Measures what is not done yet, and writes after each model."""
    for library, name, size in models:
        if name in done:
            continue
        command = [sys.executable, __file__, "--one", library, name, str(size)]
        try:
            output = subprocess.run(
                command, capture_output=True, text=True, timeout=limit, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
            row = json.loads(output.stdout.strip().split("\n")[-1])
        except subprocess.TimeoutExpired:
            row = {"library": library, "name": name, "size": size, "status": "timeout"}
        except ValueError:
            row = {"library": library, "name": name, "size": size, "status": "crash", "message": output.stderr[-300:]}
        done[name] = row
        print(line(row), flush=True)
        if path:
            path.write_text(json.dumps(list(done.values()), indent=1) + "\n")
    return done


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
    parser.add_argument("--one", nargs=3, metavar=("LIBRARY", "NAME", "SIZE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        worker(options.one[0], options.one[1], int(options.one[2]))
        return
    listed = [text.split("\t") for text in options.models.read_text().splitlines() if text and not text.startswith("#")]
    models = [(library, name, int(size)) for library, name, size, *_ in listed]
    if options.quick:
        models = [model for model in models if model[1] in QUICK]
    if options.only:
        models = [model for model in models if options.only in model[1]]
    known = json.loads(options.json.read_text()) if options.json and options.json.is_file() else []
    done = run(models, {row["name"]: row for row in known}, options.limit, options.json)
    good = sum(row["status"] == "ok" for row in done.values())
    print(f"{good} of {len(done)} models pruned and proven")


if __name__ == "__main__":
    main()
