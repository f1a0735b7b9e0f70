"""The command line: a thin skin over the same calls."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from scap_hub.errors import PlanError, RecipeError, ScapHubError, VerificationError
from scap_hub.progress import announce, set_quiet
from scap_hub.selection.target import EXAMPLES

EXIT_CODES = (
    "Exit code 0: done; 1: a fault of scap_hub; 2: a mistake in what it was given, named in one line; 130: interrupted."
)

app = typer.Typer(
    help="Compress the vision models you already use: structured pruning for timm and Hugging Face models.",
    epilog=EXIT_CODES,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
recipes = typer.Typer(help="List, resolve and describe recipes.", rich_markup_mode=None)
app.add_typer(recipes, name="recipe")

# The base of all usage errors has no public name: up to typer 0.25 it is click's, from 0.26 on a private copy of it.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]

Model = Annotated[str, typer.Argument(help="timm name, Hub id or folder.")]
RecipeSource = Annotated[str, typer.Argument(metavar="NAME|FILE", help="Shipped name or YAML file.")]
Out = Annotated[Path, typer.Option(help="Output folder, absent or empty.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any recipe value, such as finetune_epochs=3.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only, and the JSON that --json asks for.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document to standard output.")]
Size = Annotated[int | None, typer.Option(help="Height and width of the input in pixels; the model's own if left out.")]


def main() -> None:
    """Entry point; a user's error is one line on standard error and exit code 2."""
    try:
        sys.exit(app(args=sys.argv[1:] or ["--help"], prog_name="scap-hub", standalone_mode=False))
    except ScapHubError as error:
        _fail(str(error), 1 if isinstance(error, VerificationError) else 2)
    except UsageError as error:
        command = error.ctx.command_path if getattr(error, "ctx", None) else "scap-hub"  # type: ignore[attr-defined]
        _fail(f"{error.format_message().rstrip('.')}; see `{command} --help`", 2)  # type: ignore[attr-defined]


@app.command()
def prune(
    model: Annotated[str | None, typer.Argument(help="timm name, Hub id or folder; the recipe's if left out.")] = None,
    data: Annotated[str | None, typer.Option(help="Data set: Hub id, folder, or digits.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Shipped name or YAML file; see `scap-hub recipe list`.")] = None,
    target: Annotated[str | None, typer.Option(help=f"What stays: {EXAMPLES}.")] = None,
    out: Annotated[Path | None, typer.Option(help="Output folder, absent or empty.")] = None,
    settings: Settings = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Prune a model: score, remove, repair, fine-tune, measure, save.

    Example: scap-hub prune resnet50 --data me/flowers --target macs=0.5 --out resnet50-half

    On two devices: torchrun --nproc_per_node 2 -m scap_hub prune resnet50 --data me/flowers --out resnet50-half
    """
    overrides = dict(_setting(setting) for setting in settings or [])
    if target is not None:
        overrides["target"] = target
    with _output(quiet):
        import scap_hub
        from scap_hub.hub.uniform import plain_config

        result = scap_hub.prune(model, data, recipe, output_dir=out, **overrides)
    _report(result.report, result.report.to_dict(), quiet, as_json)
    if out is not None:
        _say(f"saved in {out}", quiet or as_json)
    if result.recipe.publish.layout == "pruned":
        with contextlib.suppress(PlanError):
            plain_config(result.loaded, result.model)
            _say(
                "constructor arguments can express these widths: with --set publish_layout=uniform the saved model "
                "loads without scap_hub",
                quiet or as_json,
            )


@app.command()
def compare(
    model: Annotated[str | None, typer.Argument(help="timm name, Hub id or folder; the recipe's if left out.")] = None,
    data: Annotated[str | None, typer.Option(help="Data set: Hub id, folder, or digits.")] = None,
    targets: Annotated[str, typer.Option(help="What stays, with commas between.")] = "macs=0.5",
    criteria: Annotated[
        str, typer.Option(help="Names with commas between, or all: ours, and Torch-Pruning if it is installed.")
    ] = "all",
    seeds: Annotated[int, typer.Option(min=1, help="How often each is tried.")] = 3,
    recipe: Annotated[str | None, typer.Option(help="Repair and training, the same for each criterion.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="JSON file that grows cell by cell; the same command takes up there.")
    ] = None,
    settings: Settings = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Compare criteria: one model, the same repair and training, top-1 at every target, mean rank over all of them.

    Example: scap-hub compare resnet18 --data me/flowers --targets macs=0.5,macs=0.3 --criteria scap,obs,l1 --seeds 3
    """
    with _output(quiet or as_json):
        import scap_hub

        found = scap_hub.compare(
            model, data, recipe, targets=targets.split(","), output=out, seeds=seeds,
            criteria="all" if criteria == "all" else criteria.split(","),
            **dict(_setting(setting) for setting in settings or []),
        )  # fmt: skip
    if as_json and _is_main_process():
        print(json.dumps(found.to_dict()))
    elif not quiet and _is_main_process():
        head, *rows = found.rows()
        _print_table(head, rows)


@app.command()
def inspect(
    model: Model,
    untrained: Annotated[bool, typer.Option("--untrained", help="Random weights: nothing is downloaded.")] = False,
    size: Size = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """List a model's channel groups: size, share of the MACs, constraint, and why some cannot be pruned.

    Example: scap-hub inspect resnet18 --untrained
    """
    with _output(quiet or as_json):
        groups = _groups(model, untrained, size)[1]
    rows = [
        {
            "name": group.name,
            "size": group.size,
            "producers": group.producers,
            "consumers": group.consumers,
            "constraint": list(dict.fromkeys(balance.reason for balance in group.constraint or ())),
            "macs": share,
            "prunable": group.prunable,
            "pinned_because": group.pinned_because,
        }
        for group, share in zip(groups, _mac_shares(groups), strict=True)
    ]
    if as_json:
        print(json.dumps(rows))
    elif not quiet:
        table = Table("group", "size", "producers", "MACs", "constraint", "pinned because it")
        for row in rows:
            first, *others = row["producers"]
            producers = f"{first} +{len(others)}" if others else first
            constraint = "; ".join(row["constraint"])
            table.add_row(
                row["name"], str(row["size"]), producers, f"{row['macs']:.1%}", constraint, row["pinned_because"]
            )
        Console().print(table)


@app.command()
def verify(
    model: Model,
    plan: Annotated[
        Path | None, typer.Option(help="A pruning_plan.json; random plans if left out.", exists=True, dir_okay=False)
    ] = None,
    size: Size = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Prove that pruning a model equals masking it, in float64, on random weights.

    Example: scap-hub verify resnet18
    """
    with _output(quiet or as_json):
        import torch

        from scap_hub.channels.oracle import randomize
        from scap_hub.channels.oracle import verify as prove
        from scap_hub.plan import PruningPlan
        from scap_hub.selection.select import select

        loaded, groups = _groups(model, True, size)
        net = randomize(loaded.module)
        scores = {group.name: torch.rand(group.size) for group in groups if group.prunable}
        if plan is not None:
            plans = {str(plan): PruningPlan.from_json(plan.read_bytes())}
        else:
            fractions = {name: float(0.2 + 0.8 * torch.rand(())) for name in scores}
            plans = {
                "half of each group": select(groups, scores, "ratio=0.5", round_to=1),
                "random fractions": select(groups, scores, fractions, round_to=1),
            }
        example = torch.randn(1, *loaded.preprocessing.input_size)
        errors = {}
        for name, own in plans.items():
            with announce(f"proving: {name}"):
                errors[name] = prove(net, own, example)
    if as_json:
        print(json.dumps(errors))
    for name, error in errors.items():
        _say(f"{name}: pruned equals masked, relative difference {error:.1e}", quiet or as_json)


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="timm name, Hub id or folder, of a dense or a pruned model.")],
    against: Annotated[
        str | None, typer.Option(help="What to compare with; a pruned model's dense one if left out.")
    ] = None,
    batch: Annotated[str, typer.Option(help="Images at once, with commas between.")] = "1,64",
    dtype: Annotated[str, typer.Option(help="fp32, fp16, bf16, with commas between.")] = "fp32",
    compile: Annotated[bool, typer.Option("--compile", help="Measure torch.compile too.")] = False,
    size: Size = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure latency and throughput, in turns with the dense model, on the device at hand.

    Example: scap-hub bench resnet50-half --batch 1,64 --dtype fp32,bf16 --compile
    """
    batches = [int(text) if text.strip().isdigit() else 0 for text in batch.split(",")]
    with _output(quiet or as_json):
        from scap_hub.run.bench import bench as measure
        from scap_hub.timing.clock import device_name
        from scap_hub.training.distributed import accelerator

        pixels = None if size is None else (3, size, size)
        rows = measure(model, against, batch_sizes=batches, dtypes=dtype.split(","), compile=compile, size=pixels)
        device = device_name(accelerator().device)
    if as_json:
        print(json.dumps({"device": device, "rows": [asdict(row) for row in rows]}))
    elif not quiet:
        print(f"on {device}")
        _print_table(
            ["model", "batch", "dtype", "mode", "ms", "images/s", "speed-up"],
            [
                [row.model, str(row.batch), row.dtype, row.mode, f"{row.ms:.2f}", f"{row.images_per_second:,.0f}",
                 f"{row.speedup:.2f}x"]
                for row in rows
            ],
        )  # fmt: skip


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder that prune saved.")],
    repo_id: Annotated[str, typer.Argument(help="owner/name, or name for your own account.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; made if absent.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Publish a saved model on the Hub in one commit; log in first with `hf auth login`.

    Example: scap-hub push resnet50-half me/resnet50-half
    """
    with _output(quiet):
        from scap_hub.hub.publish import push_to_hub

        url = push_to_hub(folder, repo_id, private, revision, create_pr, commit_message=message)
    if as_json:
        print(json.dumps({"url": url}))
    _say(url, quiet or as_json)


@app.command()
def export(
    folder: Annotated[str, typer.Argument(help="Folder that prune saved, or its Hub id.")],
    to: Annotated[str, typer.Option(help="onnx or torch-export.")] = "onnx",
    out: Annotated[Path | None, typer.Option(help="The file; model.onnx or model.pt2 in the folder.")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Export a saved model for any batch size, and check that the file computes the same.

    Example: scap-hub export resnet50-half --to onnx
    """
    with _output(quiet):
        from scap_hub.hub.export import export as write

        path = write(folder, to, out)  # type: ignore[arg-type]
    if as_json:
        print(json.dumps({"file": str(path)}))
    _say(str(path), quiet or as_json)


@app.command()
def demo(out: Out = Path("out/demo"), quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Train a small ResNet on digits, then prune, repair, fine-tune, save, and reload it. About two minutes.

    Example: scap-hub demo --out out/demo
    """
    with _output(quiet):
        from scap_hub.run.demo import run

        result, difference = run(out)
    _report(result.report, {**result.report.to_dict(), "reload_difference": difference}, quiet, as_json)
    _say(f"reloaded in a fresh process: largest difference of the logits {difference:g}", quiet or as_json)
    _say(f"saved in {out}", quiet or as_json)


@recipes.command("list")
def list_recipes(quiet: Quiet = False, as_json: AsJson = False) -> None:
    """List the shipped recipes, and when to use each.

    Example: scap-hub recipe list
    """
    from scap_hub.recipe import shipped_recipes

    purposes = {
        name: path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# When: ")
        for name, path in shipped_recipes().items()
    }
    if as_json:
        print(json.dumps(purposes))
    elif not quiet:
        _print_table(["recipe", "when"], purposes.items())


@recipes.command("show")
def show_recipe(recipe: RecipeSource, settings: Settings = None, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Print a recipe with every default filled in, as `scap-hub prune` would run it; --quiet only checks it.

    Example: scap-hub recipe show half-macs --set finetune_epochs=20 > mine.yaml
    """
    from scap_hub.recipe import Recipe

    resolved = Recipe.resolve(recipe, **dict(_setting(setting) for setting in settings or []))
    if as_json:
        print(resolved.model_dump_json())
    elif not quiet:
        print(resolved.to_yaml(), end="")


@recipes.command("schema")
def show_schema() -> None:
    """Print the JSON schema of recipes, with which editors complete and check the YAML.

    Example: scap-hub recipe schema > recipe.schema.json
    """
    from scap_hub.recipe import recipe_schema

    print(json.dumps(recipe_schema(), indent=1))


def show_report(report: Any) -> None:
    """Prints the table of a run."""
    _print_table(["", "dense", "pruned", "change"], report.rows())


def _print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table(*head)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _groups(model: str, untrained: bool, size: int | None) -> tuple[Any, list[Any]]:
    import torch

    from scap_hub.channels import channel_groups
    from scap_hub.zoo import load_model

    with announce(f"loading {model}"):
        loaded = load_model(model, pretrained=not untrained, input_size=(3, size, size) if size else None)
    with announce("finding the channel groups"):
        return loaded, channel_groups(loaded.module, torch.zeros(1, *loaded.preprocessing.input_size))


def _mac_shares(groups: list[Any]) -> list[float]:
    """Share of the model's MACs in the layers that compute each group."""
    layers = groups[0].space.layer_macs() if groups else {}
    total = sum(layers.values())
    return [sum(layers.get(path, 0) for path in group.producers) / total for group in groups]


def _setting(text: str) -> tuple[str, Any]:
    import yaml

    key, equals, value = text.partition("=")
    if not equals:
        raise RecipeError(f"--set {text!r}: write KEY=VALUE, such as finetune_epochs=3")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        raise RecipeError(f"--set {text!r}: {value!r} is not a YAML value; quote it") from None


def _report(report: Any, document: dict[str, Any], quiet: bool, as_json: bool) -> None:
    if not _is_main_process():
        return
    if as_json:
        print(json.dumps(document))
    elif not quiet:
        show_report(report)


def _say(text: str, quiet: bool) -> None:
    if not quiet and _is_main_process():
        print(text)


def _fail(message: str, code: int) -> None:
    if _is_main_process():
        print(f"scap-hub: {message}", file=sys.stderr)
    sys.exit(code)


@contextlib.contextmanager
def _output(quiet: bool) -> Iterator[None]:
    """Keeps quiet where asked, and on all processes but the main one; the libraries too, which read this on import."""
    quiet = quiet or not _is_main_process()
    if quiet:
        for variable in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ[variable] = "1"
        os.environ["TRANSFORMERS_VERBOSITY"] = "error"
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
    set_quiet(quiet)
    try:
        yield
    except KeyboardInterrupt:
        _fail("interrupted; with the same --out, the same command finds its scores and takes up fine-tuning", 130)
    finally:
        set_quiet(False)
        logging.disable(logging.NOTSET)


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
