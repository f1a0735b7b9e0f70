"""The stage of a run that verifies a plan before anything is built on it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from scap_hub.channels import ChannelGroups
from scap_hub.channels.oracle import compare
from scap_hub.errors import ModelError, UnverifiableError, VerificationError
from scap_hub.files import path_of, replacing
from scap_hub.placement import fed
from scap_hub.plan import PruningPlan
from scap_hub.run.guilty import guilty_groups
from scap_hub.training.distributed import from_main

IMAGES = 2
"""Calibration images that a plan is verified on."""


@dataclass(frozen=True)
class Verified:
    """What is known of a plan that may be used.

    Attributes:
        difference: Largest relative difference between the pruned and the masked model; None where it is not verified.
        unverified: Why it is not verified; None where it is.
        precision: What the two were compared in: "float64", or another type where that did not fit into memory.
    """

    difference: float | None = None
    unverified: str | None = None
    precision: str | None = None


@dataclass(frozen=True)
class Verdict(Verified):
    """What is known of any plan.

    Attributes:
        guilty: Why groups must stay whole, by name; if there are any, the plan must not be used.
        fault: What is wrong, with the smallest failing plan; None if nothing is.
    """

    guilty: Mapping[str, str] = field(default_factory=dict)
    fault: VerificationError | None = None

    @property
    def known(self) -> Verified:
        """What a report tells."""
        return Verified(self.difference, self.unverified, self.precision)


def verified(
    model: nn.Module, groups: ChannelGroups, plan: PruningPlan, images: Tensor, insist: bool = True
) -> Verdict:
    """Verifies a plan on the main process, and finds the groups that it is wrong about.

    Args:
        model: The model that the plan is for.
        groups: Its channel groups.
        plan: The plan.
        images: Calibration images, of which the first few are used.
        insist: Whether a model that cannot be compared is an error, or a warning.

    Raises:
        UnverifiableError: The model cannot be compared, and `insist` is true.
        VerificationError: The plan is wrong, and no part of it is.
    """
    return from_main(lambda: _verdict(model, groups, plan, fed(model, images[:IMAGES]), insist))


def _verdict(model: nn.Module, groups: ChannelGroups, plan: PruningPlan, images: Tensor, insist: bool) -> Verdict:
    try:
        found = compare(model, plan, images)
        return Verdict(found.difference, precision=str(found.dtype).removeprefix("torch."))
    except (UnverifiableError, ModelError) as error:
        if insist:
            raise UnverifiableError(f"{error}; with evaluate.verify=false the run goes on without it") from error
        warnings.warn(f"the pruned model is not verified: {error}", stacklevel=2)
        return Verdict(unverified=str(error))
    except VerificationError as error:
        guilty, smallest = guilty_groups(groups, plan, error, lambda part: compare(model, part, images))
    if not guilty:
        raise smallest
    warnings.warn(
        f"a plan was wrong and is made anew without {', '.join(map(repr, guilty))}; please report it: {smallest}",
        stacklevel=2,
    )
    return Verdict(guilty=guilty, fault=smallest)


def beyond_repair(fault: VerificationError) -> VerificationError:
    """The error that ends a run; it holds the smallest failing plan."""
    cut = ", ".join(map(repr, fault.plan.groups))
    error = VerificationError(f"{fault}; the smallest plan that fails cuts {cut}, and to leave that out did not help")
    error.difference, error.plan = fault.difference, fault.plan
    return error


@contextlib.contextmanager
def failing_plan_beside(output_dir: str | Path | None) -> Iterator[None]:
    """Writes the plan of a VerificationError beside the output folder, and says so in its message."""
    try:
        yield
    except VerificationError as error:
        if error.plan is None or output_dir is None:
            raise
        output = path_of(output_dir)
        path, plan = output.with_name(f"{output.name}-failing-plan.json"), error.plan
        with contextlib.suppress(OSError):  # a full disk must not hide what was found
            from_main(lambda: write_plan(plan, path))
            error.args = (f"{error}; that plan is in {str(path)!r}: send it along",)
        raise


def write_plan(plan: PruningPlan, path: Path) -> None:
    """Writes a plan as JSON; a file that is there is replaced."""
    with replacing(path) as unfinished:
        unfinished.write_text(plan.to_json() + "\n", encoding="utf-8")
