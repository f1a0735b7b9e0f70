"""The command that prunes a model to several sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from scap_hub.cli.options import DataSource, OptionalModel
from scap_hub.cli.output import is_main_process, output, print_forecast, print_table, say
from scap_hub.cli.pruning import PruningOptions, with_pruning_options


@with_pruning_options
def family(
    *,
    model: OptionalModel = None,
    data: DataSource = None,
    targets: Annotated[
        str, typer.Option(help="What stays of each size, with commas between.")
    ] = "macs=0.75,macs=0.5,macs=0.25",
    siblings: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Smaller models to stand beside, trained the same way.")
    ] = None,
    teacher: Annotated[str, typer.Option(metavar="dense|next-larger", help="Who teaches each size.")] = "dense",
    out: Annotated[Path | None, typer.Option(help="Folder with one in it for each size, absent or empty.")] = None,
    options: PruningOptions,
) -> None:
    """Prune a model to several sizes: its channels are scored once, and each size is repaired and trained.

    With --push-to-hub me/name the sizes become me/name-macs-0.5 and so on, and a collection.

    Example: scap-hub family resnet50 --data me/flowers --targets macs=0.75,macs=0.5,macs=0.25 --out resnet50-family
    """
    quiet, as_json = options.quiet, options.as_json
    with output(quiet):
        import scap_hub

        recipe = options.resolved()
        given: dict[str, Any] = {
            "targets": _listed(targets), "siblings": _listed(siblings), "teacher": teacher,
            "output_dir": out, "checkpoint": options.checkpoint,
        }  # fmt: skip
        if options.dry_run:
            print_forecast(scap_hub.forecast_family(model, data, recipe, **given), quiet, as_json)
            return
        made = scap_hub.prune_family(model, data, recipe, restart=options.restart, **given)
    if as_json and is_main_process():
        print(json.dumps({"folder": None if out is None else str(out), **made.to_dict()}))
    elif not quiet and is_main_process():
        print_table(made.head(), made.rows(), made.notes())
    if out is not None:
        say(f"saved in {out}", quiet or as_json)


def _listed(text: str | None) -> list[str]:
    """What stands between commas."""
    return [part.strip() for part in text.split(",")] if text else []
