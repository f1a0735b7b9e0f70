"""Every operator that has a rule, in a small network that calls it: pruned networks compute what nobody reading the
removed channels would compute.

Three checks stand beside `scap_hub.verify`; none uses anything of the oracle or of the analysis:

* "readers" and "all" of `tests.independent`, the dense network with zeros;
* "survivors": the same class built at the smaller width, with the weights that the plan keeps. This is what an operator
  over a varying number of channels (a mean, a norm) means.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import scap_hub
from tests.independent import TOLERANCE, difference, double, plans, random_values, reference
from tests.operator_cases import CASES, Case, Net

aten = torch.ops.aten


def names_with_a_rule() -> set[str]:
    """The names in the table of operators. The one place that knows how the table is kept."""
    from scap_hub.channels import operators
    from scap_hub.channels.operators import table

    assert operators
    return set(table.known_operators())


def names_called(net: nn.Module, inputs: tuple[Tensor, ...]) -> set[str]:
    """Every name by which the table may know an operator that a forward pass calls."""
    from scap_hub.channels.operators import has_rule
    from scap_hub.graph.record import capture

    ops = {node.op for node in capture(net, inputs, known=has_rule).called if node.is_operator}
    short = {op.partition(".")[0] for op in ops}
    return ops | short | {name.removesuffix("_") for name in short}


NO_OPERATORS: set[str] = set()
"""Names in the table that no ATen operator of this torch has: nothing can call them."""


def images(case: Case) -> tuple[Tensor, ...]:
    return (torch.randn(2, 3, *[6] * case.dims, generator=torch.Generator().manual_seed(1)),)


def survivors(case: Case, net: Net, plan: scap_hub.PruningPlan) -> Net:
    """The class built at the smaller width, with the weights that the plan keeps."""
    kept = len(plan.indices(plan.tensors["a.weight"].keep[0])) if "a.weight" in plan.tensors else case.width
    small = Net(case, kept)
    state = net.state_dict()
    for name, cut in plan.tensors.items():
        for dim, entry in cut.keep.items():
            state[name] = state[name].index_select(dim, torch.tensor(plan.indices(entry)))
    for name, tensor in state.items():
        holder, _, own = name.rpartition(".")
        module = small.get_submodule(holder)
        if tensor.is_floating_point():
            kind = nn.Parameter if isinstance(getattr(module, own), nn.Parameter) else Tensor.clone
            setattr(module, own, kind(tensor))
    return small.double().eval()


KNOWN_FAULTS: set[str] = set()
"""Operators whose rule fails today. They are tried with `-m slow`; whoever mends the rule takes the name away."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in KNOWN_FAULTS else ()) for name in CASES]
)
def test_a_pruned_network_with_the_operator_is_exact(name):
    case = CASES[name]
    net, inputs = random_values(Net(case)).eval(), images(case)
    groups = scap_hub.channel_groups(net, inputs)
    free = [group.name for group in groups if group.prunable and "a" in group.producers]
    assert case.free in (None, bool(free)), {group.name: group.pinned_because for group in groups}
    assert any(group.prunable for group in groups), "b is never held by the operator"
    tried = list(plans(groups, seed=0, singles=len(groups)))
    for kind, plan in tried:
        assert isinstance(plan, scap_hub.PruningPlan), f"{kind}: {plan!r}"
        ours = scap_hub.apply_plan(net.double(), plan).eval()(*double(inputs))
        net.float()
        for check in case.checks:
            other = survivors(case, net, plan) if check == "survivors" else reference(net, plan, check, case.readers)
            assert difference(ours, other(*double(inputs))) < TOLERANCE, f"{kind} plan, {check}"
        assert scap_hub.verify(net, plan, inputs) < TOLERANCE, kind
    assert any("a.weight" in plan.tensors for _, plan in tried) == bool(free)


def test_every_operator_with_a_rule_is_called():
    called: set[str] = set()
    for case in CASES.values():
        called |= names_called(Net(case).eval(), images(case))
    assert names_with_a_rule() - called == NO_OPERATORS


def test_names_of_no_operator_are_named():
    assert {name for name in NO_OPERATORS if not _tensors_enter(name)} == NO_OPERATORS


def _tensors_enter(name: str) -> bool:
    packet = getattr(aten, name, None)
    schemas: Iterable[Any] = (getattr(packet, form)._schema for form in packet.overloads()) if packet else ()
    return any("Tensor" in str(argument.type) for schema in schemas for argument in schema.arguments)
