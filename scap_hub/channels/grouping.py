"""Channels of a solved trace become groups, and each is pinned that cannot lose any."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from scap_hub.channels.groups import ChannelGroup
from scap_hub.channels.labels import support
from scap_hub.channels.operators import Trace
from scap_hub.channels.partition import Partition
from scap_hub.channels.proof import Run
from scap_hub.channels.taps import module_calls, tap


def grouped(run: Run, partition: Partition, training_only: Sequence[np.ndarray] = ()) -> list[ChannelGroup]:
    """Groups the channels of a solved trace by the parameters that they touch."""
    found, channel_of = run.found, partition.channel_of
    pinned = _pins(found, partition, training_only)
    signature = _signatures(partition, pinned)
    rows = [channel_of[producer.labels] for producer in found.producers]
    reads = [channel_of[consumer.labels] for consumer in found.consumers]

    group_of = np.full(partition.count, -1)
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
    members = _members(partition, group_of, len(channels))
    constraints = _touching(group_of, [np.concatenate(balance.blocks) for balance in partition.balances], len(channels))
    calls = module_calls(run.captured)
    groups = []
    for number, numbers in enumerate(map(np.array, channels)):
        place = np.full(partition.count, -1)
        place[numbers] = np.arange(numbers.size)
        reason = pinned.get(int(numbers[0])) or _alone(numbers, [rows[i] for i in producers[number]])
        taps = [tap(found, found.producers[i], place[rows[i]], calls) for i in producers[number]]
        groups.append(
            ChannelGroup(
                name=names[number],
                size=numbers.size,
                producers=_paths([found.producers[i].weight for i in producers[number]]),
                consumers=_paths([found.consumers[i].weight for i in consumers[number]]),
                members=members[number],
                constraint=tuple(partition.balances[i] for i in constraints[number]) or None,
                prunable=reason is None,
                pinned_because=reason,
                taps=tuple(found_tap for found_tap in taps if found_tap is not None),
                channels=numbers,
                whole=None,  # type: ignore[arg-type]  # known once all groups are
            )
        )
    return groups


def _alone(numbers: np.ndarray, rows: Sequence[np.ndarray]) -> str | None:
    """Why a group is pinned that is one channel, which may be many rows of a layer; None for any other."""
    if numbers.size > 1:
        return None
    most = max(int((own == numbers[0]).sum()) for own in rows)
    return "is a single channel" if most == 1 else f"has {most} channels that could only leave together"


def _pins(found: Trace, partition: Partition, training_only: Sequence[np.ndarray]) -> dict[int, str]:
    """Channels that must stay, with the first reason found."""
    channel_of = partition.channel_of
    pinned: dict[int, str] = {}
    for labels, reason in found.ledger.pins():
        for channel in np.unique(channel_of[labels]).tolist():
            pinned.setdefault(channel, reason)
    read = np.zeros(partition.count, dtype=bool)
    for labels in (*(consumer.labels for consumer in found.consumers), *found.summed):
        read[channel_of[labels]] = True
    made = np.zeros(partition.count, dtype=bool)
    for producer in found.producers:
        made[channel_of[producer.labels]] = True
    for channel in np.flatnonzero(~read).tolist():
        pinned.setdefault(channel, "is read by no layer")
    for channel in np.flatnonzero(~made).tolist():
        pinned.setdefault(channel, "is computed by no layer")
    for labels in training_only:
        for channel in np.unique(channel_of[labels]).tolist():
            pinned.setdefault(channel, "is computed in training mode only")
    # A block that cannot lose anything holds every block that it is balanced with.
    spread = True
    while spread:
        spread = False
        for balance in partition.balances:
            free = [[c for c in block.tolist() if c not in pinned] for block in balance.blocks]
            if any(not block for block in free) and any(free):
                spread = True
                for channel in {c for block in free for c in block}:
                    pinned[channel] = f"must stay balanced with channels that stay ({balance.reason})"
    return pinned


def _signatures(partition: Partition, pinned: dict[int, str]) -> np.ndarray:
    """(count,) a hash of the (tensor, dim) pairs that each channel touches, and of whether it is pinned."""
    random = np.random.default_rng(0)
    signature = np.zeros(partition.count, dtype=np.uint64)
    for _, labels in sorted(partition.tensors.items()):
        for array in labels.arrays:
            signature[array] += random.integers(1, 2**63, dtype=np.uint64)  # once, however often a channel is there
    signature[list(pinned)] ^= random.integers(1, 2**63, dtype=np.uint64)
    return signature


def _members(partition: Partition, group_of: np.ndarray, count: int) -> list[tuple[tuple[str, int], ...]]:
    members: list[list[tuple[str, int]]] = [[] for _ in range(count)]
    for name, labels in partition.tensors.items():
        for array in labels.arrays:
            dim = max(support(array))
            for number in np.unique(group_of[array]).tolist():
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
