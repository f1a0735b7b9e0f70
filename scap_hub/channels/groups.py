"""Channel groups: the sets of channels that can leave a model together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar, overload

import numpy as np

from scap_hub.channels.attributes import completed, described, left_of
from scap_hub.channels.forward import Forward
from scap_hub.channels.partition import Balance, Partition
from scap_hub.channels.taps import Tap
from scap_hub.errors import PlanError
from scap_hub.plan import PruningPlan
from scap_hub.tables import html_table
from scap_hub.text import did_you_mean

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class WholeModel:
    """The channels of one whole model, and what it takes to make a plan of it; shared by its groups.

    Attributes:
        partition: The solved channels.
        forward: The model without weights, and what was recorded of it.
        channels: Channel numbers of each group, by its name.
        pinned: Why groups cannot be pruned, by name.
    """

    partition: Partition
    forward: Forward
    channels: Mapping[str, np.ndarray]
    pinned: Mapping[str, str]

    def staying(self, keep: Mapping[str, Sequence[int] | np.ndarray]) -> np.ndarray:
        """(channels,) whether each channel of the model stays, if `keep[name]` of the named groups do."""
        return self.partition.staying(self.channels, keep)

    def cut(self, keep: Mapping[str, Sequence[int]]) -> PruningPlan:
        """The plan that keeps these channels of the named groups, all of the others: see `PruningPlan.from_keep`."""
        kept = {name: self._checked(name, wanted) for name, wanted in keep.items()}
        plan = self.partition.cut(self.channels, kept)
        if not plan.tensors:
            return plan
        stays = self.staying(kept)
        left = left_of(self.forward, stays)
        plan, _ = completed(self.forward, plan, stays, left)
        return described(self.forward, plan, left)

    def _checked(self, name: str, wanted: Sequence[int]) -> np.ndarray:
        if name not in self.channels:
            raise PlanError(f"no channel group {name!r}{did_you_mean(name, self.channels)}")
        size = self.channels[name].size
        indices = np.asarray(wanted)
        if indices.size and (indices.ndim != 1 or indices.dtype.kind not in "iu"):
            raise PlanError(f"group {name!r}: channel numbers are integers in one list, not {indices.dtype} values")
        kept = np.unique(indices.astype(np.int64))
        if kept.size == 0:
            raise PlanError(f"group {name!r} would keep no channel; keep at least one of its {size}")
        if kept.size < indices.size or kept[0] < 0 or kept[-1] >= size:
            raise PlanError(f"group {name!r} has channels 0-{size - 1}; its keep repeats one or goes beyond them")
        if name in self.pinned and kept.size < size:
            raise PlanError(f"group {name!r} cannot be pruned: it {self.pinned[name]}")
        return kept


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that are produced, carried and consumed by the same parameters.

    Attributes:
        name: Module path of the first producer, stable across runs; "#2" and so on is added where one layer's
            channels fall into several groups.
        size: Number of channels that can go one by one.
        producers: Module paths of the layers that compute the channels.
        consumers: Module paths of the layers that read them.
        members: (parameter or buffer name, dim) pairs that shrink with the group.
        constraint: None, or what must stay balanced with what, maybe across groups.
        prunable: Whether any channel may go.
        pinned_because: Why not, if not.
        taps: Where to watch each producer, in the order of `producers`; a layer that is not called as a module
            has none.
        channels: (size,) the channels' numbers in the whole model.
        whole: The channels of the whole model.
    """

    name: str
    size: int
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    members: tuple[tuple[str, int], ...]
    constraint: tuple[Balance, ...] | None
    prunable: bool
    pinned_because: str | None
    taps: tuple[Tap, ...]
    channels: np.ndarray = field(repr=False)
    whole: WholeModel = field(repr=False)

    @property
    def watched(self) -> bool:
        """Whether every channel has a tap."""
        rows = [tap.channel_of_row for tap in self.taps]
        return bool(rows) and bool(np.isin(np.arange(self.size), np.concatenate(rows)).all())


class ChannelGroups(Sequence[ChannelGroup]):
    """The channel groups of one model, in the order in which its forward pass first computes them.

    A sequence of `ChannelGroup`, with the questions that concern the whole model on it.
    """

    def __init__(self, groups: Sequence[ChannelGroup], whole: WholeModel) -> None:
        """Holds groups of one model: all of them, or some."""
        self._groups, self.whole = tuple(groups), whole

    @classmethod
    def of(cls, groups: Sequence[ChannelGroup]) -> ChannelGroups:
        """Groups in any sequence.

        Raises:
            PlanError: There are none.
        """
        if isinstance(groups, ChannelGroups):
            return groups
        if not len(groups):
            raise PlanError("no channel groups were given; scap_hub.channel_groups finds those of a model")
        return cls(groups, groups[0].whole)

    @overload
    def __getitem__(self, index: int) -> ChannelGroup: ...

    @overload
    def __getitem__(self, index: slice) -> ChannelGroups: ...

    def __getitem__(self, index: int | slice) -> ChannelGroup | ChannelGroups:
        if isinstance(index, slice):
            return ChannelGroups(self._groups[index], self.whole)
        return self._groups[index]

    def __iter__(self) -> Iterator[ChannelGroup]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    def __repr__(self) -> str:
        free = sum(group.prunable for group in self)
        return f"<ChannelGroups: {len(self)} groups, {free} prunable, {sum(group.size for group in self)} channels>"

    def _repr_html_(self) -> str:
        rows = [(group.name, group.size, group.pinned_because or "") for group in self]
        return html_table(repr(self).strip("<>"), ("group", "channels", "whole, because it"), rows)

    @property
    def by_name(self) -> dict[str, ChannelGroup]:
        """The groups by name."""
        return {group.name: group for group in self}

    @property
    def prunable(self) -> list[ChannelGroup]:
        """The groups that can be pruned."""
        return [group for group in self if group.prunable]

    def everything(self) -> np.ndarray:
        """(channels,) all True: every channel of the model stays."""
        return self.whole.partition.everything()

    def staying(self, keep: Mapping[str, Sequence[int] | np.ndarray]) -> np.ndarray:
        """(channels,) whether each channel of the model stays, if `keep[name]` of the named groups do."""
        return self.whole.staying(keep)

    def macs(self, stays: np.ndarray) -> int:
        """Multiply-accumulates of one forward pass at the captured batch size, if these channels stay."""
        return self.whole.partition.macs(stays)

    def params(self, stays: np.ndarray) -> int:
        """Elements of the parameters that are left, if these channels stay."""
        return self.whole.partition.params(stays)

    def layer_macs(self, stays: np.ndarray | None = None) -> dict[str, int]:
        """Multiply-accumulates of one forward pass by module path, if these channels stay; "" has those of no layer."""
        return self.whole.partition.layer_macs(stays)

    def cut(self, keep: Mapping[str, Sequence[int]]) -> PruningPlan:
        """The plan that keeps these channels of the named groups, all of the others: see `PruningPlan.from_keep`."""
        return self.whole.cut(keep)

    def pinned(self, reasons: Mapping[str, str]) -> ChannelGroups:
        """The same groups, of which some are pinned too, with these reasons by name.

        Raises:
            PlanError: A name is unknown.
        """
        for name in reasons:
            if name not in self.whole.channels:
                raise PlanError(f"no channel group {name!r}{did_you_mean(name, self.whole.channels)}")
        whole = replace(self.whole, pinned={**reasons, **self.whole.pinned})
        groups = [
            replace(
                group,
                whole=whole,
                prunable=group.prunable and group.name not in reasons,
                pinned_because=group.pinned_because or reasons.get(group.name),
            )
            for group in self
        ]
        return ChannelGroups(groups, whole)
