"""A table of real layer times by width, and what it says of a model with fewer channels.

Every convolution, linear layer, norm and activation of a model is run alone, on an input of the shape that it has in
the model, at a few widths; what lies between is interpolated. The rest of a forward pass (additions, attention, Python)
is what the whole model takes more than the sum.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scap_hub.channels.groups import ChannelGroup
from scap_hub.channels.labels import Labels, support
from scap_hub.channels.partition import WeightedModule as Layer
from scap_hub.channels.partition import Partition
from scap_hub.graph.record import evaluating
from scap_hub.private import DropoutNd
from scap_hub.progress import track
from scap_hub.timing.clock import Timer, milliseconds

WIDTHS = (0.125, 0.25, 0.5, 1.0)
"""Where a layer is measured, as fractions of its width."""
_NOTE = "_scap_hub_channels"


@dataclass(frozen=True, eq=False)
class LayerTimes:
    """Milliseconds of one layer by the two dimensions of its weight that can shrink; bilinear between the points.

    Attributes:
        rows: (a,) sizes of dimension 0, ascending.
        columns: (b,) sizes of dimension 1, ascending.
        ms: (a, b) milliseconds.
    """

    rows: np.ndarray
    columns: np.ndarray
    ms: np.ndarray

    def at(self, rows: float, columns: float) -> float:
        """Milliseconds at these sizes; beyond the points, those of the nearest."""
        across = [np.interp(columns, self.columns, line) for line in self.ms]
        return float(np.interp(rows, self.rows, across))


@dataclass(frozen=True, eq=False)
class Width:
    """How much of one dimension stays: its size, and the channels along it (along others too, in grouped weights)."""

    size: int
    channels: np.ndarray | None = None

    def staying(self, stays: np.ndarray) -> float:
        """What is left of the dimension, if these channels stay."""
        if self.channels is None:
            return self.size
        return self.size * float(stays[self.channels].mean())


@dataclass(frozen=True, eq=False)
class Entry:
    """One call of a layer in a forward pass."""

    times: LayerTimes
    rows: Width
    columns: Width

    def ms(self, stays: np.ndarray) -> float:
        """Milliseconds, if these channels stay."""
        return self.times.at(self.rows.staying(stays), self.columns.staying(stays))


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """Predicts the time of a forward pass from the channels that stay.

    Attributes:
        entries: The layers, in the order in which they run.
        scale: Time in the model for a millisecond alone.
        rest: Milliseconds that no channel changes.
    """

    entries: tuple[Entry, ...]
    scale: float = 1.0
    rest: float = 0.0

    def ms(self, stays: np.ndarray) -> float:
        """Predicted milliseconds, if these channels (of `Partition.count`) stay."""
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
    timer = timer or functools.partial(milliseconds, seconds=0.02, turns=5)
    space = groups[0].whole.partition
    known: dict[Any, LayerTimes] = {}
    entries = []
    for probe in track(_probes(model, space, images), "layer times"):
        if probe.key not in known:
            known[probe.key] = probe.measure(timer)
        entries.append(Entry(known[probe.key], probe.rows, probe.columns))
    layers = sum(entry.ms(np.ones(space.count, dtype=bool)) for entry in entries)
    # Layers may be slower alone than in the model, where their input is in the cache.
    return LatencyTable(tuple(entries), min(1.0, whole / layers) if entries else 1.0, max(0.0, whole - layers))


@dataclass(frozen=True, eq=False)
class _Probe:
    """A layer as it was called: what it takes to run it alone at other widths.

    Attributes:
        module: The layer.
        layer: How its integers follow from its weight; None for an activation or a pooling.
        x: Shape of its input.
        dim: The channels' dimension of its input.
        like: A tensor of the input's type, where the input was.
        rows: Dimension 0 of its weight, or the channels of its input where it has none.
        columns: Dimension 1 of its weight.
    """

    module: nn.Module
    layer: Layer | None
    x: tuple[int, ...]
    dim: int
    like: Tensor
    rows: Width
    columns: Width

    @property
    def key(self) -> Any:
        """The same for layers that take the same time; repr holds a layer's whole configuration."""
        return repr(self.module), self.x, self.like.dtype, self.rows.channels is None, self.columns.channels is None

    def measure(self, timer: Timer) -> LayerTimes:
        """Times the layer on the grid of its widths."""
        unit = self._unit()
        rows, columns = _points(self.rows, unit), _points(self.columns, 1)
        # The widest first: the longest time is the steadiest to compare with.
        times = timer([self._at(row, column) for row in reversed(rows) for column in reversed(columns)])
        ms = np.flip(np.reshape(times, (len(rows), len(columns))))
        # Whatever else the machine does only adds time, and a narrower layer takes no longer than a wider one.
        for axis in (0, 1):
            ms = np.flip(np.minimum.accumulate(np.flip(ms, axis), axis), axis)
        return LayerTimes(np.array(rows), np.array(columns), ms)

    def _unit(self) -> int:
        """What the rows are a multiple of."""
        if self.layer is None:
            return 1
        if self.layer.kind == "group_norm":
            return int(self.module.num_groups)  # type: ignore[arg-type]
        return self.layer.rows_a_group if self.layer.depthwise else self.layer.groups

    def _at(self, rows: int, columns: int) -> tuple[nn.Module, Tensor]:
        """The layer with a smaller weight, and an input that fits."""
        shape, module, inputs = list(self.x), self.module, rows
        if self.layer is not None:
            module, inputs = _cut(self.module, self.layer, rows, columns)
        shape[self.dim] = inputs
        return module, self.like.new_empty(shape).normal_()


def _cut(module: nn.Module, layer: Layer, rows: int, columns: int) -> tuple[nn.Module, int]:
    """A copy with a weight of this size, and its input channels."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    shape = (rows, columns, *weight.shape[2:]) if layer.kind in ("conv", "linear") else (rows, *weight.shape[1:])
    old, new = _widths(layer, tuple(weight.shape)), _widths(layer, shape)
    small = copy.copy(module)

    def part(name: str, tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not tensor.ndim:
            return tensor
        if name == "weight":
            return tensor.detach()[tuple(slice(size) for size in shape)].contiguous()
        return tensor.detach()[: new[1]].contiguous() if tensor.shape[0] == old[1] else tensor

    small._buffers = {name: part(name, buffer) for name, buffer in module._buffers.items()}
    small._parameters = {
        name: None if tensor is None else nn.Parameter(part(name, tensor), requires_grad=False)  # type: ignore[arg-type]
        for name, tensor in module._parameters.items()
    }
    for name, value in layer.integers(shape).items():
        setattr(small, name, type(getattr(module, name))(value))
    return small, new[0]


def _widths(layer: Layer, shape: tuple[int, ...]) -> tuple[int, int]:
    """Input and output channels of a layer whose weight has `shape`."""
    own = layer.integers(shape)
    if layer.kind == "conv":
        return own["in_channels"], own["out_channels"]  # type: ignore[return-value]
    return (shape[1], shape[0]) if layer.kind == "linear" else (shape[0], shape[0])


def _points(width: Width, unit: int) -> list[int]:
    """Sizes to measure at; multiples of 8 in wide layers, because odd widths are slow."""
    if width.channels is None:
        return [width.size]
    step = math.lcm(unit, 8) if width.size >= 64 else unit
    return sorted({max(step, round(share * width.size / step) * step) for share in WIDTHS[:-1]} | {width.size})


def _probes(model: nn.Module, space: Partition, images: Tensor) -> list[_Probe]:
    """The layers that channels make faster, from one forward pass under hooks."""
    layers = {layer.path: layer for layer in space.modules if layer.weight in space.tensors}
    probes: list[_Probe] = []
    inside: list[nn.Module] = []  # a norm may hold its activation

    def enter(module: nn.Module, _: Any) -> None:
        inside.append(module)

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any, layer: Layer | None) -> None:
        inside.pop()
        if inside or len(args) != 1 or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
            return
        x = args[0]
        # The channels of an activation's input are those of the layer that made it: a note on the tensor tells.
        width, dim = getattr(x, _NOTE, (None, 1))
        columns = Width(1)
        if layer is not None:
            dim = _channel_dim(module, layer, x)
            ids = space.tensors[layer.weight]
            width = Width(ids.shape[0], _along(ids, 0))
            if layer.kind in ("conv", "linear") and not layer.depthwise:
                columns = Width(ids.shape[1], _along(ids, 1))
        if width is None:
            return
        made = columns if layer is not None and layer.transposed and not layer.depthwise else width
        if output.ndim == x.ndim and output.shape[dim] == made.size:
            setattr(output, _NOTE, (made, dim))
        if width.channels is not None or columns.channels is not None:
            probes.append(_Probe(module, layer, tuple(x.shape), dim, x.new_empty(0), width, columns))

    with contextlib.ExitStack() as stack, evaluating(model), torch.no_grad():
        for path, module in model.named_modules():
            idle = isinstance(module, nn.Identity | nn.Flatten | DropoutNd)
            bare = not idle and not any(True for _ in (*module.children(), *module.parameters(), *module.buffers()))
            if (path in layers and "weight" in module._parameters) or bare:
                stack.callback(module.register_forward_pre_hook(enter).remove)
                hook = functools.partial(leave, layer=layers.get(path))
                stack.callback(module.register_forward_hook(hook).remove)
        model(images)
    return probes


def _channel_dim(module: Any, layer: Layer, x: Tensor) -> int:
    # A layer norm with a forward pass of its own may normalise dimension 1.
    last = type(module).forward is nn.LayerNorm.forward or x.shape[1] != len(module.weight)
    return x.ndim - 1 if layer.kind == "linear" or (layer.kind == "layer_norm" and last) else 1


def _along(ids: Labels, dim: int) -> np.ndarray | None:
    """Channels along a dimension, and along others that are tracked with it."""
    return next((layer for layer in ids.arrays if dim in support(layer)), None)
