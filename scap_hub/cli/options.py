"""Options that several commands have."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from scap_hub.errors import RecipeError
from scap_hub.text import one_line, shown

Model = Annotated[str, typer.Argument(help="timm name, Hub id or folder.")]
OptionalModel = Annotated[str | None, typer.Argument(help="timm name, Hub id or folder; the recipe's if left out.")]
DataSource = Annotated[str | None, typer.Option(help="Data set: Hub id, folder, or digits.")]
RecipeOption = Annotated[str | None, typer.Option(help="Shipped name or YAML file; see `scap-hub recipe list`.")]
RecipeSource = Annotated[str, typer.Argument(metavar="NAME|FILE", help="Shipped name or YAML file.")]
Out = Annotated[Path, typer.Option(help="Output folder, absent or empty.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any recipe value, such as finetune_epochs=3.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only, and the JSON that --json asks for.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document to standard output.")]
Size = Annotated[int | None, typer.Option(help="Height and width of the input in pixels; the model's own if left out.")]

Device = Annotated[
    str | None, typer.Option(metavar="cpu|cuda:N|mps", help="Where to compute; the fastest there is if left out.")
]
PushToHub = Annotated[
    str | None, typer.Option(metavar="ME/NAME", help="Hub repository that the result is published in.")
]
Checkpoint = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Weights of the model: .safetensors, or .pth with a state dict.")
]
TaskName = Annotated[
    str | None, typer.Option(help="What the model is for, such as object-detection; found from it if left out.")
]
PartPath = Annotated[
    str | None, typer.Option(metavar="PATH", help="Part to prune, where the whole cannot be recorded: backbone.")
]
Restart = Annotated[
    bool, typer.Option("--restart/--resume", help="Begin anew, or go on with an interrupted run of the same --out.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be done and what it takes; nothing is written.")
]


def overrides(settings: list[str] | None) -> dict[str, Any]:
    """The recipe values that `--set` gives, in their order.

    Raises:
        RecipeError: One of them is not KEY=VALUE.
    """
    return dict(_setting(text) for text in settings or [])


def use_device(name: str) -> None:
    """Makes accelerate compute there; call it before anything asks accelerate for a device.

    Raises:
        RecipeError: There is no such device.
    """
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:  # the latter from builds without CUDA
        why = one_line(error)
        raise RecipeError(f"--device {name!r} cannot be used here: {why}; write cpu, or leave it out") from None
    os.environ["ACCELERATE_TORCH_DEVICE"] = name


def _setting(text: str) -> tuple[str, Any]:
    import yaml

    key, equals, value = text.partition("=")
    if not equals:
        raise RecipeError(f"--set {shown(text)}: write KEY=VALUE, such as finetune_epochs=3")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        raise RecipeError(f"--set {shown(text)}: {shown(value)} is not a YAML value; quote it") from None
