"""The command that tries plans on a model: verify."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scap_hub.cli.models import groups_of
from scap_hub.cli.options import AsJson, Checkpoint, Model, Quiet, Size
from scap_hub.cli.output import output, say
from scap_hub.errors import TargetError, UnverifiableError, VerificationError
from scap_hub.progress import announce

if TYPE_CHECKING:
    from scap_hub.channels import ChannelGroups
    from scap_hub.plan import PruningPlan


def verify(
    model: Model,
    plan: Annotated[
        Path | None, typer.Option(help="A pruning_plan.json; random plans if left out.", exists=True, dir_okay=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the random weights, input and plans.")] = 0,
    plans: Annotated[int, typer.Option(min=1, help="How many random plans are tried.")] = 4,
    out: Annotated[
        Path, typer.Option(help="JSON file that a failing plan is written to; replaced if it is there.")
    ] = Path("failing-plan.json"),
    size: Size = None,
    checkpoint: Checkpoint = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Prove that pruning a model equals masking it, in float64, on random weights or those of a file.

    Example: scap-hub verify resnet18 --seed 1 --plans 8
    """
    with output(quiet or as_json):
        import torch

        from scap_hub.channels import oracle
        from scap_hub.plan import PruningPlan

        loaded, groups = groups_of(model, True, size, checkpoint)
        net = loaded.module if checkpoint else oracle.randomize(loaded.module, seed)
        example = torch.randn(1, *loaded.preprocessing.input_size, generator=torch.Generator().manual_seed(seed))
        if plan is None:
            tried = random_plans(groups, seed, plans)
        else:
            tried = iter([(str(plan), PruningPlan.from_json(plan.read_bytes()))])
        differences = {}
        for name, pruning in tried:
            with announce(f"proving: {name}"):
                try:
                    differences[name] = oracle.verify(net, pruning, example)
                except UnverifiableError:
                    raise
                except VerificationError as error:
                    if plan is not None:
                        raise
                    options = _given({"--seed": seed, "--size": size, "--checkpoint": checkpoint})
                    raise _written(error, pruning, name, out, options, model) from error
    if as_json:
        print(json.dumps(differences))
    for name, difference in differences.items():
        say(f"{name}: pruned equals masked, relative difference {difference:.1e}", quiet or as_json)


def random_plans(groups: ChannelGroups, seed: int, count: int) -> Iterator[tuple[str, PruningPlan]]:
    """Plans that follow from the seed alone, with names: half of each group, then a random fraction of each.

    Raises:
        TargetError: No group can be pruned.
    """
    import torch

    from scap_hub.selection.select import select

    if not groups.prunable:
        raise TargetError("nothing can be pruned, so there is no plan to try; `scap-hub inspect` lists the reasons")
    generator = torch.Generator().manual_seed(seed)
    for number in range(count):
        scores = {group.name: torch.rand(group.size, generator=generator) for group in groups.prunable}
        fractions = {name: float(0.2 + 0.8 * torch.rand((), generator=generator)) for name in scores}
        if number == 0:
            yield f"half of each group, seed {seed}", select(groups, scores, "ratio=0.5", round_to=1)
        else:
            yield f"random fractions {number}, seed {seed}", select(groups, scores, fractions, round_to=1)


def _given(options: dict[str, Any]) -> list[str]:
    """The options as they were typed."""
    return [text for name, value in options.items() if value is not None for text in (name, str(value))]


def _written(
    error: VerificationError, plan: PruningPlan, name: str, file: Path, options: list[str], model: str
) -> VerificationError:
    """The error of a failing plan that was written to a file, with the command that shows it again."""
    from scap_hub.run.verification import write_plan

    write_plan(plan, file)
    command = shlex.join(["scap-hub", "verify", model, "--plan", str(file), *options])
    return VerificationError(f"{error}; the plan ({name}) is in {str(file)!r}: send it along. To repeat it: {command}")
