"""The options that every command that prunes has, in one place."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from scap_hub.cli.options import (
    AsJson,
    Checkpoint,
    Device,
    DryRun,
    PartPath,
    PushToHub,
    Quiet,
    RecipeOption,
    Restart,
    Settings,
    TaskName,
    overrides,
    use_device,
)

if TYPE_CHECKING:
    from scap_hub.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class PruningOptions:
    """What the user gave; as attributes, in the order in which --help lists them."""

    recipe: RecipeOption = None
    criterion: Annotated[
        str | None, typer.Option(metavar="NAME|FILE.py:CLASS", help="What scores the channels; also one of your own.")
    ] = None
    task: TaskName = None
    part: PartPath = None
    epochs: Annotated[int | None, typer.Option(help="Passes over the training images; 0 trains nothing.")] = None
    lr: Annotated[float | None, typer.Option(help="Highest learning rate of the fine-tuning.")] = None
    batch_size: Annotated[int | None, typer.Option(help="Images at once, on each device.")] = None
    precision: Annotated[str | None, typer.Option(metavar="bf16|fp16|no", help="Of the fine-tuning.")] = None
    device: Device = None
    seed: Annotated[int | None, typer.Option(help="Of everything that is random.")] = None
    push_to_hub: PushToHub = None
    checkpoint: Checkpoint = None
    restart: Restart = False
    dry_run: DryRun = False
    settings: Settings = None
    quiet: Quiet = False
    as_json: AsJson = False

    def resolved(self, **own: Any) -> Recipe:
        """The recipe with all that was given beside it; computes on the device from here on.

        Args:
            **own: Further recipe values of the command; None for those that were not given.

        Raises:
            RecipeError: Unknown recipe, key or value, no such device, or a `--set` that is not KEY=VALUE.
        """
        from scap_hub.recipe import Recipe

        if self.device is not None:
            use_device(self.device)
        flags = {
            "task": self.task,
            "part": self.part,
            "finetune_epochs": self.epochs,
            "finetune_learning_rate": self.lr,
            "data_batch_size": self.batch_size,
            "finetune_precision": self.precision,
            "seed": self.seed,
            "publish_repo_id": self.push_to_hub,
            **own,
        }
        # The criterion first, because a new one replaces the old one's options.
        criterion = {} if self.criterion is None else {"criterion": self.criterion}
        given = {key: value for key, value in flags.items() if value is not None}
        return Recipe.resolve(self.recipe, **{**criterion, **overrides(self.settings), **given})


def with_pruning_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command options of its own for its parameter `options`, in its place; typer reads them off the signature.

    Args:
        command: A function that typer can make a command of, but for its parameter `options`, a `PruningOptions`.
    """
    kinds = get_type_hints(PruningOptions, include_extras=True)
    options = [
        inspect.Parameter(own.name, inspect.Parameter.KEYWORD_ONLY, default=own.default, annotation=kinds[own.name])
        for own in fields(PruningOptions)
    ]

    @functools.wraps(command)
    def taking_them(**given: Any) -> None:
        found = PruningOptions(**{own.name: given.pop(own.name) for own in options})
        command(options=found, **given)

    parameters: list[inspect.Parameter] = []
    signature = inspect.signature(command, eval_str=True)
    for name, parameter in signature.parameters.items():
        own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)]
        parameters += options if name == "options" else own
    taking_them.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return taking_them
