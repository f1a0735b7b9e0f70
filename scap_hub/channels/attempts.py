"""What may have to change, or must be held, after a pruned model without weights has failed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set

import numpy as np

from scap_hub.channels.forward import AttributeUse, CallUse, Choice, Forward, Integer, is_torchs
from scap_hub.channels.operators import Call
from scap_hub.channels.proof import Number, Outcome, expected_numbers
from scap_hub.surgery import CHANGEABLE, SCALES


def better(
    tried: Callable[[Choice], Outcome], forward: Forward, stays: np.ndarray, chosen: Choice, outcome: Outcome
) -> Choice | None:
    """A larger choice with which a pruned model comes further, if there is one.

    Args:
        tried: How far it comes with a choice.
        forward: Where the numbers are.
        stays: Of every channel, whether it stays.
        chosen: What changes already.
        outcome: How it fails with that.
    """

    def matters(more: Choice) -> bool:
        result = tried(chosen | more)
        return (result.finished, result.message) != (outcome.finished, outcome.message)

    larger = (chosen | more for more in _attempts(forward, stays, outcome, chosen, matters))
    return next((own for own in larger if tried(own).finished > outcome.finished), None)


def _attempts(
    forward: Forward, stays: np.ndarray, outcome: Outcome, chosen: Choice, matters: Callable[[Choice], bool]
) -> Iterator[Choice]:
    """What may have to change after a failure, the likely first.

    Args:
        forward: Where the numbers are.
        stays: Of every channel, whether it stays.
        outcome: The failure.
        chosen: What changes already.
        matters: Whether the failure is another one, or at another place, if this changes too.
    """
    assert outcome.failed is not None
    sized = {use.kind for use in chosen if isinstance(use, CallUse)}
    calls = list(_calls(forward.kinds, outcome.wrong, sized))
    # A class that computes one of its sizes in a call computes the others there, too; torch's attention computes all.
    kinds = {use.kind for choice in calls for use in choice}
    if computing := {kind for kind in kinds if kind in sized or is_torchs(kind)}:
        yield _all_calls(forward, stays, computing)
        yield from calls
    for path in outcome.failed:
        changing = [own for own in forward.integers if own.path == path and not stays[own.channels].all()]
        uses = sorted({use_of(forward.kinds[path], integer) for integer in changing}, key=str)
        yield from _of_attributes(_mattering(uses, matters))
    yield from calls
    for path in outcome.failed:
        uses = [use_of(forward.kinds[path], width) for width in forward.widths if width.path == path]
        yield from (frozenset([use]) for use in dict.fromkeys(uses))


def use_of(kind: type, integer: Integer) -> AttributeUse:
    return AttributeUse(kind, integer.name, integer.times, integer.role)


def _mattering(uses: Sequence[AttributeUse], matters: Callable[[Choice], bool]) -> list[AttributeUse]:
    """Attributes that a failure depends on, found by halving."""
    if not uses or not matters(frozenset(uses)):
        return []
    if len(uses) == 1:
        return [*uses]
    half = len(uses) // 2
    return _mattering(uses[:half], matters) + _mattering(uses[half:], matters)


def _of_attributes(uses: Sequence[AttributeUse]) -> Iterator[Choice]:
    """Attributes of a module that may have to change: one use of one, one alone, all together, two at a time."""
    yield from (frozenset([use]) for use in uses)
    names = sorted({(use.name, use.times) for use in uses})
    wholes = [frozenset(use for use in uses if (use.name, use.times) == name) for name in names]
    yield from (whole for whole in wholes if len(whole) > 1)
    if len(names) > 1:
        exact = frozenset(use for use in uses if use.times == 1)  # not a multiple of another number by chance
        yield from dict.fromkeys([exact, frozenset(uses)])
    if len(names) > 2:
        yield from (one | other for one, other in itertools.combinations(wholes, 2))


def _all_calls(forward: Forward, stays: np.ndarray, computing: Set[type]) -> Choice:
    """Every number that changes in calls of some classes: one run instead of one for each call.

    Those that follow the channels by themselves do no harm: what arrives there is right, and is left alone.
    """
    labels = stays[forward.partition.channel_of]
    return frozenset(
        use
        for (kind, _, _), places in forward.sites.items()
        if kind in computing
        for node, run in places
        for number in expected_numbers(Call(node, run.found), labels)
        if number.pruned != number.dense
        for use in itertools.islice(_positions(forward.kinds, number, computing), 1)
    )


def _calls(kinds: Mapping[str, type], wrong: Sequence[Number], sized: Set[type]) -> Iterator[Choice]:
    """The numbers in the failing call's own arguments that may have to change: all at once, or one of them."""
    options = [list(_positions(kinds, number, sized)) for number in wrong]
    if options and all(options):
        for uses in itertools.islice(itertools.product(*options), 16):
            yield frozenset(uses)
    yield from (frozenset([use]) for uses in options for use in uses)


def _positions(kinds: Mapping[str, type], number: Number, sized: Set[type]) -> Iterator[CallUse]:
    """Where the torch function that was called has a number.

    Where a class cuts its heads by a width (`sized`), that width sets their scale, too, which can stay the dense one's.
    A width that does nothing but scale pins what it counts.
    """
    site = number.node.site
    if site is None or site.function not in CHANGEABLE:
        return
    if site.function in SCALES and kinds[number.node.owner] not in sized:
        return
    if number.dense is None:  # it takes the place after the numbers that are given
        yield CallUse(kinds[number.node.owner], site.function, site.number, len(site.numbers), number.argument, None)
        return
    places = [position for position, value in enumerate(site.numbers) if value == number.dense]
    # A list of as many numbers stands in the same order.
    places.sort(key=lambda position: position != number.index)
    for position in places:
        yield CallUse(kinds[number.node.owner], site.function, site.number, position, number.argument, number.index)


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


def stuck_channels(forward: Forward, failed: Sequence[str], free: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    """What may have to be pinned after a failure, the least first: what a number counts, what passes the parameters.

    Modules of one class run the same code: what is stuck in one is pinned in all of them.

    Args:
        forward: Where the numbers are.
        failed: The modules around the failure, innermost first.
        free: Of every channel, whether it can still be pruned.

    Yields:
        Free channels by the path of the module to blame.
    """
    tensors = forward.partition.tensors
    passing = [(name, array.reshape(-1)) for name, labels in tensors.items() for array in labels.arrays]
    kinds = forward.kinds
    for places, nested in ((forward.counted, False), (forward.counted, True), (passing, True)):
        for path in failed:
            alike = [path]
            if places is forward.counted and not is_torchs(kinds[path]):
                alike = [other for other, kind in kinds.items() if kind is kinds[path]]
            stuck = {other: _inside(other, places, nested, free) for other in alike}
            if stuck[path].size:
                yield {other: channels for other, channels in stuck.items() if channels.size}


def _inside(path: str, places: Iterable[tuple[str, np.ndarray]], nested: bool, free: np.ndarray) -> np.ndarray:
    """The free channels of the places at a path, or also below it."""
    prefix = f"{path}." if path else ""
    own = [channels for place, channels in places if place == path or (nested and f"{place}.".startswith(prefix))]
    channels = np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *own]))
    return channels[free[channels]]
