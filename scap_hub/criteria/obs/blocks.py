"""The blocks of weights that read a group: which columns they have, and how they are read and written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scap_hub.channels.decoding import input_channels, position_in
from scap_hub.channels.groups import ChannelGroup
from scap_hub.criteria.obs.elimination import CompensatedWeight
from scap_hub.criteria.patches import PatchLayer

COLUMNS = 4608  # of a block; of more, each channel keeps those with the largest weights

BlockKey = tuple[str, int]
"""Path of a layer, and number of a block of its rows."""


@dataclass(frozen=True, eq=False)
class ConsumerBlock:
    """The rows of one layer that read the same columns: all of them, or one group of a convolution.

    Attributes:
        path: Of the layer.
        number: Of the block.
        channel: (m,) the channel, as the model numbers them, that each column of the block's weight reads; -1 for the
            bias, which stands last where there is one.
        columns: (n,) the columns that are looked at.
    """

    path: str
    number: int
    channel: np.ndarray
    columns: np.ndarray

    @property
    def key(self) -> BlockKey:
        """What tells it from all other blocks of a model."""
        return self.path, self.number

    def group_channels(self, group: ChannelGroup) -> Tensor:
        """(n,) which of a group's channels each of `columns` reads, -1 for others."""
        return torch.from_numpy(position_in(group, self.channel[self.columns]))


Compensated = list[tuple[ConsumerBlock, CompensatedWeight]]
"""The blocks that read a group, each with its weight."""


def consumer_blocks(model: nn.Module, group: ChannelGroup, stays: np.ndarray) -> list[ConsumerBlock]:
    """The convolutions and linear layers that read a group, block by block.

    Args:
        model: The model.
        group: The group.
        stays: (channels of the model,) bool; columns of channels that have left are not looked at.
    """
    found = []
    for path in group.consumers:
        layer = model.get_submodule(path)
        if not isinstance(layer, PatchLayer):
            continue
        window = layer.weight[0, 0].numel()
        bias = np.full(int(layer.bias is not None), -1)
        for number, inputs in input_channels(group, f"{path}.weight", blocks_of(layer)):
            channel = np.concatenate([inputs.repeat(window), bias])
            columns = np.flatnonzero((channel >= 0) & stays[channel])
            if (position_in(group, channel[columns]) < 0).all():
                continue
            if columns.size > COLUMNS:
                columns = _heaviest(layer, number, columns, channel)
            found.append(ConsumerBlock(path, number, channel, np.append(columns, np.flatnonzero(channel < 0))))
    return found


def blocks_of(layer: nn.Module) -> int:
    """Into how many blocks of rows, which read different inputs, a layer's weight falls."""
    return getattr(layer, "groups", 1)


def _heaviest(layer: PatchLayer, number: int, columns: np.ndarray, channel: np.ndarray) -> np.ndarray:
    """Of each channel's columns, those with the largest weights, so that there are about `COLUMNS` in all."""
    weight = layer.weight.detach().flatten(1).double().chunk(blocks_of(layer))[number]
    energy = weight.square().sum(0).cpu().numpy()[columns]
    order = np.lexsort((-energy, channel[columns]))
    ordered = channel[columns][order]
    start = np.searchsorted(ordered, ordered)
    share = max(1, COLUMNS // np.unique(ordered).size)
    return np.sort(columns[order[np.arange(order.size) - start < share]])


def weight_of(model: nn.Module, block: ConsumerBlock) -> Tensor:
    """The block's weight with the bias behind it, (O / groups, m) float64."""
    layer: Any = model.get_submodule(block.path)
    weight = layer.weight.detach().double().flatten(1)
    if layer.bias is not None:
        weight = torch.cat([weight, layer.bias.detach().double()[:, None]], 1)
    return weight.chunk(blocks_of(layer))[block.number]


def compensated_weight(
    model: nn.Module, block: ConsumerBlock, compensating: CompensatedWeight, stays: np.ndarray
) -> Tensor:
    """A block's weight of which channels have left, as `weight_of` gives it.

    Args:
        model: The dense model.
        block: The block.
        compensating: Its weight, compensated for them.
        stays: (channels of the model,) bool; columns of channels that have left are 0.
    """
    compensating.compact()
    weight = weight_of(model, block).clone()
    weight[:, torch.from_numpy((block.channel >= 0) & ~stays[block.channel])] = 0
    weight[:, torch.from_numpy(block.columns)[compensating.columns.cpu()]] = compensating.weight
    return weight


def write_compensated(model: nn.Module, compensated: Compensated, stays: np.ndarray) -> None:
    """Puts compensated weights into the model.

    Args:
        model: Changed in place.
        compensated: The blocks with their weights.
        stays: See `compensated_weight`.
    """
    for block, compensating in compensated:
        layer: Any = model.get_submodule(block.path)
        height = len(layer.weight) // blocks_of(layer)
        rows = slice(block.number * height, (block.number + 1) * height)
        weight = compensated_weight(model, block, compensating, stays)
        with torch.no_grad():
            if layer.bias is not None:
                layer.bias[rows] = weight[:, -1].to(layer.bias)
                weight = weight[:, :-1]
            layer.weight[rows] = weight.reshape(layer.weight[rows].shape).to(layer.weight)


def by_layer(blocks: Iterable[ConsumerBlock]) -> dict[str, list[ConsumerBlock]]:
    """Distinct blocks by the path of their layer."""
    layers: dict[str, list[ConsumerBlock]] = {}
    for block in {block.key: block for block in blocks}.values():
        layers.setdefault(block.path, []).append(block)
    return layers
