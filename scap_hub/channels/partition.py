"""The channels of one model, solved: what leaves together, what that does to every tensor, and what it saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from scap_hub.channels.labels import Labels, restricted, support
from scap_hub.channels.operators import Cost, Trace
from scap_hub.channels.operators.table import Adapting, ModuleKind, adapting
from scap_hub.channels.trace import count_staying
from scap_hub.errors import PlanError
from scap_hub.graph.record import Capture
from scap_hub.plan import Cutting, GroupCut, PruningPlan, TensorCut
from scap_hub.private import NormBase


@dataclass(frozen=True, eq=False)
class Balance:
    """Blocks of channels that must lose equally many each.

    Attributes:
        blocks: Channel numbers of each block; one that fills several places stands there as often.
        reason: The operator that asks for it.
    """

    blocks: tuple[np.ndarray, ...]
    reason: str

    def lost(self, stays: np.ndarray) -> list[int]:
        """How many places of each block go."""
        return [int((~stays[block]).sum()) for block in self.blocks]


@dataclass(frozen=True, eq=False)
class WeightedModule:
    """A module whose own integers (in_channels, num_features, ...) follow from the shape of its weight.

    Attributes:
        path: Module path.
        weight: Full name of its weight.
        module: The module as it is in the dense model, without values.
        kind: What it is.
        adapt: What says how its integers follow.
    """

    path: str
    weight: str
    module: nn.Module

    kind: ModuleKind
    adapt: Adapting = field(repr=False)

    @classmethod
    def of(cls, path: str, module: nn.Module) -> WeightedModule | None:
        """The description of a module; None for one whose integers do not follow from its weight."""
        known = adapting(module)
        return cls(path, f"{path}.weight" if path else "weight", module, *known) if known else None

    def integers(self, shape: tuple[int, ...]) -> dict[str, int | list[int]]:
        """The module's integers once its weight has `shape`."""
        return self.adapt(self.module, shape)

    @property
    def groups(self) -> int:
        """Groups of a convolution; 1 for anything else."""
        return getattr(self.module, "groups", 1)

    @property
    def transposed(self) -> bool:
        """Whether the weight is laid (in, out / groups, ...)."""
        return getattr(self.module, "transposed", False)

    @property
    def depthwise(self) -> bool:
        """Whether each group of a convolution reads one channel, so that the groups shrink with the channels.

        Of a transposed one, also whether each makes one.
        """
        module: Any = self.module
        return self.groups > 1 and self.groups in (
            getattr(module, "in_channels", None),
            self.transposed and module.out_channels,
        )

    @property
    def rows_a_group(self) -> int:
        """Rows of the weight of each group of a convolution."""
        module: Any = self.module
        return module.weight.shape[0] // module.groups if self.kind == "conv" else 1


@dataclass(frozen=True, eq=False)
class Partition:
    """The solved channels of one model. A channel is a number; labels in `tensors` and `costs` are channel numbers.

    Attributes:
        count: Number of channels, pinned ones included.
        tensors: Labels of every parameter and buffer that carries channels.
        costs: MACs of every product in the forward pass.
        balances: What must stay balanced, non-trivial ones only.
        modules: Modules whose integers follow from their weights.
        parameters: Names in `tensors` that are parameters, not buffers.
        blocks: Into how many blocks of rows the weight of a grouped convolution falls.
        refers: For a buffer of channel numbers, the channels that these are numbers of.
        channel_of: Channel number of every label of the trace.
        plain_norms: Channels that a batch or instance norm without parameters reads, by its path.
    """

    count: int
    tensors: dict[str, Labels]
    costs: tuple[Cost, ...]
    balances: tuple[Balance, ...]
    modules: tuple[WeightedModule, ...]
    parameters: frozenset[str]
    blocks: dict[str, int]
    refers: dict[str, np.ndarray]
    channel_of: np.ndarray
    plain_norms: dict[str, np.ndarray]

    def everything(self) -> np.ndarray:
        """(count,) all True: every channel stays."""
        return np.ones(self.count, dtype=bool)

    def macs(self, stays: np.ndarray) -> int:
        """Multiply-accumulates of one forward pass at the captured batch size, if these channels stay."""
        return sum(cost.times * count_staying(cost.labels, stays) for cost in self.costs)

    def layer_macs(self, stays: np.ndarray | None = None) -> dict[str, int]:
        """Multiply-accumulates of one forward pass by the module path of the layer; "" has those of no layer.

        Args:
            stays: (count,) which channels stay; all of them if left out.
        """
        stays = self.everything() if stays is None else stays
        macs: dict[str, int] = {}
        for cost in self.costs:
            path = (cost.weight or "").rpartition(".")[0]
            macs[path] = macs.get(path, 0) + cost.times * count_staying(cost.labels, stays)
        return macs

    def params(self, stays: np.ndarray) -> int:
        """Elements of the captured parameters that stay."""
        return sum(count_staying(self.tensors[name], stays) for name in self.parameters)

    def staying(self, channels: Mapping[str, np.ndarray], keep: Mapping[str, Sequence[int] | np.ndarray]) -> np.ndarray:
        """(count,) whether each channel stays, if `keep[name]` of the groups with these channel numbers do."""
        stays = self.everything()
        for name, indices in keep.items():
            stays[np.delete(channels[name], indices)] = False
        return stays

    def check_balances(self, stays: np.ndarray) -> None:
        """Raises a PlanError if channels that must stay balanced are not."""
        for balance in self.balances:
            lost = balance.lost(stays)
            if len(set(lost)) > 1:
                raise PlanError(
                    f"unbalanced keep: {balance.reason} must lose equally many channels each, not {lost[:8]}; "
                    "scap_hub.select chooses balanced ones"
                )

    def cut(self, channels: Mapping[str, np.ndarray], keep: Mapping[str, np.ndarray]) -> PruningPlan:
        """What a keep does to tensors, and to the integers that follow from their shapes.

        Args:
            channels: Channel numbers of each group.
            keep: Kept channels of some groups, ascending.

        Raises:
            PlanError: Channels that must stay balanced are not.
        """
        stays = self.staying(channels, keep)
        self.check_balances(stays)
        cutting = Cutting()
        groups = {
            name: GroupCut(size=channels[name].size, keep=cutting.entry(indices))
            for name, indices in keep.items()
            if indices.size < channels[name].size
        }
        tensors = {name: cut for name in self.tensors if (cut := self._tensor(name, stays, cutting)) is not None}
        attributes = {
            layer.path: layer.integers(restricted(self.tensors[layer.weight], stays).shape)
            for layer in self.modules
            if layer.weight in tensors
        }
        for path, read in self.plain_norms.items():
            if not stays[read].all():
                attributes[path] = {"num_features": int(stays[read].sum())}
        return PruningPlan(keeps=cutting.entries(), groups=groups, tensors=tensors, attributes=attributes)

    def _tensor(self, name: str, stays: np.ndarray, cutting: Cutting) -> TensorCut | None:
        """What stays of one tensor; None if all of it does."""
        labels = self.tensors[name]
        keep: dict[int, int] = {}
        blocks: tuple[int, ...] | None = None
        for array in labels.arrays:
            mask, dims = stays[array], support(array)
            if mask.all():
                continue
            if len(dims) == 1:
                keep[dims[0]] = cutting.entry(np.flatnonzero(mask.reshape(-1)))
            else:
                rows = np.split(mask.reshape(labels.shape[:2]), self.blocks[name])
                blocks = tuple(cutting.entry(np.flatnonzero(block[0])) for block in rows)
        refers = None
        if name in self.refers and not stays[self.refers[name]].all():
            refers = cutting.entry(np.flatnonzero(stays[self.refers[name]]))
        if not keep and blocks is None and refers is None:
            return None
        return TensorCut(shape=labels.shape, keep=keep, blocks=blocks, refers=refers)


def solve(captured: Capture, found: Trace, model: nn.Module) -> Partition:
    """Numbers the channels and translates everything that the trace found into these numbers.

    Args:
        captured: The forward pass in eval mode.
        found: Its trace.
        model: The model, with or without weights.
    """
    channel_of = found.ledger.components()

    def translated(labels: Labels) -> Labels:
        return Labels(labels.shape, tuple(channel_of[array] for array in labels.arrays))

    tensors = {node.state: translated(found.labels[node]) for node in found.labels if node.state}
    refers = {name: channel_of[labels] for name, labels in found.indices.items()}
    for name, channels in refers.items():
        numbers = captured.numbers[name]
        tensors[name] = Labels((len(numbers),), (channels[numbers],))
    balances: dict[tuple[bytes, ...], Balance] = {}  # training mode says again what eval mode has said
    for equal in found.ledger.equal:
        blocks = tuple(channel_of[block] for block in equal.blocks)
        if any(not np.array_equal(np.sort(blocks[0]), np.sort(block)) for block in blocks[1:]):
            balances.setdefault(tuple(block.tobytes() for block in blocks), Balance(blocks, equal.reason))
    return Partition(
        count=int(channel_of.max()) + 1,
        tensors=tensors,
        costs=tuple(Cost(translated(cost.labels), cost.times, cost.weight) for cost in found.costs),
        balances=tuple(balances.values()),
        modules=tuple(
            layer for path, module in model.named_modules() if (layer := WeightedModule.of(path, module)) is not None
        ),
        parameters=frozenset(name for name in tensors if isinstance(captured.tensors[name], nn.Parameter)),
        blocks=dict(found.blocks),
        refers=refers,
        channel_of=channel_of,
        plain_norms=_plain_norms(captured, found, model, channel_of),
    )


def _plain_norms(captured: Capture, found: Trace, model: nn.Module, channel_of: np.ndarray) -> dict[str, np.ndarray]:
    """See `Partition.plain_norms`: such a module computes at any width, and warns if it is told another one."""
    kinds = {path: module for path, module in model.named_modules() if isinstance(module, NormBase)}
    norms: dict[str, np.ndarray] = {}
    for node in captured.called:
        norm = kinds.get(node.owner)
        read = found.labels[node].along(1) if norm is not None and isinstance(found.labels[node], Labels) else None
        if norm is not None and norm.weight is None and read is not None and read.size == norm.num_features:
            norms[node.owner] = channel_of[read]
    return norms
