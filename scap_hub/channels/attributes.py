"""Integers that modules hold for their forward pass, beyond those that follow from a weight's shape.

A graph shows the number that a reshape, split or slice was called with, and how many of these channels stay; not where
the number came from. If the forward pass reads it off a tensor's shape it adapts by itself. If it is an attribute of
the calling module (`width`, `head_dim`, `splits[1]`) the attribute must change. So a pruned copy without weights is
run: where it fails, the attributes of that module that held the number are tried, the same ones in all modules of its
class.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from scap_hub.channels.labels import Ids, support
from scap_hub.channels.modules import Layer
from scap_hub.channels.operators import Trace
from scap_hub.channels.operators.table import flat
from scap_hub.errors import PlanError
from scap_hub.graph.node import Node, each
from scap_hub.graph.record import Recorder, running, untouched
from scap_hub.plan import PruningPlan
from scap_hub.surgery import RESHAPE, apply_plan, set_attributes
from scap_hub.zoo.described import Features
from scap_hub.zoo.registry import zoo_of

_ENTERS = "what enters"
_MULTIPLES = tuple(map(Fraction, ("1", "2", "3", "4", "1/2", "1/3", "1/4")))


class StuckError(PlanError):
    """A pruned model that would not run, whatever attribute is changed."""

    def __init__(self, failed: tuple[str, ...], message: str) -> None:
        place = failed[0] or "the model's forward()"
        super().__init__(
            f"the pruned model would not run: {message} in {place!r}, which works with a fixed number of channels; "
            "protect it, or report the model"
        )
        self.failed = failed


Place = tuple[str, str, int | None]
"""Module path, attribute, index into it if it is a list."""

Choice = frozenset[tuple[Any, ...]]
"""Attributes that change in every module of a class: class, attribute, multiple of the number in the graph, role; or
else class, `RESHAPE`, rank and dimension."""


@dataclass(frozen=True, eq=False)
class Integer:
    """A number in the forward pass that counts channels.

    Attributes:
        place: Where a module holds it.
        channels: The channels that it counts; how many stay of them is the new number.
        times: The held number is this multiple of the one in the graph.
        role: What the call uses the number for; one that is equal by chance has another role.
    """

    place: Place
    channels: np.ndarray
    times: Fraction
    role: str

    @property
    def use(self) -> tuple[str, Fraction, str]:
        """Attribute, multiple and role: what modules of one class have in common."""
        return self.place[1], self.times, self.role


@dataclass(eq=False)
class Forward:
    """What it takes to try a plan without weights.

    Attributes:
        model: A copy of the model, on the meta device wherever it runs there.
        inputs: The example's tensors on that device.
        outputs: Shapes of the model's outputs.
        integers: Attributes that may have to change.
        counted: The channels that are counted by a number in the graph, with the path of the module that does it.
        found: The trace of the model.
        channel_of: The channel number of each of its ids.
        reshapes: Modules that reshape, with how many sizes they give and which one may come from another tensor.
        chosen: What turned out to have to change.
        features: The dense model's, once somebody asked.
    """

    model: nn.Module
    inputs: tuple[Any, ...]
    outputs: tuple[tuple[int, ...], ...]
    integers: tuple[Integer, ...]
    counted: tuple[tuple[str, np.ndarray], ...]
    found: Trace
    channel_of: np.ndarray
    reshapes: tuple[tuple[str, int, int], ...] = ()
    chosen: Choice = field(default_factory=frozenset)
    features: Features | None = None

    @functools.cached_property
    def entering(self) -> list[tuple[str, np.ndarray]]:
        """The channels that come into each module, with its path."""
        own = {path for path, kind in self.kinds.items() if not kind.__module__.startswith("torch.nn")}
        sources = {
            (path, source): None
            for node in self.found.ids
            for source in node.sources
            if source.varies
            for path in {path for _, path in node.calls} - {path for _, path in source.calls}
            if path in own
        }
        return [
            (path, self.channel_of[line])
            for path, source in sources
            for ids in flat(self.found.ids[source])
            for _, line in ids.lines()
        ]

    @functools.cached_property
    def widths(self) -> list[Integer]:
        """Attributes that hold the width of what enters their module."""
        modules = dict(self.model.named_modules())
        return [
            Integer(place, channels, Fraction(1), _ENTERS)
            for path, channels in self.entering
            for place in _integers(path, modules[path], Fraction(channels.size))
        ]

    @functools.cached_property
    def kinds(self) -> dict[str, type]:
        """The class of every module, by path."""
        return {path: type(module) for path, module in self.model.named_modules()}


def forward_of(
    model: nn.Module, inputs: tuple[Any, ...], found: Trace, channel_of: np.ndarray, layers: Iterable[Layer]
) -> Forward:
    """Collects the integers of a model's forward pass that count channels, beyond those of standard layers.

    Args:
        model: On the meta device.
        inputs: On the meta device.
        found: The trace of the model.
        channel_of: The channel number of each of its ids.
        layers: The modules whose integers follow from their weights.
    """
    modules = dict(model.named_modules())
    standard = {layer.path for layer in layers if layer.kind != "group_norm"}
    counted = [
        (node, old, channel_of[ids], role)
        for node in found.ids
        if node.owner not in standard
        for old, ids, role in _counts(node, found)
    ]
    return Forward(
        model=model,
        inputs=inputs,
        outputs=tuple(ids.shape for ids in found.outputs),
        integers=tuple(integer for number in counted for integer in _held(*number, modules)),
        counted=tuple((node.owner, channels) for node, _, channels, _ in counted),
        found=found,
        channel_of=channel_of,
        reshapes=tuple(dict.fromkeys(place for node in found.ids for place in _reshapes(node, modules))),
    )


def solve_integers(forward: Forward, plan: PruningPlan, keep: np.ndarray) -> dict[str, dict[str, int | list[int]]]:
    """Attributes that must change so that the pruned model runs, beside those that the plan already has.

    Args:
        forward: The model without weights; remembers what it took.
        plan: The plan so far.
        keep: Of every channel, whether it stays.

    Raises:
        StuckError: No choice makes it run.
    """
    changing, kinds = [integer for integer in forward.integers if not keep[integer.channels].all()], forward.kinds
    trial = _Trial(forward, plan, keep)

    def run(chosen: Choice) -> _Outcome:
        return trial(_values(forward, changing, keep, kinds, chosen))

    chosen = forward.chosen
    outcome = run(chosen)
    while outcome.failed is not None:
        attempts = (chosen | own for own in _all_attempts(forward, changing, outcome.failed))
        better = next(((result, own) for own in attempts if (result := run(own)).finished > outcome.finished), None)
        if better is None:
            raise StuckError(outcome.failed, outcome.message)
        outcome, chosen = better
    forward.chosen |= chosen
    return _values(forward, changing, keep, kinds, chosen)


def new_widths(forward: Forward, plan: PruningPlan, keep: np.ndarray) -> dict[str, dict[str, Any]]:
    """The numbers that describe a model's widths to other code, where a plan that runs changes them.

    A class of modules whose forward pass reads such a number, and means something else by it, keeps its own.
    """
    zoo = zoo_of(forward.model)
    if forward.features is None:
        forward.features = zoo.features(forward.model, forward.inputs)
    trial = _Trial(forward, plan, keep)
    values = zoo.widths(forward.model, forward.features, zoo.features(trial.small, forward.inputs))
    for path, known in plan.attributes.items():
        values[path] = {name: value for name, value in values.get(path, {}).items() if name not in known}
    while (failed := trial(values).failed) is not None:
        kind = next(forward.kinds[path] for path in failed if values.get(path))
        for path in values:
            if forward.kinds[path] is kind:
                values[path] = {}
    return {path: own for path, own in values.items() if own}


def shared_numbers(forward: Forward, failed: Sequence[str], free: np.ndarray) -> dict[str, list[np.ndarray]]:
    """Channels that one number counts in several places of one module: they must stay equally many.

    The number is an attribute of the module, or the width of what enters it.

    Args:
        forward: Where the numbers are.
        failed: The modules around a failure, innermost first.
        free: Of every channel, whether it can still be pruned; beside one that cannot, nothing is gained.

    Returns:
        For each such number, in all modules of the classes that failed, the channels of its places.
    """
    kinds = forward.kinds
    blamed = {path for path, kind in kinds.items() if kind is kinds[failed[0]]}
    shared: dict[str, dict[bytes, np.ndarray]] = {}

    def place(name: str, channels: np.ndarray) -> None:
        shared.setdefault(name, {})[np.sort(channels).tobytes()] = channels

    for integer in forward.integers:
        path, name, index = integer.place
        if path in blamed and integer.times == 1:
            place(f"{path}.{name}" + ("" if index is None else f"[{index}]"), integer.channels)
    entering = {(path, channels.size) for path, channels in forward.entering if path in blamed}
    for path, channels in (*forward.entering, *forward.counted):
        if (path, channels.size) in entering:
            place(f"what enters {path}", channels)
    alike = {name: list(places.values()) for name, places in shared.items()}
    return {
        name: places
        for name, places in alike.items()
        if len({len(place) for place in places}) == 1 < len(places) and free[np.concatenate(places)].all()
    }


def stuck_channels(
    forward: Forward, tensors: Mapping[str, Ids], failed: Sequence[str], free: np.ndarray
) -> dict[str, np.ndarray]:
    """What to pin after a failure, as little as possible: what a number counts, or else what passes the parameters.

    Modules of one class run the same code: what is stuck in one is pinned in all of them.

    Args:
        forward: Where the numbers are.
        tensors: Channel numbers of the model's tensors.
        failed: The modules around the failure, innermost first.
        free: Of every channel, whether it can still be pruned.

    Returns:
        Free channels by the path of the module to blame.
    """
    passing = [(name, layer.reshape(-1)) for name, ids in tensors.items() for layer in ids.layers]
    kinds = forward.kinds
    for places, nested in ((forward.counted, False), (forward.counted, True), (passing, True)):
        for path in failed:
            alike = [path]
            if places is forward.counted and not kinds[path].__module__.startswith("torch.nn"):
                alike = [other for other, kind in kinds.items() if kind is kinds[path]]
            stuck = {other: _inside(other, places, nested, free) for other in alike}
            if stuck[path].size:
                return {other: channels for other, channels in stuck.items() if channels.size}
    raise AssertionError("a model of which nothing can be pruned runs as it did")


def _inside(path: str, places: Iterable[tuple[str, np.ndarray]], nested: bool, free: np.ndarray) -> np.ndarray:
    """The free channels of the places at a path, or also below it."""
    prefix = f"{path}." if path else ""
    own = [channels for place, channels in places if place == path or (nested and f"{place}.".startswith(prefix))]
    channels = np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *own]))
    return channels[free[channels]]


def _counts(node: Node, found: Trace) -> Iterator[tuple[int, np.ndarray, str]]:
    """Numbers that a call was given and that count channels, with the ids that they count and their role in it."""
    if not node.is_operator:
        return
    name, arguments = node.name, node.arguments
    own = flat(found.ids.get(node))
    if name in ("view", "reshape", "expand", "unflatten", "_unsafe_view", "repeat", "new_zeros"):
        sizes = arguments.get("size") or arguments.get("shape") or arguments.get("sizes") or ()
        first = arguments["dim"] % len(own[0].shape) if name == "unflatten" else 0
        for dim, size in enumerate(sizes, start=first):
            if isinstance(size, int) and size > 1:
                yield from _line(size, own[0], dim, f"{name} to {len(sizes)} sizes: {dim}")
    elif name in ("split_with_sizes", "split"):
        whole = flat(found.ids[arguments["self"]])[0]
        # The last size is often written as the whole less the others.
        for part in [*own, whole] if name == "split_with_sizes" else own[:1]:
            dim = arguments["dim"] % len(part.shape)
            yield from _line(part.shape[dim], part, dim, name)
    elif name in ("slice", "narrow"):
        whole = flat(found.ids[arguments["self"]])[0]
        dim = arguments["dim"] % len(whole.shape)
        start = arguments["start"] or 0
        end = start + arguments["length"] if name == "narrow" else min(arguments["end"], whole.shape[dim])
        if (ids := whole.along(dim)) is not None:
            for bound in (start, end if end < ids.size or name == "slice" else 0):
                if bound:
                    yield bound % ids.size or ids.size, ids[:bound], name
    elif name in ("conv1d", "conv2d", "conv3d"):
        whole = flat(found.ids[arguments["input"]])[0]
        if 1 < arguments["groups"] == whole.shape[1]:
            yield from _line(arguments["groups"], whole, 1, name)
    elif name in ("layer_norm", "rms_norm"):
        for offset, size in enumerate(reversed(arguments["normalized_shape"]), start=1):
            yield from _line(size, own[0], -offset, name)
    elif name == "group_norm" and arguments["num_groups"] == own[0].shape[1]:
        yield from _line(arguments["num_groups"], own[0], 1, name)


def _reshapes(node: Node, modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, int, int]]:
    """The module that reshapes, with how many sizes it gives and each that may come from another tensor, last first."""
    path = node.owner
    if node.target in (torch.ops.aten.view.default, torch.ops.aten.reshape.default) and path:
        sizes = node.args[1]
        if not type(modules[path]).__module__.startswith("torch.nn") and -1 not in sizes:
            yield from ((path, len(sizes), dim) for dim in reversed(range(1, len(sizes))))


def _line(size: int, ids: Ids, dim: int, role: str) -> Iterator[tuple[int, np.ndarray, str]]:
    if (line := ids.along(dim)) is not None and line.size == size:
        yield size, line, role


def _held(node: Node, old: int, channels: np.ndarray, role: str, modules: dict[str, nn.Module]) -> Iterator[Integer]:
    """Attributes of the calling module and of those around it that hold the number, or else a small multiple."""
    for _, path in node.calls:
        for times in _MULTIPLES:
            places = list(_integers(path, modules[path], old * times)) if old * times > 1 else []
            yield from (Integer(place, channels, times, role) for place in places)
            if places:
                break


def _integers(path: str, module: nn.Module, value: Fraction) -> Iterator[Place]:
    for name, held in vars(module).items():
        if type(held) is int and held == value:
            yield path, name, None
        elif isinstance(held, list | tuple) and all(type(item) is int for item in held):
            yield from ((path, name, index) for index, item in enumerate(held) if item == value)


def _all_attempts(forward: Forward, changing: Sequence[Integer], failed: Sequence[str]) -> Iterator[Choice]:
    """What may have to change after a failure in these modules, the likely first."""
    kinds = forward.kinds
    for path in failed:
        yield from _attempts(changing, kinds, path)
        yield from _other_reshapes(forward, kinds, path)
    for path in failed:
        uses = dict.fromkeys((kinds[path], *width.use) for width in forward.widths if width.place[0] == path)
        yield from (frozenset([use]) for use in uses)


def _attempts(changing: Sequence[Integer], kinds: Mapping[str, type], path: str) -> Iterator[Choice]:
    """Attributes of a module that may have to change: one use of one, one alone, all together, two at a time."""
    uses = sorted({(kinds[path], *integer.use) for integer in changing if integer.place[0] == path}, key=str)
    yield from (frozenset([use]) for use in uses)
    names = sorted({use[1:3] for use in uses})
    wholes = [frozenset(use for use in uses if use[1:3] == name) for name in names]
    yield from (whole for whole in wholes if len(whole) > 1)
    if len(names) > 1:
        exact = frozenset(use for use in uses if use[2] == 1)  # not a multiple of another number by chance
        yield from dict.fromkeys([exact, frozenset(uses)])
    if len(names) > 2:
        yield from (one | other for one, other in itertools.combinations(wholes, 2))


def _other_reshapes(forward: Forward, kinds: Mapping[str, type], path: str) -> Iterator[Choice]:
    """Sizes of a module's reshapes that may have been read off another tensor."""
    for place, rank, dim in forward.reshapes:
        if place == path:
            yield frozenset([(kinds[path], RESHAPE, rank, dim)])


def _values(
    forward: Forward, changing: Sequence[Integer], keep: np.ndarray, kinds: Mapping[str, type], chosen: Choice
) -> dict[str, dict[str, Any]]:
    values: dict[str, dict[str, Any]] = {}
    for integer in (*changing, *(forward.widths if any(use[-1] == _ENTERS for use in chosen) else ())):
        path, name, index = integer.place
        if (kinds[path], *integer.use) not in chosen:
            continue
        new = int(int(keep[integer.channels].sum()) * integer.times)
        if index is None:
            values.setdefault(path, {})[name] = new
        else:
            module = forward.model.get_submodule(path)
            values.setdefault(path, {}).setdefault(name, list(getattr(module, name)))[index] = new
    for path, rank, dim in forward.reshapes:
        if (kinds[path], RESHAPE, rank, dim) in chosen:
            places = values.setdefault(path, {}).setdefault(RESHAPE, [])
            places += [rank, dim] if rank not in places[::2] else []
    return values


@dataclass(frozen=True)
class _Outcome:
    """How many operators did as they should, the modules around the failure (innermost first), and why."""

    finished: float
    failed: tuple[str, ...] | None = None
    message: str = ""


class _Checked(Recorder):
    """Runs a pruned model and stops at the first operator that does not do what the channels say."""

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...], expected: list[_Step]) -> None:
        super().__init__(model, inputs)
        self.expected = expected
        self.finished = 0

    def made(self, node: Node, value: Any) -> None:
        target, shape, numbers = self.expected[self.finished] if self.finished < len(self.expected) else (None,) * 3
        if node.target is not target:
            raise RuntimeError(f"{node.target} runs instead of {target}")
        if _numbers(node) != numbers:
            raise RuntimeError(f"{node.target} computes with {_numbers(node)} instead of {numbers}")
        if shape is not None and shape != tuple(value.shape):
            raise RuntimeError(f"{node.target} makes shape {list(value.shape)} instead of {list(shape)}")
        self.finished += 1


_Step = tuple[Any, tuple[int, ...] | None, list[float] | None]
"""An operator, the shape that it has to make where that is known, and the numbers that it computes with."""

_ARITHMETIC = ("add", "sub", "rsub", "mul", "div", "true_divide", "pow")


def _numbers(node: Node) -> list[float]:
    """A scale that follows the number of channels would make another function."""
    kinds = (int, float) if node.name in _ARITHMETIC else (float,)
    return [leaf for leaf in each((*node.args, *node.kwargs.values())) if type(leaf) in kinds]


def _steps(forward: Forward, keep: np.ndarray) -> list[_Step]:
    stays = keep[forward.channel_of]
    return [
        (node.target, _shape(ids, stays) if isinstance(ids, Ids) and ids.layers else None, _numbers(node))
        for node, ids in forward.found.ids.items()
        if node.target is not None
    ]


def _shape(ids: Ids, stays: np.ndarray) -> tuple[int, ...] | None:
    shape = list(ids.shape)
    for layer in ids.layers:
        dims = support(layer)
        if len(dims) > 1:
            return None
        for dim in dims:
            shape[dim] = int(stays[layer].sum())
    return tuple(shape)


class _Trial:
    """A pruned model without weights, run with one set of attributes after another."""

    def __init__(self, forward: Forward, plan: PruningPlan, keep: np.ndarray) -> None:
        self.forward = forward
        self.small = apply_plan(forward.model, plan)
        self.steps = _steps(forward, keep)

    def __call__(self, values: dict[str, dict[str, Any]]) -> _Outcome:
        recorder = _Checked(self.small, self.forward.inputs, self.steps)
        try:
            with untouched(self.small):
                set_attributes(self.small, values)
                output = recorder.run()
        except Exception as error:
            message = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            return _Outcome(recorder.finished, tuple(running(self.small, error)), message)
        shapes = tuple(tuple(leaf.shape) for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))
        if shapes != self.forward.outputs:
            return _Outcome(recorder.finished, ("",), f"outputs of shapes {shapes} instead of {self.forward.outputs}")
        return _Outcome(float("inf"))
