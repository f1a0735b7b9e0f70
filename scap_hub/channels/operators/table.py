"""The table of rules and what a rule is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scap_hub.channels.labels import Ids, Ledger
from scap_hub.graph.node import Node


@dataclass(frozen=True, eq=False)
class Producer:
    """A layer that computes channels: its weight's rows are theirs."""

    node: Node
    weight: str
    ids: np.ndarray


@dataclass(frozen=True, eq=False)
class Consumer:
    """A layer that reads channels through its weight."""

    node: Node
    weight: str
    ids: np.ndarray


@dataclass(frozen=True, eq=False)
class Cost:
    """MACs of one operator: `times` for each element of a tensor with these ids that stays."""

    ids: Ids
    times: int
    weight: str | None


@dataclass
class Trace:
    """Everything found on one walk over the graph, in the graph's order."""

    ledger: Ledger = field(default_factory=Ledger)
    producers: list[Producer] = field(default_factory=list)
    consumers: list[Consumer] = field(default_factory=list)
    summed: list[np.ndarray] = field(default_factory=list)
    """Ids that products sum over: being read by another tensor is being read."""
    costs: list[Cost] = field(default_factory=list)
    ids: dict[Node, Any] = field(default_factory=dict)
    outputs: list[Ids] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Call:
    """One operator call, as its rule sees it."""

    node: Node
    trace: Trace

    @property
    def args(self) -> Mapping[str, Any]:
        """Its arguments by the names of the operator's schema."""
        return self.node.arguments

    @property
    def ledger(self) -> Ledger:
        return self.trace.ledger

    @property
    def op(self) -> str:
        return self.node.op

    @property
    def place(self) -> str:
        """The operator and the module that calls it, for reasons that a person reads."""
        return f"{self.op.split('.')[0]} in {self.node.owner or 'the model'!r}"

    def __getitem__(self, name: str) -> Any:
        return self.args[name]

    def ids(self, name: str) -> Ids:
        """Ids of a tensor argument."""
        return self.trace.ids[self.args[name]]

    def given(self, name: str) -> bool:
        """Whether an optional tensor argument is present."""
        return isinstance(self.args.get(name), Node)

    @property
    def tensors(self) -> list[Ids]:
        """Ids of every tensor argument, those in lists too."""
        return [ids for node in self.node.sources for ids in flat(self.trace.ids[node])]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the output."""
        return tuple(self.node.value.shape)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of several outputs."""
        return [tuple(value.shape) for value in self.node.value]

    def state(self, name: str) -> str | None:
        """The parameter or buffer that an argument is made from, through the first operand of each operator.

        A standardised weight is a batch norm of the weight, scaled by a gain: the weight comes first.
        """
        node = self.args[name]
        while isinstance(node, Node):
            if node.state:
                return node.state
            node = next(iter(node.sources), None)
        return None

    def dim(self, name: str = "dim", rank: int | None = None) -> int:
        """A dimension argument, made non-negative."""
        return self.args[name] % (rank or len(self.ids("self").shape))


Rule = Callable[[Call], Any]
_RULES: dict[str, Rule] = {}


def rule(*ops: str) -> Callable[[Rule], Rule]:
    """Registers a rule for ATen operators; a name without overload covers all overloads and the in-place form."""

    def register(function: Rule) -> Rule:
        for op in ops:
            _RULES[op] = function
        return function

    return register


def rule_for(op: str) -> Rule | None:
    """The rule of `op` ("conv2d.default"), None where there is none."""
    name = op.split(".")[0]
    return _RULES.get(op) or _RULES.get(name) or _RULES.get(name.removesuffix("_"))


def flat(ids: Any) -> list[Ids]:
    """The tensors' ids in one node's value, which may be one, a list, or nothing."""
    if isinstance(ids, Ids):
        return [ids]
    return [item for item in ids or () if isinstance(item, Ids)]
