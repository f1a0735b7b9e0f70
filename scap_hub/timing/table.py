"""A table of real layer times by width, and what it says of a model with fewer channels.

Every convolution, linear layer, norm and activation of a model is run alone, on an input of the shape that it has in
the model, at a few widths; what lies between is interpolated. The rest of a forward pass (additions, attention, Python)
is the time by which the whole model exceeds the sum of its layers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from scap_hub.channels.groups import ChannelGroup
from scap_hub.progress import track
from scap_hub.timing.clock import Timer, milliseconds
from scap_hub.timing.probes import LayerTimes, Width, find_probes


@dataclass(frozen=True, eq=False)
class Entry:
    """One call of a layer in a forward pass."""

    times: LayerTimes
    rows: Width
    columns: Width

    def ms(self, stays: np.ndarray) -> float:
        """Milliseconds when only the channels in this mask stay."""
        return self.times.at(self.rows.staying(stays), self.columns.staying(stays))


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """Predicts the time of a forward pass from the channels that stay.

    Attributes:
        entries: The layers, in the order in which they run.
        scale: Milliseconds in the model for each that the layers take alone.
        rest: Milliseconds of a forward pass that no channel changes.
    """

    entries: tuple[Entry, ...]
    scale: float = 1.0
    rest: float = 0.0

    def ms(self, stays: np.ndarray) -> float:
        """Predicted milliseconds when only the channels in this mask, (Partition.count,), stay."""
        return self.rest + self.scale * sum(entry.ms(stays) for entry in self.entries)


def latency_table(
    model: nn.Module, groups: Sequence[ChannelGroup], images: Tensor, timer: Timer | None = None
) -> LatencyTable:
    """Measures a model and its layers at several widths, where the model is.

    Args:
        model: The model; unchanged on return.
        groups: Its `channel_groups`.
        images: Example input, (N, C, H, W), as many images as will be run at once.
        timer: Measures calls that take turns; by default `scap_hub.timing.clock.milliseconds`.
    """
    whole = (timer or milliseconds)([(model, images)])[0]
    quick = timer or functools.partial(milliseconds, seconds=0.02, turns=5)
    partition = groups[0].whole.partition
    measured: dict[Any, LayerTimes] = {}
    entries = []
    for probe in track(find_probes(model, partition, images), "layer times"):
        if probe.key not in measured:
            measured[probe.key] = probe.measure(quick)
        entries.append(Entry(measured[probe.key], probe.rows, probe.columns))
    alone = sum(entry.ms(partition.everything()) for entry in entries)
    # Layers may be slower alone than in the model, where their input is in the cache.
    return LatencyTable(tuple(entries), min(1.0, whole / alone) if entries else 1.0, max(0.0, whole - alone))
