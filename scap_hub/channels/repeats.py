"""Whether one recorded forward pass does the same as another: most models do in training mode what they do in eval."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from scap_hub.graph.node import Node, each, mapped
from scap_hub.graph.record import Capture

_MODES = ("train", "training", "use_input_stats", "dropout_p")
"""Arguments of operators that say in which mode they run: of norms, dropouts, attention."""


def matched(captured: Capture, first: Capture) -> dict[Node, Node] | None:
    """The nodes of one forward pass with the nodes of another that they repeat; None if it does not repeat it.

    It repeats it if it runs the same operators on the same tensors with the same numbers, up to those that say which
    mode the model is in. It may count (the batches that a norm has seen) beside that.

    Args:
        captured: The forward pass.
        first: The one that it may repeat, of the same model with the same inputs.
    """
    same: dict[Node, Node] = {}
    for nodes, others in ((captured.given, first.given), (captured.called, first.called)):
        rest = iter(others)
        expected = next(rest, None)
        for node in nodes:
            if expected is not None and _alike(node, expected, same):
                same[node] = expected
                expected = next(rest, None)
            elif not _counts(node):
                return None
        if expected is not None:
            return None
    outputs = [same.get(node) for node in captured.outputs]
    return same if outputs == first.outputs else None


def _alike(node: Node, other: Node, same: dict[Node, Node]) -> bool:
    """Whether two nodes are made in the same way."""
    if (node.target, node.state, node.owner, node.varies) != (other.target, other.state, other.owner, other.varies):
        return False
    if _shapes(node) != _shapes(other):
        return False
    if node.target is None:
        return node.state is not None or node.varies or _same_values(node.tensor, other.tensor)
    ours, theirs = _arguments(node), _arguments(other)
    if ours.keys() != theirs.keys():
        return False
    return all(
        _equal(mapped(own, lambda leaf: same.get(leaf) if isinstance(leaf, Node) else leaf), value)
        for own, value in zip(ours.values(), theirs.values(), strict=True)
    )


def _arguments(node: Node) -> dict[str, Any]:
    """What an operator is called with, without what says in which mode."""
    if not node.is_operator:
        return {**dict(zip(map(str, range(len(node.args))), node.args, strict=True)), **node.kwargs}
    return {name: value for name, value in node.arguments.items() if name not in _MODES}


def _equal(own: Any, other: Any) -> bool:
    """Whether two arguments are the same; nodes compare by identity."""
    return type(own) is type(other) and own == other


def _shapes(node: Node) -> list[Any]:
    """Shape and type of each tensor that a node stands for."""
    return [(tuple(tensor.shape), tensor.dtype) for tensor in _tensors(node)]


def _same_values(own: Tensor | None, other: Tensor | None) -> bool:
    """Whether two constants are the same; those on the meta device have no values that anything could depend on."""
    if own is None or other is None or own.is_meta or other.is_meta:
        return own is not None and other is not None and own.is_meta and other.is_meta
    return torch.equal(own, other)


def _counts(node: Node) -> bool:
    """Whether a node has no part in what the model computes from its inputs: whole numbers, made of whole numbers."""
    tensors = [leaf for own in (node, *node.sources) for leaf in _tensors(own)]
    return not node.varies and not any(tensor.is_floating_point() for tensor in tensors)


def _tensors(node: Node) -> Iterator[Tensor]:
    return (leaf for leaf in each([node.value]) if isinstance(leaf, Tensor))
