"""Channel groups: the sets of channels that can leave a model together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Tap:
    """Where one producer of a group can be watched while the model runs.

    Attributes:
        module: Path of the convolution or linear layer; its input is the layer's input X,
            (N, C, H, W) for a convolution, (N, ..., C) for a linear layer.
        weight: Full name of its weight parameter; dim 0 are the output channels.
        channel_of_row: (O,) int64; which of the group's channels each output row belongs to, -1 for none.
        output: Path of the module whose output, after `post`, is the channels as the next layer
            sees them: after the producer's own norm and activation.
        post: Elementwise functions still to apply to that output, in order.
        dim: The channel dimension of that output (1 for NCHW, -1 for channels-last).
    """

    module: str
    weight: str
    channel_of_row: np.ndarray
    output: str
    post: tuple[Callable[[Tensor], Tensor], ...]
    dim: int


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that are produced, carried and consumed by the same parameters.

    Attributes:
        name: Module path of the first producer; stable across runs.
        size: Number of channels that can go one by one.
        producers: Module paths of the layers that compute the channels.
        consumers: Module paths of the layers that read them.
        members: (parameter or buffer name, dim) pairs that shrink with the group.
        constraint: None, or what must stay balanced with what.
        prunable: Whether any channel may go.
        pinned_because: Why not, if not.
        taps: One per producer, in the order of `producers`.
    """

    name: str
    size: int
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    members: tuple[tuple[str, int], ...]
    constraint: object | None
    prunable: bool
    pinned_because: str | None
    taps: tuple[Tap, ...] = ()
