"""The command that prunes a model to several sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from scap_hub.cli.options import (
    AsJson,
    Checkpoint,
    DataSource,
    Device,
    OptionalModel,
    PartPath,
    PushToHub,
    Quiet,
    RecipeOption,
    Restart,
    Settings,
    overrides,
    use_device,
)
from scap_hub.cli.output import is_main_process, output, print_table, say


def family(
    model: OptionalModel = None,
    data: DataSource = None,
    targets: Annotated[
        str, typer.Option(help="What stays of each size, with commas between.")
    ] = "macs=0.75,macs=0.5,macs=0.25",
    siblings: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Smaller models to stand beside, trained the same way.")
    ] = None,
    teacher: Annotated[
        str,
        typer.Option(metavar="dense|next-larger", help="Who teaches each size."),
    ] = "dense",
    recipe: RecipeOption = None,
    part: PartPath = None,
    out: Annotated[Path | None, typer.Option(help="Folder with one in it for each size, absent or empty.")] = None,
    device: Device = None,
    push_to_hub: PushToHub = None,
    checkpoint: Checkpoint = None,
    restart: Restart = False,
    settings: Settings = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Prune a model to several sizes: its channels are scored once, and each size is repaired and trained.

    With --push-to-hub me/name the sizes become me/name-macs-0.5 and so on, and a collection.

    Example: scap-hub family resnet50 --data me/flowers --targets macs=0.75,macs=0.5,macs=0.25 --out resnet50-family
    """
    with output(quiet):
        import scap_hub

        changes: dict[str, Any] = overrides(settings)
        if part is not None:
            changes["part"] = part
        if push_to_hub is not None:
            changes["publish_repo_id"] = push_to_hub
        if device is not None:
            use_device(device)
        made = scap_hub.prune_family(
            model, data, recipe, targets=_listed(targets), siblings=_listed(siblings), teacher=teacher,
            output_dir=out, restart=restart, checkpoint=checkpoint, **changes,
        )  # fmt: skip
    if as_json and is_main_process():
        print(json.dumps({"folder": None if out is None else str(out), **made.to_dict()}))
    elif not quiet and is_main_process():
        print_table(made.head(), made.rows())
    if out is not None:
        say(f"saved in {out}", quiet or as_json)


def _listed(text: str | None) -> list[str]:
    """What stands between commas."""
    return [part.strip() for part in text.split(",")] if text else []
