"""A model without weights, as it was recorded, with the numbers in its forward pass that count channels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from scap_hub.channels.operators import Call, flat, sizes_of
from scap_hub.channels.partition import Partition
from scap_hub.channels.proof import Run
from scap_hub.graph.node import Node
from scap_hub.plan import PruningPlan
from scap_hub.surgery import changeable, is_integer, narrower
from scap_hub.zoo.described import Features
from scap_hub.zoo.registry import zoo_of

ENTERS = "what enters"
_MULTIPLES = tuple(map(Fraction, ("1", "2", "3", "4", "1/2", "1/3", "1/4")))


class AttributeUse(NamedTuple):
    """An attribute that changes in every module of a class, where it counts channels in one role."""

    kind: type
    name: str
    times: Fraction
    role: str


class CallUse(NamedTuple):
    """A number in a call that changes in every module of a class: what the call's operator must get there."""

    kind: type
    function: str
    call: int
    position: int
    argument: str
    item: int | None


Choice = frozenset["AttributeUse | CallUse"]
"""What changes together."""


@dataclass(frozen=True, eq=False)
class Integer:
    """An integer that a module holds and that may count channels.

    Attributes:
        path: Of the module.
        name: Of the attribute.
        index: Into the attribute, if it is a list.
        channels: The channels that it counts; how many stay of them is the new number.
        times: The held number is this multiple of the one in the graph.
        role: What the call uses the number for; one that is equal by chance has another role.
    """

    path: str
    name: str
    index: int | None
    channels: np.ndarray
    times: Fraction
    role: str


@dataclass(frozen=True, eq=False)
class Forward:
    """What it takes to try a plan without weights.

    Attributes:
        model: A copy of the model, on the meta device wherever it runs there.
        inputs: The example's tensors on that device.
        runs: What was recorded of it.
        partition: Its channels.
        integers: Attributes that may have to change.
        counted: The channels that are counted by a number in the graph, with the path of the module that does it.
        chosen: What turned out to have to change when the groups were found.
    """

    model: nn.Module
    inputs: tuple[Any, ...]
    runs: tuple[Run, ...]
    partition: Partition
    integers: tuple[Integer, ...]
    counted: tuple[tuple[str, np.ndarray], ...]
    chosen: Choice = frozenset()

    @functools.cached_property
    def kinds(self) -> dict[str, type]:
        """The class of every module, by path."""
        return {path: type(module) for path, module in self.model.named_modules()}

    def narrower(self, plan: PruningPlan) -> Callable[[str], bool]:
        """Whether something shrinks at a module's path; attributes change nowhere else."""
        tensors = {
            **dict(self.model.named_parameters(remove_duplicate=False)),
            **dict(self.model.named_buffers(remove_duplicate=False)),
        }
        return narrower(self.model, {id(tensors[name]) for name in plan.tensors})

    @functools.cached_property
    def features(self) -> Features:
        """Shapes of what the dense model makes."""
        return zoo_of(self.model).features(self.model, self.inputs)

    @functools.cached_property
    def entering(self) -> list[tuple[str, np.ndarray]]:
        """The channels that come into each module of somebody's own, with its path."""
        found = self.runs[0].found
        owners = {path for path, kind in self.kinds.items() if not is_torchs(kind)}
        sources = {
            (path, source): None
            for node in self.runs[0].captured.called
            for source in node.sources
            if source.varies
            for path in {path for _, path in node.calls} - {path for _, path in source.calls}
            if path in owners
        }
        return [
            (path, self.partition.channel_of[line])
            for path, source in sources
            for labels in flat(found.labels[source])
            for _, line in labels.lines()
        ]

    @functools.cached_property
    def widths(self) -> list[Integer]:
        """Attributes that hold the width of what enters their module."""
        places = _Places(self.model)
        return [
            Integer(path, name, index, channels, Fraction(1), ENTERS)
            for path, channels in self.entering
            for name, index in places.of(path, channels.size)
        ]

    @functools.cached_property
    def sites(self) -> dict[tuple[type, str, int], list[tuple[Node, Run]]]:
        """Calls of torch functions by the class of the module, the function and the number of the call."""
        sites: dict[tuple[type, str, int], list[tuple[Node, Run]]] = {}
        for run in self.runs:
            for node in run.captured.called:
                if node.site and node.is_operator:
                    key = (self.kinds[node.owner], node.site.function, node.site.number)
                    sites.setdefault(key, []).append((node, run))
        return sites


def forward_of(model: nn.Module, inputs: tuple[Any, ...], runs: tuple[Run, ...], partition: Partition) -> Forward:
    """Collects the numbers of a model's forward pass that count channels, beyond those of standard layers.

    Args:
        model: On the meta device.
        inputs: On the meta device.
        runs: What was recorded of it, in eval mode first.
        partition: Its channels.
    """
    places = _Places(model)
    standard = {
        layer.path
        for layer in partition.modules
        if layer.weight in partition.tensors and not isinstance(layer.module, nn.GroupNorm)
    }
    counted = [
        (node, size, partition.channel_of[size.labels], f"{node.name}: {size.argument} {size.item}")
        for run in runs
        for node in run.captured.called
        if node.owner not in standard
        for size in sizes_of(Call(node, run.found))
    ]
    integers = tuple(
        integer
        for node, size, channels, role in counted
        if size.left_out is None
        for integer in _held(node, size.labels.size, channels, role, places)
    )
    return Forward(model, inputs, runs, partition, integers, tuple((node.owner, own) for node, _, own, _ in counted))


def _held(node: Node, old: int, channels: np.ndarray, role: str, places: _Places) -> Iterator[Integer]:
    """Attributes of the calling module and of those around it that hold the number, or else a small multiple."""
    for _, path in node.calls:
        for times in _MULTIPLES:
            held = places.of(path, old * times) if old * times > 1 else ()
            yield from (Integer(path, name, index, channels, times, role) for name, index in held)
            if held:
                break


class _Places:
    """Where the modules of a model hold which integers that may change."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.found: dict[str, dict[int | Fraction, list[tuple[str, int | None]]]] = {}

    def of(self, path: str, value: int | Fraction) -> Sequence[tuple[str, int | None]]:
        """Attributes of a module that hold a value; the index of an item for lists."""
        if path not in self.found:
            own = self.found[path] = {}
            for number, name, index in _integers(self.modules[path]):
                own.setdefault(number, []).append((name, index))
        return self.found[path].get(value, ())  # a fraction that is an integer hashes as that


def _integers(module: nn.Module) -> Iterator[tuple[int, str, int | None]]:
    """The integers in attributes of a module, with name and, in a list, index."""
    for name, held in vars(module).items():
        items = held if isinstance(held, list | tuple) else [held]
        if items and all(map(is_integer, items)) and changeable(module, name):
            yield from ((item, name, index if items is held else None) for index, item in enumerate(items))


def is_torchs(kind: type) -> bool:
    return kind.__module__.startswith("torch.nn")
