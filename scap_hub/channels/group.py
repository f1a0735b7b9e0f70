"""What a channel group is."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from scap_hub.channels.partition import Balance, ChannelSpace
from scap_hub.channels.taps import Tap


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
        channels: (size,) the channels' numbers in `space`.
        space: The solved channels of the whole model, shared by its groups.
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
    space: ChannelSpace = field(repr=False)

    @property
    def watched(self) -> bool:
        """Whether every channel has a tap."""
        rows = [tap.channel_of_row for tap in self.taps]
        return bool(rows) and bool(np.isin(np.arange(self.size), np.concatenate(rows)).all())
