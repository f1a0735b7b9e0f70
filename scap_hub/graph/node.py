"""A forward pass as the operators that it called."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from scap_hub.private import OpOverload, schema


class Site(NamedTuple):
    """A call of a torch function in a module's forward pass, as its source code has it.

    Attributes:
        function: Name of the function, such as "view" or "__getitem__".
        number: The how manyth call of that function in this call of the module, from 1; calls by the modules inside
            count too.
        numbers: The numbers among its arguments, in order, those in lists and slices too.
    """

    function: str
    number: int
    numbers: tuple[int | float, ...]


@dataclass(eq=False, repr=False)
class Node:
    """One value of a forward pass: what an operator returned, or a tensor that was there before.

    Attributes:
        target: The ATen operator; `operator.getitem` for one of several results; None for a tensor that was there.
        args: The operator's positional arguments, with nodes in the place of tensors.
        kwargs: Its keyword arguments, likewise.
        value: A tensor on the meta device, or a list of them, or a number.
        calls: The calls of modules that were running, outermost first: a number that no other call has, and a path.
        varies: Whether it depends on the model's inputs.
        tensor: The tensor itself, if it was there before.
        state: Its name, if it is a parameter or buffer.
        numbers: Values of a buffer of channel numbers, (n,), where they are known.
        site: The call of a torch function that made it, if the forward pass made one.
        sources: The nodes that this one reads, each once.
        users: The nodes that read this one, each once.
    """

    target: Any = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    value: Any = None
    calls: tuple[tuple[int, str], ...] = ()
    varies: bool = False
    tensor: Tensor | None = None
    state: str | None = None
    numbers: np.ndarray | None = None
    site: Site | None = None
    sources: list[Node] = field(init=False)
    users: list[Node] = field(default_factory=list, init=False)

    def __repr__(self) -> str:
        return f"<{self.state or self.op} {tuple(getattr(self.value, 'shape', ()))} in {self.owner!r}>"

    def __post_init__(self) -> None:
        read = [leaf for leaf in each((*self.args, *self.kwargs.values())) if isinstance(leaf, Node)]
        self.sources = list(dict.fromkeys(read))
        for source in self.sources:
            source.users.append(self)

    @property
    def op(self) -> str:
        """The ATen operator with its overload: "conv2d.default"."""
        return op_of(self.target)

    @property
    def name(self) -> str:
        """The operator without overload; the same for the in-place form."""
        return self.op.partition(".")[0].removesuffix("_")

    @property
    def is_operator(self) -> bool:
        """Whether an ATen operator made it, whose arguments have names."""
        return isinstance(self.target, OpOverload)

    @functools.cached_property
    def arguments(self) -> Mapping[str, Any]:
        """All arguments by the names of the operator's schema, defaults filled in."""
        defaults = _defaults(self.target)
        return {**defaults, **dict(zip(defaults, self.args, strict=False)), **self.kwargs}

    @property
    def owner(self) -> str:
        """Path of the innermost module whose forward pass made this node."""
        return self.calls[-1][1] if self.calls else ""


@functools.cache
def op_of(target: Any) -> str:
    """The name of an ATen operator with its overload: "conv2d.default"."""
    return str(target).removeprefix("aten.")


@functools.cache
def _defaults(target: Any) -> dict[str, Any]:
    return {argument.name: argument.default_value for argument in schema(target).arguments}


def numbers_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[int | float]:
    """The numbers among the arguments of a call, in order, those in lists, tuples and slices too."""
    for value in (*args, *kwargs.values()):
        if type(value) in (int, float):
            yield value
        elif isinstance(value, list | tuple):
            yield from numbers_in(tuple(value), {})
        elif isinstance(value, slice):
            yield from numbers_in((value.start, value.stop, value.step), {})


Form = tuple[tuple[str, ...], tuple[int | None, ...]]
"""Names of the keyword arguments of a call, and how long each argument is that is a list."""


def each(values: Sequence[Any]) -> Iterator[Any]:
    """The arguments of an operator; lists of them item by item."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from value
        else:
            yield value


def mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """An argument, or each item of a list of them, after a function."""
    return [function(item) for item in value] if isinstance(value, list | tuple) else function(value)


def flattened(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Form, list[Any]]:
    """The arguments of a call as one list, and what `rebuilt` needs to know."""
    values = (*args, *kwargs.values())
    sizes = tuple(len(value) if isinstance(value, list | tuple) else None for value in values)
    return (tuple(kwargs), sizes), list(each(values))


def rebuilt(form: Form, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call with these leaves."""
    names, sizes = form
    rest = iter(leaves)
    values = [next(rest) if size is None else list(itertools.islice(rest, size)) for size in sizes]
    first = len(values) - len(names)
    return tuple(values[:first]), dict(zip(names, values[first:], strict=True))
