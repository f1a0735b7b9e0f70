"""The layers of a model that get faster with fewer channels, and how each is run alone at other widths."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from scap_hub.channels.labels import Labels, support
from scap_hub.channels.partition import Partition, WeightedModule
from scap_hub.graph.record import evaluating
from scap_hub.timing.clock import Timer

WIDTHS = (0.125, 0.25, 0.5, 1.0)
"""Where a layer is measured, as fractions of its width."""
_IDLE = (
    nn.Identity, nn.Flatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)  # fmt: skip
"""Modules that take no time when a model is used."""


@dataclass(frozen=True, eq=False)
class LayerTimes:
    """Milliseconds of one layer by the sizes of its weight's first two dimensions; bilinear between what was measured.

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
    """One dimension of a weight, and the channels along it.

    Attributes:
        size: Of the dimension.
        channels: Numbers of the channels that stand along it (and along others, in the weight of a grouped
            convolution); None where none can go.
    """

    size: int
    channels: np.ndarray | None = None

    def staying(self, stays: np.ndarray) -> float:
        """What is left of the dimension when only the channels in this mask stay."""
        if self.channels is None:
            return self.size
        return self.size * float(stays[self.channels].mean())


@dataclass(frozen=True, eq=False)
class Probe:
    """A layer as it was called, with all that it takes to run it alone at other widths.

    Attributes:
        module: The layer.
        layer: How its integers follow from its weight; None for an activation or a pooling, which have no weight.
        x: Shape of its input.
        dim: The channels' dimension of its input.
        like: A tensor of the input's type, where the input was.
        rows: Dimension 0 of its weight, or the channels of its input where it has none.
        columns: Dimension 1 of its weight.
    """

    module: nn.Module
    layer: WeightedModule | None
    x: tuple[int, ...]
    dim: int
    like: Tensor
    rows: Width
    columns: Width

    @property
    def key(self) -> Any:
        """Equal for layers that take the same time; repr holds a layer's whole configuration."""
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


def _cut(module: nn.Module, layer: WeightedModule, rows: int, columns: int) -> tuple[nn.Module, int]:
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


def _widths(layer: WeightedModule, shape: tuple[int, ...]) -> tuple[int, int]:
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


def find_probes(model: nn.Module, partition: Partition, images: Tensor) -> list[Probe]:
    """The layers that channels make faster, in the order of one forward pass under hooks.

    Args:
        model: Unchanged on return.
        partition: Its channels.
        images: Its input, (N, C, H, W).
    """
    weighted = [layer for layer in partition.modules if layer.weight in partition.tensors]
    layers = {layer.path: layer for layer in weighted if layer.kind != "embedding"}  # looking up takes no time
    watch = _Watch(partition)
    with contextlib.ExitStack() as stack, evaluating(model), torch.no_grad():
        for path, module in model.named_modules():
            if (path in layers and "weight" in module._parameters) or _is_bare(module):
                stack.callback(module.register_forward_pre_hook(watch.enter).remove)
                hook = functools.partial(watch.leave, layer=layers.get(path))
                stack.callback(module.register_forward_hook(hook).remove)
        model(images)
    return watch.probes


def _is_bare(module: nn.Module) -> bool:
    """Whether a module computes something and holds nothing, as activations and poolings do."""
    holds = any(True for _ in (*module.children(), *module.parameters(), *module.buffers()))
    return not holds and not isinstance(module, _IDLE)


class _Watch:
    """Notices how layers are called.

    Attributes:
        probes: What was noticed.
    """

    def __init__(self, partition: Partition) -> None:
        self.probes: list[Probe] = []
        self._partition = partition
        self._inside: list[nn.Module] = []  # a norm may hold its activation: the outer one is timed with it
        # (Width, dim) of the tensors that the layers made: an activation's channels are those of its input.
        self._made = WeakTensorKeyDictionary()

    def enter(self, module: nn.Module, _: Any) -> None:
        """Before a layer runs."""
        self._inside.append(module)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any, layer: WeightedModule | None) -> None:
        """After it ran."""
        self._inside.pop()
        if self._inside or len(args) != 1 or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
            return
        x = args[0]
        if layer is not None:
            dim = _channel_dim(module, layer, x)
            rows, columns = self._widths(layer)
        elif x in self._made:
            (rows, dim), columns = self._made[x], Width(1)
        else:
            return
        made = columns if layer is not None and layer.transposed and not layer.depthwise else rows
        if output.ndim == x.ndim and output.shape[dim] == made.size:
            self._made[output] = made, dim
        if rows.channels is not None or columns.channels is not None:
            self.probes.append(Probe(module, layer, tuple(x.shape), dim, x.new_empty(0), rows, columns))

    def _widths(self, layer: WeightedModule) -> tuple[Width, Width]:
        """The first two dimensions of a layer's weight; the second is 1 where it does not count input channels."""
        labels = self._partition.tensors[layer.weight]
        rows, columns = Width(labels.shape[0], _along(labels, 0)), Width(1)
        if layer.kind in ("conv", "linear") and not layer.depthwise:
            columns = Width(labels.shape[1], _along(labels, 1))
        return rows, columns


def _channel_dim(module: Any, layer: WeightedModule, x: Tensor) -> int:
    """The dimension of a layer's input that its channels stand along."""
    # A layer norm with a forward pass of its own may normalise dimension 1.
    last = type(module).forward is nn.LayerNorm.forward or x.shape[1] != len(module.weight)
    return x.ndim - 1 if layer.kind == "linear" or (layer.kind == "layer_norm" and last) else 1


def _along(labels: Labels, dim: int) -> np.ndarray | None:
    """Channels along a dimension, and along others that are tracked with it; None where there are none."""
    return next((channels for channels in labels.arrays if dim in support(channels)), None)
