"""Finds channel groups: the sets of channels that can leave a model together."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from scap_hub.channels.attributes import StuckError, forward_of, shared_numbers, stuck_channels
from scap_hub.channels.group import ChannelGroup
from scap_hub.channels.operators import Trace
from scap_hub.channels.partition import ChannelSpace, solve
from scap_hub.channels.taps import Tap, module_calls, tap
from scap_hub.channels.trace import trace
from scap_hub.errors import ModelError
from scap_hub.graph.record import capture, on_meta, without_weights
from scap_hub.selection.choice import Chooser

__all__ = ["ChannelGroup", "Tap", "analyse", "channel_groups"]


def channel_groups(model: nn.Module, inputs: tuple[Any, ...] | Tensor) -> list[ChannelGroup]:
    """Finds every group of channels of a model, prunable or pinned.

    Args:
        model: Any module whose forward pass does not depend on values; left as it was.
        inputs: Example positional arguments of its forward pass; a single tensor stands for one argument.

    Returns:
        Groups in the order in which the forward pass first computes them.

    Raises:
        ModelError: The model cannot be captured.
    """
    arguments = (inputs,) if isinstance(inputs, Tensor) else inputs
    bare, shapes = without_weights(model), on_meta(arguments)
    try:
        captured = capture(bare, shapes)
    except ModelError:
        # Its forward pass makes tensors on a device of its own, or looks at their values.
        bare, shapes = copy.deepcopy(model), arguments
        captured = capture(bare, shapes)
    found = trace(captured)
    tried: set[str] = set()
    unbalanced, fault = found.ledger.equal, None  # before the last balances, and how it failed then
    known: StuckError | None = None
    while True:
        space, channel_of = solve(captured, found, model)
        space = replace(space, forward=forward_of(bare, shapes, found, channel_of, space.layers))
        groups = analyse(found, space, channel_of)
        stuck, known = known or _stuck(groups, space), None
        if stuck is None:
            return groups
        assert space.forward is not None
        if fault is not None and found.ledger.equal is not unbalanced and stuck.failed[0] == fault.failed[0]:
            # The last balances did not help.
            found.ledger.equal, known = unbalanced, fault
            continue
        unbalanced, fault = found.ledger.equal, stuck
        free = np.zeros(space.count, dtype=bool)
        for group in groups:
            free[group.channels] = group.prunable
        shared = shared_numbers(space.forward, stuck.failed, free)
        if shared.keys() - tried:
            found.ledger.equal = list(unbalanced)
            id_of = np.unique(channel_of, return_index=True)[1]
            for name in shared.keys() - tried:
                found.ledger.balance([id_of[channels] for channels in shared[name]], f"places of {name}")
            tried |= shared.keys()
            continue
        for place, channels in stuck_channels(space.forward, space.tensors, stuck.failed, free).items():
            ids = np.flatnonzero(np.isin(channel_of, channels))
            found.ledger.pin(ids, f"is counted by a number fixed in {place!r}")


def _stuck(groups: list[ChannelGroup], space: ChannelSpace) -> StuckError | None:
    """Tries an uneven plan; how it fails, if it does."""
    assert space.forward is not None
    generator = np.random.default_rng(0)
    scores = {group.name: generator.random(group.size) for group in groups if group.prunable}
    if not scores or not space.forward.counted:
        return None
    chooser = Chooser(groups, scores)
    counts = {name: max(1, int(generator.uniform(0.4, 0.8) * score.size)) for name, score in scores.items()}
    try:
        space.cut({group.name: group.channels for group in groups}, chooser.keep(counts))
    except StuckError as error:
        return error
    return None


def analyse(found: Trace, space: ChannelSpace, channel_of: np.ndarray) -> list[ChannelGroup]:
    """Groups the channels of a solved trace by the parameters that they touch."""
    pinned = _pins(found, space, channel_of)
    signature = _signatures(space, pinned)
    rows = [channel_of[producer.ids] for producer in found.producers]
    reads = [channel_of[consumer.ids] for consumer in found.consumers]

    group_of = np.full(space.count, -1)
    channels: list[list[int]] = []
    index: dict[int, int] = {}
    for produced in rows:
        fresh = np.array(list(dict.fromkeys(produced[group_of[produced] < 0].tolist())), dtype=int)
        for kind in dict.fromkeys(signature[fresh].tolist()):
            own = fresh[signature[fresh] == kind]
            number = index.setdefault(kind, len(channels))
            if number == len(channels):
                channels.append([])
            channels[number] += own.tolist()
            group_of[own] = number

    producers = _touching(group_of, rows, len(channels))
    consumers = _touching(group_of, reads, len(channels))
    names = _names([_path(found.producers[touching[0]].weight) for touching in producers])
    members = _members(space, group_of, len(channels))
    constraints = _touching(group_of, [np.concatenate(balance.blocks) for balance in space.balances], len(channels))
    calls = module_calls(found)
    groups = []
    for number, numbers in enumerate(map(np.array, channels)):
        place = np.full(space.count, -1)
        place[numbers] = np.arange(numbers.size)
        reason = pinned.get(int(numbers[0])) or ("is a single channel" if numbers.size == 1 else None)
        taps = [tap(found, found.producers[i], place[rows[i]], calls) for i in producers[number]]
        groups.append(
            ChannelGroup(
                name=names[number],
                size=numbers.size,
                producers=_paths([found.producers[i].weight for i in producers[number]]),
                consumers=_paths([found.consumers[i].weight for i in consumers[number]]),
                members=members[number],
                constraint=tuple(space.balances[i] for i in constraints[number]) or None,
                prunable=reason is None,
                pinned_because=reason,
                taps=tuple(found_tap for found_tap in taps if found_tap is not None),
                channels=numbers,
                space=space,
            )
        )
    return groups


def _pins(found: Trace, space: ChannelSpace, channel_of: np.ndarray) -> dict[int, str]:
    """Channels that must stay, with the first reason found."""
    pinned: dict[int, str] = {}
    for ids, reason in found.ledger.pins():
        for channel in np.unique(channel_of[ids]).tolist():
            pinned.setdefault(channel, reason)
    read = np.zeros(space.count, dtype=bool)
    for ids in (*(consumer.ids for consumer in found.consumers), *found.summed):
        read[channel_of[ids]] = True
    made = np.zeros(space.count, dtype=bool)
    for producer in found.producers:
        made[channel_of[producer.ids]] = True
    for channel in np.flatnonzero(~read).tolist():
        pinned.setdefault(channel, "is read by no layer")
    for channel in np.flatnonzero(~made).tolist():
        pinned.setdefault(channel, "is computed by no layer")
    # A block that cannot lose anything holds every block that it is balanced with.
    spread = True
    while spread:
        spread = False
        for balance in space.balances:
            free = [[c for c in block.tolist() if c not in pinned] for block in balance.blocks]
            if any(not block for block in free) and any(free):
                spread = True
                for channel in {c for block in free for c in block}:
                    pinned[channel] = f"must stay balanced with channels that stay ({balance.reason})"
    return pinned


def _signatures(space: ChannelSpace, pinned: dict[int, str]) -> np.ndarray:
    """(count,) a hash of the (tensor, dim) pairs that each channel touches, and of whether it is pinned."""
    random = np.random.default_rng(0)
    signature = np.zeros(space.count, dtype=np.uint64)
    for _, ids in sorted(space.tensors.items()):
        for layer in ids.layers:
            signature[layer] += random.integers(1, 2**63, dtype=np.uint64)  # once, however often a channel is there
    signature[list(pinned)] ^= random.integers(1, 2**63, dtype=np.uint64)
    return signature


def _members(space: ChannelSpace, group_of: np.ndarray, count: int) -> list[tuple[tuple[str, int], ...]]:
    members: list[list[tuple[str, int]]] = [[] for _ in range(count)]
    for name, ids in space.tensors.items():
        for layer in ids.layers:
            dim = max(dim for dim, size in enumerate(layer.shape) if size > 1)
            for number in np.unique(group_of[layer]).tolist():
                if number >= 0:
                    members[number].append((name, dim))
    return [tuple(pairs) for pairs in members]


def _touching(group_of: np.ndarray, arrays: list[np.ndarray], count: int) -> list[list[int]]:
    """For each group the positions of the arrays that hold one of its channels."""
    touching: list[list[int]] = [[] for _ in range(count)]
    for position, array in enumerate(arrays):
        for number in np.unique(group_of[array]).tolist():
            if number >= 0:
                touching[number].append(position)
    return touching


def _path(weight: str) -> str:
    return weight.rpartition(".")[0]


def _paths(weights: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_path(weight) for weight in weights))


def _names(paths: list[str]) -> list[str]:
    seen: dict[str, int] = {}
    names = []
    for path in paths:
        seen[path] = seen.get(path, 0) + 1
        names.append(path if seen[path] == 1 else f"{path}#{seen[path]}")
    return names
