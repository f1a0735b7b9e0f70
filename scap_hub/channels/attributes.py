"""Numbers in a forward pass that must follow the channels, beyond those that follow from a weight's shape.

A graph shows the number that a reshape, split or slice was called with, and how many of these channels stay; not where
the number came from. If the forward pass reads it off a tensor's shape it adapts by itself. If it is an attribute of
the calling module (`width`, `head_dim`, `splits[1]`) the attribute must change. If it is written into the code, the
call must get another one. So a pruned copy without weights is run: where it fails, the attributes of that module that
held the number are tried, the same ones in all modules of its class, and then the call itself.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from scap_hub.channels.operators import Call, flat, sizes_of
from scap_hub.channels.partition import Partition
from scap_hub.channels.proof import Number, Outcome, Run, expected_numbers, prove
from scap_hub.errors import PlanError
from scap_hub.graph.modes import untouched
from scap_hub.graph.node import Node
from scap_hub.plan import CallNumber, PruningPlan
from scap_hub.surgery import CHANGEABLE, apply_plan, earlier_numbers, set_attributes, set_calls
from scap_hub.zoo.described import Features
from scap_hub.zoo.registry import zoo_of

_ENTERS = "what enters"
_MULTIPLES = tuple(map(Fraction, ("1", "2", "3", "4", "1/2", "1/3", "1/4")))


class StuckError(PlanError):
    """A pruned model that would not run, whatever attribute is changed."""

    def __init__(self, failed: tuple[str, ...], message: str) -> None:
        place = failed[0] or "the model's forward()"
        super().__init__(
            f"the pruned model would not compute the same: {message} in {place!r}, which works with a fixed number of "
            "channels; protect it, or report the model"
        )
        self.failed = failed


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

    @functools.cached_property
    def features(self) -> Features:
        """Shapes of what the dense model makes."""
        return zoo_of(self.model).features(self.model, self.inputs)

    @functools.cached_property
    def entering(self) -> list[tuple[str, np.ndarray]]:
        """The channels that come into each module of somebody's own, with its path."""
        found = self.runs[0].found
        owners = {path for path, kind in self.kinds.items() if not _is_torchs(kind)}
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
        modules = dict(self.model.named_modules())
        return [
            Integer(path, name, index, channels, Fraction(1), _ENTERS)
            for path, channels in self.entering
            for name, index in _places(modules[path], Fraction(channels.size))
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
    modules = dict(model.named_modules())
    standard = {
        layer.path
        for layer in partition.modules
        if layer.weight in partition.tensors and not isinstance(layer.module, nn.GroupNorm)
    }
    counted = [
        (node, size.labels.size, partition.channel_of[size.labels], f"{node.name}: {size.argument} {size.item}")
        for run in runs
        for node in run.captured.called
        if node.owner not in standard
        for size in sizes_of(Call(node, run.found))
    ]
    integers = tuple(integer for number in counted for integer in _held(*number, modules))
    return Forward(model, inputs, runs, partition, integers, tuple((node.owner, own) for node, _, own, _ in counted))


def completed(forward: Forward, plan: PruningPlan, stays: np.ndarray) -> tuple[PruningPlan, Choice]:
    """The plan with all numbers that must change so that the pruned model computes what is left of the dense one.

    Args:
        forward: The model without weights.
        plan: What is cut, and the integers that follow from shapes.
        stays: Of every channel, whether it stays.

    Returns:
        The plan, proven; and the choice that it took.

    Raises:
        StuckError: No choice makes it compute the same.
    """
    trial = _Trial(forward, plan, stays)
    chosen = forward.chosen
    outcome = trial(chosen)
    while outcome.failed is not None:
        attempts = (chosen | own for own in _all_attempts(forward, stays, outcome))
        better = next(((result, own) for own in attempts if (result := trial(own)).finished > outcome.finished), None)
        if better is None:
            raise StuckError(outcome.failed, outcome.message)
        outcome, chosen = better
    return trial.completed(chosen), chosen


def described(forward: Forward, plan: PruningPlan, stays: np.ndarray) -> PruningPlan:
    """The plan with the numbers that describe a model's widths to other code, where a plan that runs changes them.

    A class of modules whose forward pass reads such a number, and means something else by it, keeps its own.
    """
    zoo, small = zoo_of(forward.model), apply_plan(forward.model, plan)
    values = zoo.widths(forward.model, forward.features, zoo.features(small, forward.inputs))
    for path, known in plan.attributes.items():
        values[path] = {name: value for name, value in values.get(path, {}).items() if name not in known}
    labels = stays[forward.partition.channel_of]
    while values:
        with untouched(small):
            set_attributes(small, values)
            outcome = prove(small, forward.inputs, forward.runs, labels)
        if outcome.failed is None:
            break
        blamed = next((forward.kinds[path] for path in outcome.failed if values.get(path)), None)
        # Whatever fails without being one of the blamed: nothing is described then.
        values = {path: own for path, own in values.items() if blamed and forward.kinds[path] is not blamed}
    merged = {path: dict(own) for path, own in plan.attributes.items()}
    for path, own in values.items():
        if own:
            merged.setdefault(path, {}).update(own)
    return plan.model_copy(update={"attributes": merged})


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
        if integer.path in blamed and integer.times == 1:
            suffix = "" if integer.index is None else f"[{integer.index}]"
            place(f"{integer.path}.{integer.name}{suffix}", integer.channels)
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


def stuck_channels(forward: Forward, failed: Sequence[str], free: np.ndarray) -> dict[str, np.ndarray]:
    """What to pin after a failure, as little as possible: what a number counts, or else what passes the parameters.

    Modules of one class run the same code: what is stuck in one is pinned in all of them.

    Args:
        forward: Where the numbers are.
        failed: The modules around the failure, innermost first.
        free: Of every channel, whether it can still be pruned.

    Returns:
        Free channels by the path of the module to blame; none if nothing can be blamed.
    """
    tensors = forward.partition.tensors
    passing = [(name, array.reshape(-1)) for name, labels in tensors.items() for array in labels.arrays]
    kinds = forward.kinds
    for places, nested in ((forward.counted, False), (forward.counted, True), (passing, True)):
        for path in failed:
            alike = [path]
            if places is forward.counted and not _is_torchs(kinds[path]):
                alike = [other for other, kind in kinds.items() if kind is kinds[path]]
            stuck = {other: _inside(other, places, nested, free) for other in alike}
            if stuck[path].size:
                return {other: channels for other, channels in stuck.items() if channels.size}
    return {}


def _inside(path: str, places: Iterable[tuple[str, np.ndarray]], nested: bool, free: np.ndarray) -> np.ndarray:
    """The free channels of the places at a path, or also below it."""
    prefix = f"{path}." if path else ""
    own = [channels for place, channels in places if place == path or (nested and f"{place}.".startswith(prefix))]
    channels = np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *own]))
    return channels[free[channels]]


def _is_torchs(kind: type) -> bool:
    return kind.__module__.startswith("torch.nn")


def _held(node: Node, old: int, channels: np.ndarray, role: str, modules: dict[str, nn.Module]) -> Iterator[Integer]:
    """Attributes of the calling module and of those around it that hold the number, or else a small multiple."""
    for _, path in node.calls:
        for times in _MULTIPLES:
            places = list(_places(modules[path], old * times)) if old * times > 1 else []
            yield from (Integer(path, name, index, channels, times, role) for name, index in places)
            if places:
                break


def _places(module: nn.Module, value: Fraction) -> Iterator[tuple[str, int | None]]:
    """Attributes of a module that hold a value; the index of an item for lists."""
    for name, held in vars(module).items():
        if type(held) is int and held == value:
            yield name, None
        elif isinstance(held, list | tuple) and all(type(item) is int for item in held):
            yield from ((name, index) for index, item in enumerate(held) if item == value)


def _all_attempts(forward: Forward, stays: np.ndarray, outcome: Outcome) -> Iterator[Choice]:
    """What may have to change after a failure, the likely first."""
    assert outcome.failed is not None
    for path in outcome.failed:
        changing = [own for own in forward.integers if own.path == path and not stays[own.channels].all()]
        yield from _attempts(forward.kinds[path], changing)
    yield from _calls(forward.kinds, outcome.wrong)
    for path in outcome.failed:
        uses = [_use(forward.kinds[path], width) for width in forward.widths if width.path == path]
        yield from (frozenset([use]) for use in dict.fromkeys(uses))


def _use(kind: type, integer: Integer) -> AttributeUse:
    return AttributeUse(kind, integer.name, integer.times, integer.role)


def _attempts(kind: type, changing: Sequence[Integer]) -> Iterator[Choice]:
    """Attributes of a module that may have to change: one use of one, one alone, all together, two at a time."""
    uses = sorted({_use(kind, integer) for integer in changing}, key=str)
    yield from (frozenset([use]) for use in uses)
    names = sorted({(use.name, use.times) for use in uses})
    wholes = [frozenset(use for use in uses if (use.name, use.times) == name) for name in names]
    yield from (whole for whole in wholes if len(whole) > 1)
    if len(names) > 1:
        exact = frozenset(use for use in uses if use.times == 1)  # not a multiple of another number by chance
        yield from dict.fromkeys([exact, frozenset(uses)])
    if len(names) > 2:
        yield from (one | other for one, other in itertools.combinations(wholes, 2))


def _calls(kinds: Mapping[str, type], wrong: Sequence[Number]) -> Iterator[Choice]:
    """The numbers in the failing call's own arguments that may have to change: all at once, or one of them."""
    options = [list(_positions(kinds, number)) for number in wrong]
    if options and all(options):
        for uses in itertools.islice(itertools.product(*options), 16):
            yield frozenset(uses)
    yield from (frozenset([use]) for uses in options for use in uses)


def _positions(kinds: Mapping[str, type], number: Number) -> Iterator[CallUse]:
    """Where the torch function that was called has a number."""
    site = number.node.site
    if site is None or site.function not in CHANGEABLE:
        return
    places = [position for position, value in enumerate(site.numbers) if value == number.dense]
    # A list of as many numbers stands in the same order.
    places.sort(key=lambda position: position != number.index)
    for position in places:
        yield CallUse(kinds[number.node.owner], site.function, site.number, position, number.argument, number.index)


class _Arrival:
    """Stands for any number, and remembers which ones were compared with it."""

    def __init__(self) -> None:
        self.numbers: set[float] = set()

    def __ne__(self, other: object) -> bool:
        self.numbers.add(other)  # type: ignore[arg-type]
        return False

    __hash__ = None  # type: ignore[assignment]


class _Trial:
    """A pruned model without weights, run with one choice after another."""

    def __init__(self, forward: Forward, plan: PruningPlan, stays: np.ndarray) -> None:
        self.forward, self.plan, self.stays = forward, plan, stays
        self.small = apply_plan(forward.model, plan)
        self.labels = stays[forward.partition.channel_of]
        self.arrivals: dict[tuple[str, str, int, int], _Arrival] = {}

    def __call__(self, chosen: Choice) -> Outcome:
        with untouched(self.small):
            set_attributes(self.small, self._attributes(chosen))
            self.arrivals = {}
            for path, changes in self._calls(chosen).items():
                noted: list[Any] = []
                for function, call, position, new in changes:
                    arrival = self.arrivals.setdefault((path, function, call, position), _Arrival())
                    noted.append((function, call, position, arrival, new))
                set_calls(self.small, {path: noted})
            return prove(self.small, self.forward.inputs, self.forward.runs, self.labels)

    def completed(self, chosen: Choice) -> PruningPlan:
        """The plan with the numbers of the choice that was tried last."""
        attributes = {path: dict(own) for path, own in self.plan.attributes.items()}
        for path, values in self._attributes(chosen).items():
            attributes.setdefault(path, {}).update(values)
        calls: dict[str, list[CallNumber]] = {}
        for path, changes in self._calls(chosen).items():
            for function, call, position, new in changes:
                arrived = self.arrivals[path, function, call, position].numbers
                # Of a call that an earlier plan has changed, its number counts.
                arrived = arrived or earlier_numbers(self.small, path, (function, call, position))
                if len(arrived) > 1:
                    raise StuckError((path,), f"{function} is called with several numbers, {sorted(arrived)}")
                for old in arrived - {new}:
                    own = CallNumber(function=function, call=call, position=position, old=old, new=new)
                    calls.setdefault(path, []).append(own)
        return self.plan.model_copy(
            update={"attributes": attributes, "calls": {path: tuple(own) for path, own in calls.items()}}
        )

    def _attributes(self, chosen: Choice) -> dict[str, dict[str, Any]]:
        """New values of attributes, by module path."""
        kinds = self.forward.kinds
        values: dict[str, dict[str, Any]] = {}
        reads_width = any(isinstance(use, AttributeUse) and use.role == _ENTERS for use in chosen)
        entering = self.forward.widths if reads_width else ()
        for integer in (*self.forward.integers, *entering):
            if self.stays[integer.channels].all() or _use(kinds[integer.path], integer) not in chosen:
                continue
            new = int(int(self.stays[integer.channels].sum()) * integer.times)
            own = values.setdefault(integer.path, {})
            if integer.index is None:
                own[integer.name] = new
            else:
                module = self.forward.model.get_submodule(integer.path)
                own.setdefault(integer.name, list(getattr(module, integer.name)))[integer.index] = new
        return values

    def _calls(self, chosen: Choice) -> dict[str, list[tuple[str, int, int, float]]]:
        """New numbers in calls, by module path: function, call, position, number."""
        values: dict[str, dict[tuple[str, int, int], set[float]]] = {}
        for use in chosen:
            if isinstance(use, AttributeUse):
                continue
            for node, run in self.forward.sites.get((use.kind, use.function, use.call), ()):
                number = self._number(node, run, use)
                if number is not None:
                    own = values.setdefault(node.owner, {})
                    own.setdefault((use.function, use.call, use.position), set()).add(number)
        return {
            path: [(*place, next(iter(numbers))) for place, numbers in own.items() if len(numbers) == 1]
            for path, own in values.items()
        }

    def _number(self, node: Node, run: Run, use: CallUse) -> float | None:
        """What an argument of an operator must be in the pruned model; None if the operator has no such number."""
        for number in expected_numbers(Call(node, run.found), self.labels):
            if (number.argument, number.index) == (use.argument, use.item):
                return number.pruned
        value = node.arguments.get(use.argument)
        if use.item is not None:  # another branch of the same code may call it with a shorter list
            value = value[use.item] if isinstance(value, list | tuple) and use.item < len(value) else None
        return value if type(value) in (int, float) else None
