"""The channels of one model, solved: what leaves together, what that does to every tensor, and what it saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from scap_hub.channels.attributes import Forward, new_widths, solve_integers
from scap_hub.channels.labels import Ids, support
from scap_hub.channels.modules import Layer, layers_of
from scap_hub.channels.operators import Cost, Trace
from scap_hub.channels.trace import count_staying
from scap_hub.errors import PlanError
from scap_hub.graph.record import Capture
from scap_hub.plan import PruningPlan, ranges


@dataclass(frozen=True, eq=False)
class Balance:
    """Blocks of channels that must lose equally many each.

    Attributes:
        blocks: Channel numbers of each block; one that fills several places stands there as often.
        reason: The operator that asks for it.
    """

    blocks: tuple[np.ndarray, ...]
    reason: str

    @property
    def offsets(self) -> list[int]:
        """How much smaller than the largest each block is: a chunk into uneven parts has a smaller last one."""
        largest = max(block.size for block in self.blocks)
        return [largest - block.size for block in self.blocks]

    def lost(self, keep: np.ndarray) -> list[int]:
        """How many places of each block go."""
        return [int((~keep[block]).sum()) for block in self.blocks]


@dataclass(frozen=True, eq=False)
class ChannelSpace:
    """The solved channels of one model. A channel is a number; ids in `tensors` and `costs` are channel numbers.

    Attributes:
        count: Number of channels, pinned ones included.
        tensors: Ids of every parameter and buffer that carries channels.
        costs: MACs of every product in the forward pass.
        balances: What must stay balanced, non-trivial ones only.
        layers: Modules whose integers follow from their weights.
        parameters: Names in `tensors` that are parameters, not buffers.
        forward: What it takes to find the integers that modules hold; None for a trace that is never cut.
    """

    count: int
    tensors: dict[str, Ids]
    costs: tuple[Cost, ...]
    balances: tuple[Balance, ...]
    layers: tuple[Layer, ...]
    parameters: frozenset[str]
    forward: Forward | None = None

    def macs(self, keep: np.ndarray) -> int:
        """Multiply-accumulates of one forward pass at the captured batch size, if the channels in `keep` stay."""
        return sum(cost.times * count_staying(cost.ids, keep) for cost in self.costs)

    def layer_macs(self) -> dict[str, int]:
        """Multiply-accumulates of one forward pass by the module path of the layer; "" has those of no layer."""
        everything = np.ones(self.count, dtype=bool)
        macs: dict[str, int] = {}
        for cost in self.costs:
            path = (cost.weight or "").rpartition(".")[0]
            macs[path] = macs.get(path, 0) + cost.times * count_staying(cost.ids, everything)
        return macs

    def staying(self, channels: Mapping[str, np.ndarray], keep: Mapping[str, Sequence[int] | np.ndarray]) -> np.ndarray:
        """(count,) whether each channel stays, if `keep[name]` of the groups with these channel numbers do."""
        stays = np.ones(self.count, dtype=bool)
        for name, indices in keep.items():
            stays[np.delete(channels[name], indices)] = False
        return stays

    def document(self, channels: Mapping[str, np.ndarray], keep: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """The fields of the `PruningPlan` that keeps `keep[name]` of the groups with these channel numbers.

        Raises:
            PlanError: A keep is empty, out of range or repeated, or channels that must stay balanced are not.
        """
        document = self.cut(channels, keep)
        if self.forward is not None and document["tensors"]:
            stays = self.staying(channels, keep)
            for path, values in new_widths(self.forward, PruningPlan(**document), stays).items():
                document["attributes"].setdefault(path, {}).update(values)
        return document

    def cut(self, channels: Mapping[str, np.ndarray], keep: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """The same with no more than the forward pass needs."""
        kept = {name: _checked(name, wanted, channels[name].size) for name, wanted in keep.items()}
        stays = self.staying(channels, kept)
        for balance in self.balances:
            lost = balance.lost(stays)
            if len(set(lost)) > 1:
                raise PlanError(
                    f"unbalanced keep: {balance.reason} must lose equally many channels each, not {lost[:8]}; "
                    "scap_hub.select chooses balanced ones"
                )
        entries: dict[str, int] = {}

        def entry(indices: np.ndarray) -> int:
            return entries.setdefault(ranges(indices.tolist()), len(entries))

        groups = {
            name: {"size": channels[name].size, "keep": entry(indices)}
            for name, indices in kept.items()
            if indices.size < channels[name].size
        }
        tensors, shapes = {}, {}
        for name, ids in self.tensors.items():
            cut: dict[str, Any] = {"shape": ids.shape, "keep": {}}
            shape = list(ids.shape)
            for layer in ids.layers:
                mask, dims = stays[layer], support(layer)
                if mask.all():
                    continue
                if len(dims) == 1:
                    indices = np.flatnonzero(mask.reshape(-1))
                    cut["keep"][dims[0]] = entry(indices)
                    shape[dims[0]] = indices.size
                else:
                    blocks = self._blocks(name, mask.reshape(ids.shape[:2]))
                    cut["blocks"] = [entry(indices) for indices in blocks]
                    shape[1] = blocks[0].size
            if cut["keep"] or "blocks" in cut:
                tensors[name], shapes[name] = cut, tuple(shape)
        attributes = {
            layer.path: layer.attributes(shapes[layer.weight]) for layer in self.layers if layer.weight in shapes
        }
        document: dict[str, Any] = {
            "keeps": tuple(entries),
            "groups": groups,
            "tensors": tensors,
            "attributes": attributes,
        }
        if self.forward is not None and self.forward.counted and tensors:
            for path, values in solve_integers(self.forward, PruningPlan(**document), stays).items():
                attributes[path] = {**attributes.get(path, {}), **values}
        return document

    def _blocks(self, weight: str, mask: np.ndarray) -> list[np.ndarray]:
        """Kept columns of each block of rows of a grouped convolution's weight."""
        count = next(layer.groups for layer in self.layers if layer.weight == weight)
        return [np.flatnonzero(block[0]) for block in np.split(mask, count)]

    def params(self, keep: np.ndarray) -> int:
        """Elements of the captured parameters that stay."""
        return sum(count_staying(self.tensors[name], keep) for name in self.parameters)


def solve(captured: Capture, found: Trace, model: nn.Module) -> tuple[ChannelSpace, np.ndarray]:
    """Numbers the channels and translates everything that the trace found into these numbers.

    Returns:
        The space, and the channel number of every id.
    """
    channel_of = found.ledger.components()

    def translated(ids: Ids) -> Ids:
        return Ids(ids.shape, tuple(channel_of[layer] for layer in ids.layers))

    tensors = {node.state: translated(found.ids[node]) for node in captured.given if node.state}
    balances = []
    for equal in found.ledger.equal:
        blocks = tuple(channel_of[block] for block in equal.blocks)
        if any(not np.array_equal(np.sort(blocks[0]), np.sort(block)) for block in blocks[1:]):
            balances.append(Balance(blocks, equal.reason))
    costs = tuple(Cost(translated(cost.ids), cost.times, cost.weight) for cost in found.costs)
    space = ChannelSpace(
        count=int(channel_of.max()) + 1,
        tensors=tensors,
        costs=costs,
        balances=tuple(balances),
        layers=tuple(layers_of(model)),
        parameters=frozenset(name for name in tensors if isinstance(captured.tensors[name], nn.Parameter)),
    )
    return space, channel_of


def _checked(name: str, indices: Sequence[int], size: int) -> np.ndarray:
    kept = np.unique(np.asarray(indices, dtype=np.int64))
    if kept.size == 0:
        raise PlanError(f"group {name!r} would keep no channel; keep at least one of its {size}")
    if kept.size < len(indices) or kept[0] < 0 or kept[-1] >= size:
        raise PlanError(f"group {name!r} has channels 0-{size - 1}; its keep repeats one or goes beyond them")
    return kept
