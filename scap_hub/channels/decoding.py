"""What criteria ask of channel groups: where a tensor carries their channels, and which channels may be exchanged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from torch import nn

from scap_hub.channels.groups import ChannelGroup
from scap_hub.channels.labels import support
from scap_hub.channels.operators.table import adapting


def staying(groups: Sequence[ChannelGroup], keep: Mapping[str, Sequence[int]]) -> np.ndarray:
    """Which channels of the model stay if some groups keep only these channels.

    Args:
        groups: Groups of one model, at least one; those that `keep` does not name stay whole, and so does the rest of
            the model.
        keep: {group.name: channels of that group that stay}.

    Returns:
        (channels of the model,) bool.
    """
    return groups[0].whole.staying(keep)


def position_in(group: ChannelGroup, channels: np.ndarray) -> np.ndarray:
    """Where channels stand in a group.

    Args:
        group: The group.
        channels: Channels as the model numbers them, any shape; -1 for what is no channel.

    Returns:
        Of the same shape, 0 to `group.size - 1`; -1 for channels of other groups and for what is no channel.
    """
    position = np.full(max(int(channels.max(initial=-1)), int(group.channels.max())) + 2, -1)
    position[group.channels] = np.arange(group.size)
    return position[channels]  # -1 reads the last entry, which no channel has


def is_norm(module: nn.Module) -> bool:
    """Whether a module scales each of its channels after normalising: a batch, group, layer norm or the like."""
    known = adapting(module)
    return known is not None and known[0] in ("norm", "group_norm", "layer_norm")


def rows_of(group: ChannelGroup, tensor: str) -> np.ndarray:
    """Which of a group's channels each entry of a vector belongs to, such as the scale of a norm.

    Args:
        group: The group.
        tensor: Full name of a parameter or buffer with one dimension that carries channels.

    Returns:
        (entries,) 0 to `group.size - 1`; -1 for entries of other groups.
    """
    return position_in(group, group.whole.partition.tensors[tensor].arrays[0].reshape(-1))


def input_channels(group: ChannelGroup, weight: str, blocks: int) -> Iterator[tuple[int, np.ndarray]]:
    """Which channels a convolution's or linear layer's weight is multiplied with, on its dimension 1.

    The rows of a convolution with `groups` read different channels, so its weight falls into as many blocks of rows. A
    depthwise convolution yields nothing: its channels are those of its rows, and leave with them.

    Args:
        group: Any group of the model.
        weight: Full name of the weight.
        blocks: `groups` of the convolution; 1 for a linear layer.

    Yields:
        Number of a block, and the (inputs of the block,) channels as the model numbers them.
    """
    tensor = group.whole.partition.tensors.get(weight)
    if tensor is None:
        return
    rows, inputs = tensor.shape[:2]
    for array in tensor.arrays:
        if 1 in support(array):
            channels = np.broadcast_to(array.reshape(*array.shape[:2]), (rows, inputs))
            yield from enumerate(channels[:: rows // blocks])


def balance_classes(group: ChannelGroup) -> np.ndarray:
    """Which of a group's channels may leave for one another without upsetting a balance.

    Returns:
        (size,) class of each channel, from 0; channels of one class fill the same places in the blocks of every
        balance.
    """
    rows = [
        np.bincount(block, minlength=group.whole.partition.count)[group.channels]
        for balance in group.constraint or ()
        for block in balance.blocks
    ]
    if not rows:
        return np.zeros(group.size, dtype=np.int64)
    return np.unique(np.stack(rows), axis=1, return_inverse=True)[1].reshape(-1)
