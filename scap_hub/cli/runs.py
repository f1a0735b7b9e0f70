"""Commands that prune: prune, compare, demo."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scap_hub.cli.options import AsJson, DataSource, OptionalModel, Out, Quiet, Settings, overrides
from scap_hub.cli.output import is_main_process, output, print_forecast, print_report, print_table, say
from scap_hub.cli.pruning import PruningOptions, with_pruning_options
from scap_hub.errors import PlanError
from scap_hub.selection.target import EXAMPLES

if TYPE_CHECKING:
    from scap_hub.run.result import Result


@with_pruning_options
def prune(
    *,
    model: OptionalModel = None,
    data: DataSource = None,
    target: Annotated[str | None, typer.Option(help=f"What stays: {EXAMPLES}.")] = None,
    out: Annotated[Path | None, typer.Option(help="Output folder, absent or empty.")] = None,
    options: PruningOptions,
) -> None:
    """Prune a model: score, remove, repair, fine-tune, measure, save.

    Example: scap-hub prune resnet50 --data me/flowers --target macs=0.5 --out resnet50-half

    On two devices: torchrun --nproc_per_node 2 -m scap_hub prune resnet50 --data me/flowers --out resnet50-half
    """
    with output(options.quiet):
        import scap_hub

        recipe = options.resolved(target=target)
        given: dict[str, Any] = {"output_dir": out, "checkpoint": options.checkpoint}
        if options.dry_run:
            print_forecast(scap_hub.forecast(model, data, recipe, **given), options.quiet, options.as_json)
            return
        result = scap_hub.prune(model, data, recipe, restart=options.restart, **given)
    _print_result(result, out, options.quiet, options.as_json)


def _print_result(result: Result, out: Path | None, quiet: bool, as_json: bool) -> None:
    print_report(result.report, _document(result, out), quiet, as_json)
    if out is not None:
        say(f"saved in {out}", quiet or as_json)
    if result.recipe.publish.layout == "pruned":
        _say_if_uniform(result, quiet or as_json)


def _document(result: Result, out: Path | None) -> dict[str, Any]:
    """What a script reads of a run; what only the page needs is in the folder's report.json."""
    found = result.report.to_dict()
    about = found.pop("about")
    del found["details"], found["before"]["mistakes"], found["after"]["mistakes"]
    return {**about, "folder": None if out is None else str(out), **found}


def _say_if_uniform(result: Result, quiet: bool) -> None:
    from scap_hub.hub.uniform import plain_config

    with contextlib.suppress(PlanError):
        plain_config(result.loaded, result.model)
        say(
            "constructor arguments can express these widths: with --set publish_layout=uniform the saved model "
            "loads without scap_hub",
            quiet,
        )


def compare(
    model: OptionalModel = None,
    data: DataSource = None,
    targets: Annotated[str, typer.Option(help="What stays, with commas between.")] = "macs=0.5",
    criteria: Annotated[
        str,
        typer.Option(
            "--criteria",
            "--criterion",
            metavar="NAME|FILE.py:CLASS,...",
            help="Commas between; all: ours, and Torch-Pruning if installed. Also scratch, scratch-2x, zoo:NAME.",
        ),
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
    with output(quiet or as_json):
        import scap_hub

        found = scap_hub.compare(
            model, data, recipe, targets=targets.split(","), output=out, seeds=seeds,
            criteria="all" if criteria == "all" else criteria.split(","),
            **overrides(settings),
        )  # fmt: skip
    if as_json and is_main_process():
        print(json.dumps(found.to_dict()))
    elif not quiet and is_main_process():
        head, *rows = found.rows()
        print_table(head, rows, found.notes())


def demo(out: Out = Path("out/demo"), quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Train a small ResNet on digits, then prune, repair, fine-tune, save, and reload it. About two minutes.

    Example: scap-hub demo --out out/demo
    """
    with output(quiet):
        from scap_hub.run.demo import run

        result, difference = run(out)
    print_report(result.report, {**_document(result, out), "reload_difference": difference}, quiet, as_json)
    say(f"reloaded in a fresh process: largest difference of the logits {difference:g}", quiet or as_json)
    say(f"saved in {out}", quiet or as_json)
