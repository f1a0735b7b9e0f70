"""The table of operators, and what a rule is given.

An operator is described once, where its rule stands: how labels flow through it, what role it plays, whether its
result depends on how many channels there are, which of its numbers count channels, and which modules call it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import nn

from scap_hub.channels.labels import Labels, Ledger
from scap_hub.graph.node import Node


@dataclass(frozen=True, eq=False)
class Producer:
    """A layer that computes channels: the rows of its weight are theirs."""

    node: Node
    weight: str
    labels: np.ndarray


@dataclass(frozen=True, eq=False)
class Consumer:
    """A layer that reads channels through its weight."""

    node: Node
    weight: str
    labels: np.ndarray


@dataclass(frozen=True, eq=False)
class Cost:
    """MACs of one operator: `times` for each element of a tensor with these labels that stays."""

    labels: Labels
    times: int
    weight: str | None


@dataclass
class Trace:
    """Everything found on one walk over a graph, in the graph's order."""

    ledger: Ledger = field(default_factory=Ledger)
    producers: list[Producer] = field(default_factory=list)
    consumers: list[Consumer] = field(default_factory=list)
    summed: list[np.ndarray] = field(default_factory=list)
    """Labels that products sum over: being read by another tensor is being read."""
    costs: list[Cost] = field(default_factory=list)
    labels: dict[Node, Any] = field(default_factory=dict)
    """Of every node: `Labels`, a list of them, or None."""
    outputs: list[Labels] = field(default_factory=list)
    returned: set[Node] = field(default_factory=set)
    """What the forward pass returns."""
    fresh: dict[Node, list[np.ndarray]] = field(default_factory=dict)
    """Fresh labels by the operator that asked for them."""
    blocks: dict[str, int] = field(default_factory=dict)
    """Into how many blocks of rows the weight of a grouped convolution falls, by its name."""
    indices: dict[str, np.ndarray] = field(default_factory=dict)
    """For a buffer of channel numbers, the labels of the channels that it refers to, by its name."""
    owned: dict[int, Labels] = field(default_factory=dict)
    """Labels of parameters and buffers, by the tensor: tied ones share theirs."""


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
        return f"{self.op.split('.')[-2]} in {self.node.owner or 'the model'!r}"

    def __getitem__(self, name: str) -> Any:
        return self.args[name]

    def labels(self, name: str) -> Labels:
        """Labels of a tensor argument."""
        return self.trace.labels[self.args[name]]

    def given(self, name: str) -> bool:
        """Whether an optional tensor argument is present."""
        return isinstance(self.args.get(name), Node)

    @property
    def tensors(self) -> list[Labels]:
        """Labels of every tensor argument, those in lists too."""
        return [labels for node in self.node.sources for labels in flat(self.trace.labels[node])]

    @property
    def lends_shape(self) -> bool:
        """Whether the forward pass uses the shape or the type of the result, and none of its values."""
        users = self.node.users
        lent = all(user.is_operator and _lender(user) is self.node for user in users)
        return bool(users) and lent and self.node not in self.trace.returned

    @property
    def results(self) -> list[Labels]:
        """Labels of every result, once the rule has run."""
        return flat(self.trace.labels.get(self.node))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the output."""
        return tuple(self.node.value.shape)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of several outputs."""
        return [tuple(value.shape) for value in self.node.value]

    def unlabelled(self) -> Any:
        """A result, or several, of which nothing can be said."""
        value = self.node.value
        return [Labels(shape) for shape in self.shapes] if isinstance(value, tuple | list) else Labels(self.shape)

    def free_along(self, x: Labels, dim: int, reason: str) -> list[np.ndarray]:
        """The label arrays of an argument that do not vary along `dim`; the others are pinned."""
        free = []
        for array in x.arrays:
            if array.shape[dim] > 1:
                self.ledger.pin(array, f"{reason} ({self.place})")
            else:
                free.append(array)
        return free

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
        return self.args[name] % (rank or len(self.labels("self").shape))


def _lender(node: Node) -> Node | None:
    """The operand of which an operator reads nothing but its shape or its type."""
    other = node.arguments.get("other") if node.name in ("expand_as", "view_as", "reshape_as", "type_as") else None
    return other if other is not node.arguments.get("self") else None


class Size(NamedTuple):
    """A number in a call that counts channels.

    Attributes:
        argument: Name of the argument; "" for a number that code often computes another argument from.
        item: Position in the argument, if that is a list.
        labels: (n,) labels of what it counts; how many of them stay is the number in the pruned model.
        left_out: For an argument that the call leaves out, what torch takes in its place because of how many there
            are. The pruned model must say it, where fewer stay.
    """

    argument: str
    item: int | None
    labels: np.ndarray
    left_out: float | None = None


Rule = Callable[[Call], Any]
"""Labels of the result, from those of the arguments; equates, pins and balances through the call's ledger."""
Role = Literal["norm", "activation", "layout", ""]
Sizes = Callable[[Call], Iterable[Size]]
Counting = Callable[[Call], bool]
Idle = frozenset[tuple[str, int | None]]


def _no_sizes(call: Call) -> Iterable[Size]:
    return ()


def always(call: Call) -> bool:
    """For operators whose result always depends on how many channels there are."""
    return True


def never(call: Call) -> bool:
    """For operators that treat every channel by itself."""
    return False


@dataclass(frozen=True)
class Operator:
    """What is known of one operator.

    Attributes:
        rule: How labels flow through it.
        role: "norm", "activation" or "layout" where it may stand between a layer and the next one that reads it.
        counts: Whether what it computes depends on how many channels there are: a mean over channels, say. The oracle
            runs such a call on the channels that stay.
        sizes: The numbers in a call that count channels, asked once the rule has run.
        idle: The numbers that its result does not depend on, each by argument and position.
    """

    rule: Rule
    role: Role = ""
    counts: Counting = never
    sizes: Sizes = _no_sizes
    idle: Idle = frozenset()


_OPERATORS: dict[str, Operator] = {}


def operator(
    *names: str, role: Role = "", counts: Counting = never, sizes: Sizes = _no_sizes, idle: Idle = frozenset()
) -> Callable[[Rule], Rule]:
    """Describes ATen operators by their rule.

    Args:
        *names: "conv2d" covers all overloads and the in-place form, "max.dim" that overload alone.
        role: See `Operator`.
        counts: See `Operator`.
        sizes: See `Operator`.
        idle: See `Operator`.

    Raises:
        ValueError: One of them is described already.
    """

    def register(rule: Rule) -> Rule:
        for name in names:
            if name in _OPERATORS:
                known = _OPERATORS[name].rule
                raise ValueError(f"operator {name!r} has a rule already, {known.__module__}.{known.__qualname__}")
            _OPERATORS[name] = Operator(rule, role, counts, sizes, idle)
        return rule

    return register


def operator_of(node: Node) -> Operator | None:
    """What is known of the operator that made a node; None for one without a rule, or none."""
    return _described(node.op)


def has_rule(op: str) -> bool:
    """Whether an operator, named with its overload, has a rule."""
    return _described(op) is not None


def _described(op: str) -> Operator | None:
    name = op.split(".")[0]
    return _OPERATORS.get(op) or _OPERATORS.get(name) or _OPERATORS.get(name.removesuffix("_"))


def role_of(node: Node) -> Role:
    """The role of the operator that made a node."""
    known = operator_of(node)
    return known.role if known else ""


def sizes_of(call: Call) -> Iterator[Size]:
    """The numbers in a call that count channels."""
    known = operator_of(call.node) if call.node.is_operator else None
    for size in known.sizes(call) if known else ():
        if size.labels.size:
            yield size


def known_operators() -> list[str]:
    """Names of all operators that have a rule."""
    return sorted(_OPERATORS)


def flat(labels: Any) -> list[Labels]:
    """The labels in one node's value, which may be one, a list, or nothing."""
    if isinstance(labels, Labels):
        return [labels]
    return [item for item in labels or () if isinstance(item, Labels)]


def out_sizes(argument: str, first: int = 0) -> Sizes:
    """For operators that are told the sizes of their result: those that count channels.

    Args:
        argument: Name of the argument that lists the sizes.
        first: The dimension of the result that the first of them is.
    """

    def sizes(call: Call) -> Iterator[Size]:
        for labels in call.results[:1]:
            for index, size in enumerate(call[argument]):
                line = labels.along(first + index) if type(size) is int and size > 1 else None
                if line is not None and line.size == size:
                    yield Size(argument, index, line)

    return sizes


Integers = dict[str, "int | list[int]"]
Adapting = Callable[[Any, tuple[int, ...]], Integers]
"""From a module as it is and the new shape of its weight, the integers that it must hold then."""
ModuleKind = Literal["conv", "linear", "norm", "group_norm", "layer_norm", "embedding"]
_MODULES: dict[type[nn.Module], tuple[ModuleKind, Adapting]] = {}


def module_integers(kind: ModuleKind, *classes: type[nn.Module]) -> Callable[[Adapting], Adapting]:
    """Says which integers of a class of modules follow from the shape of its weight.

    Args:
        kind: What such modules are.
        *classes: Their classes.
    """

    def register(function: Adapting) -> Adapting:
        _MODULES.update(dict.fromkeys(classes, (kind, function)))
        return function

    return register


def adapting(module: nn.Module) -> tuple[ModuleKind, Adapting] | None:
    """The kind and the function of a module whose integers follow from its weight; None for any other."""
    if getattr(module, "weight", None) is None:
        return None
    return next((known for kind, known in _MODULES.items() if isinstance(module, kind)), None)
