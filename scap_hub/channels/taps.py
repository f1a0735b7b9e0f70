"""Where a producer's channels can be watched while the model runs."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from scap_hub.channels.operators import Producer, Trace, role_of
from scap_hub.graph.node import Node
from scap_hub.graph.record import Capture


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


def module_calls(captured: Capture) -> Counter[str]:
    """How often a forward pass calls each module."""
    calls = {call for node in (*captured.given, *captured.called) for call in node.calls}
    return Counter(path for _, path in calls)


def tap(found: Trace, producer: Producer, channel_of_row: np.ndarray, calls: Counter[str]) -> Tap | None:
    """The furthest point after a producer, through its own norm and activation, that a hook can reach.

    None for a weight that is used without calling the module that owns it, or by one that does more than that.
    """
    path = producer.weight.rpartition(".")[0]
    chain = _chain(producer.node)
    reached = [i for i, node in enumerate(chain) if _leaves(node) and (i == 0 or calls[node.owner] == 1)]
    if producer.node.owner != path or not reached or not _enters(producer.node):
        return None
    reach = max(reached)
    post = list(itertools.takewhile(lambda node: role_of(node) == "activation", chain[reach + 1 :]))
    watched = found.labels[chain[reach]]
    dim = next(dim for dim, labels in watched.lines() if np.isin(labels, producer.labels).all())
    return Tap(
        path,
        producer.weight,
        channel_of_row,
        chain[reach].owner,
        tuple(_applied(node) for node in post),
        -1 if dim == len(watched.shape) - 1 else dim,
    )


def _chain(node: Node) -> list[Node]:
    """The producer and the norm, activation and layout operators that alone follow it."""
    chain = [node]
    while len(chain[-1].users) == 1:
        following = next(iter(chain[-1].users))
        if not role_of(following):
            break
        chain.append(following)
    return chain


def _enters(node: Node) -> bool:
    """Whether what the node's layer reads comes into its module as it is, but for what is padded around it."""
    read = next(iter(node.args))
    while isinstance(read, Node) and read.name in ("pad", "constant_pad_nd", "reflection_pad2d", "replication_pad2d"):
        read = next(iter(read.args))
    return isinstance(read, Node) and node.owner not in (path for _, path in read.calls)


def _leaves(node: Node) -> bool:
    """Whether the node is the last of its module's call: whoever reads it stands outside of that module."""
    path = node.owner
    return bool(path) and all(path not in (outer for _, outer in user.calls) for user in node.users)


def _applied(node: Node) -> Callable[[Tensor], Tensor]:
    """The node's operator as a function of its first argument, never in place."""
    target: Any = node.target
    rest, options = node.args[1:], node.kwargs
    if node.op.startswith(f"{node.name}_."):
        return lambda x: target(x.clone(), *rest, **options)
    return lambda x: target(x, *rest, **options)
