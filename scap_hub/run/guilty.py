"""Which channel groups a plan is wrong about, found by bisection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from scap_hub.channels.groups import ChannelGroups
from scap_hub.errors import PlanError, UnverifiableError, VerificationError
from scap_hub.plan import PruningPlan
from scap_hub.selection.cluster import clustered

T = TypeVar("T")

MOST = 8
"""So many faults are looked for in one plan; if there are more, the fault is none of single groups."""


class Guilty(NamedTuple):
    """What is wrong with a plan.

    Attributes:
        reasons: Why each guilty group must stay whole, by its name; empty where no part of the plan fails.
        smallest: The fault of the plan with the fewest groups that fails; `smallest.plan` is that plan.
    """

    reasons: dict[str, str]
    smallest: VerificationError


def guilty_groups(
    groups: ChannelGroups, plan: PruningPlan, fault: VerificationError, verify: Callable[[PruningPlan], object]
) -> Guilty:
    """Finds the groups without which the plan is right.

    Groups that must stay balanced with each other are tried, and accused, together.

    Args:
        groups: Of the dense model.
        plan: One that fails.
        fault: What `verify` said of it.
        verify: Raises a VerificationError for a plan that is wrong.

    Raises:
        UnverifiableError: The dense model cannot be compared.
    """
    fault.plan = plan
    found = Guilty({}, fault)
    named = [group for group in groups if group.name in plan.groups]
    left = [[member.name for member in members] for members, _ in clustered(named)]
    for _ in range(MOST):
        if not _fault(groups, plan, left, verify):
            break
        units = smallest_failing(left, lambda units: _fault(groups, plan, units, verify) is not None)
        fault = _fault(groups, plan, units, verify) or found.smallest
        smallest = fault if len(fault.plan.groups) < len(found.smallest.plan.groups) else found.smallest
        reasons = {name: _reason(fault) for unit in units for name in unit}
        found = Guilty(found.reasons | reasons, smallest)
        left = [unit for unit in left if unit not in units]
    return found


def smallest_failing(units: Sequence[T], fails: Callable[[Sequence[T]], bool]) -> list[T]:
    """Some of the units that fail together, none of which can be left out, if more units never heal a fault.

    Args:
        units: They fail together.
        fails: Whether some of them do, in the order given; nothing does not fail.
    """
    needed: list[T] = []
    while units and not (needed and fails(needed)):
        passing, failing = 0, len(units)  # so many of the units pass, or fail, beside the needed ones
        while failing - passing > 1:
            middle = (passing + failing) // 2
            if fails([*needed, *units[:middle]]):
                failing = middle
            else:
                passing = middle
        needed.append(units[failing - 1])
        units = units[: failing - 1]
    return needed


def _fault(
    groups: ChannelGroups, plan: PruningPlan, units: Sequence[list[str]], verify: Callable[[PruningPlan], object]
) -> VerificationError | None:
    """What is wrong with the part of the plan that cuts these groups; None if nothing is."""
    if not units:
        return None
    try:
        part = groups.cut({name: plan.kept(name) for unit in units for name in unit})
    except PlanError:
        return None  # refused before it is made: it does no harm
    try:
        verify(part)
    except UnverifiableError:
        raise
    except VerificationError as error:
        error.plan = part
        return error
    return None


def _reason(fault: VerificationError) -> str:
    """Why a group is pinned; a sentence whose subject is the group."""
    if fault.difference is None:
        return f"made the pruned model fail: {fault}"
    return f"made the pruned model compute something else: relative difference {fault.difference:.1e}"
