"""The command line: a thin skin over the same calls."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console
from rich.table import Table

from scap_hub.errors import RecipeError, ScapHubError

app = typer.Typer(
    help="Compress the vision models you already use: structured pruning for timm and Hugging Face models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars, no table.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document to standard output.")]
Untrained = Annotated[bool, typer.Option("--untrained", help="Random weights: nothing is downloaded.")]
Size = Annotated[Optional[int], typer.Option(help="Height and width of the input in pixels; the model's own.")]


def main() -> None:
    """Entry point; a user's error is one line on standard error and exit code 2."""
    try:
        app()
    except ScapHubError as error:
        print(f"scap-hub: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("scap-hub: interrupted; the same command takes up fine-tuning where it stopped", file=sys.stderr)
        sys.exit(130)


@app.command()
def prune(
    model: Annotated[Optional[str], typer.Argument(help="timm name, Hub id or folder; the recipe's if left out.")] = None,
    data: Annotated[Optional[str], typer.Option(help="Data set: Hub id, folder, or digits.")] = None,
    recipe: Annotated[Optional[str], typer.Option(help="Shipped name or YAML file.")] = None,
    target: Annotated[Optional[str], typer.Option(help="What stays: macs=0.5, params=0.3, ratio=0.5, threshold=0.6.")] = None,
    out: Annotated[Optional[Path], typer.Option(help="Output folder, absent or empty.")] = None,
    options: Annotated[
        Optional[list[str]], typer.Option("--set", metavar="KEY=VALUE", help="Any recipe value, as in prune(): finetune_epochs=3.")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Prune a model: score, remove, repair, fine-tune, measure, save.

    Example: scap-hub prune resnet50 --data me/flowers --target macs=0.5 --out resnet50-half
    """
    import scap_hub
    from scap_hub.hub.uniform import plain_config

    overrides = dict(_setting(option) for option in options or [])
    if target is not None:
        overrides["target"] = target
    with _output(quiet):
        result = scap_hub.prune(model, data, recipe, output_dir=out, **overrides)
        if not _main_process():
            return
        if as_json:
            print(json.dumps(result.report.to_dict()))
        elif not quiet:
            show_report(result.report)
            if out is not None:
                print(f"saved in {out}")
            if result.recipe.publish.layout == "pruned" and plain_config(result.loaded, result.model):
                print(
                    "constructor arguments can express these widths: with --set publish_layout=uniform the saved model "
                    "loads without scap_hub"
                )


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="timm name, Hub id or folder.")],
    untrained: Untrained = False,
    size: Size = None,
    as_json: AsJson = False,
) -> None:
    """List a model's channel groups: size, share of the MACs, constraint, and why some cannot be pruned.

    Example: scap-hub inspect resnet18 --untrained
    """
    groups = _groups(model, untrained, size)[1]
    shares = _mac_shares(groups)
    if as_json:
        print(
            json.dumps(
                [
                    {
                        "name": group.name,
                        "size": group.size,
                        "producers": group.producers,
                        "consumers": group.consumers,
                        "constraint": [balance.reason for balance in group.constraint or ()],
                        "macs": shares[group.name],
                        "prunable": group.prunable,
                        "pinned_because": group.pinned_because,
                    }
                    for group in groups
                ]
            )
        )
        return
    table = Table("group", "size", "producers", "MACs", "constraint", "pinned because it")
    for group in groups:
        constraint = "; ".join(dict.fromkeys(balance.reason for balance in group.constraint or ()))
        producers = group.producers[0] + (f" +{len(group.producers) - 1}" if len(group.producers) > 1 else "")
        share = f"{100 * shares[group.name]:.1f} %"
        table.add_row(group.name, str(group.size), producers, share, constraint, group.pinned_because or "")
    Console().print(table)


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="timm name, Hub id or folder.")],
    plan: Annotated[Optional[Path], typer.Option(help="pruning_plan.json; by default random plans are tried.")] = None,
    untrained: Untrained = True,
    size: Size = None,
    as_json: AsJson = False,
) -> None:
    """Prove that pruning a model equals masking it, in float64, on random weights.

    Example: scap-hub verify resnet18
    """
    import torch

    from scap_hub.channels.oracle import randomize
    from scap_hub.channels.oracle import verify as prove
    from scap_hub.plan import PruningPlan
    from scap_hub.selection import select

    loaded, groups = _groups(model, untrained, size)
    net = randomize(loaded.module)
    scores = {group.name: torch.rand(group.size) for group in groups if group.prunable}
    if plan is not None:
        plans = {str(plan): PruningPlan.from_json(plan.read_text(encoding="utf-8"))}
    else:
        fractions = {name: float(0.2 + 0.8 * torch.rand(())) for name in scores}
        plans = {
            "half of each group": select(groups, scores, "ratio=0.5", round_to=1),
            "random fractions": select(groups, scores, fractions, round_to=1),
        }
    example = torch.randn(1, *loaded.preprocessing.input_size)
    errors = {name: prove(net, own, example) for name, own in plans.items()}
    if as_json:
        print(json.dumps(errors))
    else:
        for name, error in errors.items():
            print(f"{name}: pruned equals masked, relative difference {error:.1e}")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder that prune saved.")],
    repo_id: Annotated[str, typer.Argument(help="owner/name, or name for your own account.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[Optional[str], typer.Option(help="Branch to push to; made if absent.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    message: Annotated[Optional[str], typer.Option(help="Commit message.")] = None,
) -> None:
    """Publish a saved model on the Hub in one commit; log in first with `hf auth login`.

    Example: scap-hub push resnet50-half me/resnet50-half
    """
    from scap_hub.hub.publish import push_to_hub

    print(push_to_hub(folder, repo_id, private, revision, create_pr, commit_message=message))


@app.command()
def export(
    folder: Annotated[str, typer.Argument(help="Folder that prune saved, or its Hub id.")],
    to: Annotated[str, typer.Option(help="onnx or torch-export.")] = "onnx",
    out: Annotated[Optional[Path], typer.Option(help="The file; model.onnx or model.pt2 in the folder.")] = None,
) -> None:
    """Export a saved model for any batch size, and check that the file computes the same.

    Example: scap-hub export resnet50-half --to onnx
    """
    from scap_hub.hub.export import export as write

    print(write(folder, to, out))  # type: ignore[arg-type]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Output folder, absent or empty.")] = Path("out/demo"),
    quiet: Quiet = False,
) -> None:
    """Train a small ResNet on digits, then prune, repair, fine-tune, save, and reload it. About two minutes.

    Example: scap-hub demo --out out/demo
    """
    from scap_hub.demo import run

    with _output(quiet):
        result, difference = run(out)
    if not quiet:
        show_report(result.report)
    print(f"reloaded in a fresh process: largest difference of the logits {difference:g}")
    print(f"saved in {out}")


def show_report(report: Any) -> None:
    """Prints the table of a run."""
    table = Table("", "dense", "pruned", "change")
    for row in report.rows():
        table.add_row(*row)
    Console().print(table)


def _groups(model: str, untrained: bool, size: int | None) -> tuple[Any, list[Any]]:
    import torch

    from scap_hub.adapters import load_model
    from scap_hub.channels import channel_groups

    loaded = load_model(model, pretrained=not untrained, input_size=(3, size, size) if size else None)
    return loaded, channel_groups(loaded.module, torch.zeros(1, *loaded.preprocessing.input_size))


def _mac_shares(groups: list[Any]) -> dict[str, float]:
    """Share of the model's MACs in the layers that compute each group."""
    if not groups:
        return {}
    space = groups[0].space
    import numpy as np

    from scap_hub.channels.trace import count_staying

    everything = np.ones(space.count, dtype=bool)
    by_layer: dict[str, int] = {}
    for cost in space.costs:
        layer = (cost.weight or "").rpartition(".")[0]
        by_layer[layer] = by_layer.get(layer, 0) + cost.times * count_staying(cost.ids, everything)
    total = sum(by_layer.values())
    return {group.name: sum(by_layer.get(path, 0) for path in group.producers) / total for group in groups}


def _setting(option: str) -> tuple[str, Any]:
    import yaml

    key, equals, value = option.partition("=")
    if not equals:
        raise RecipeError(f"--set {option!r}: write KEY=VALUE, such as finetune_epochs=3")
    return key.strip(), yaml.safe_load(value)


@contextlib.contextmanager
def _output(quiet: bool) -> Iterator[None]:
    from scap_hub.progress import set_quiet

    set_quiet(quiet)
    try:
        yield
    finally:
        set_quiet(False)


def _main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0
