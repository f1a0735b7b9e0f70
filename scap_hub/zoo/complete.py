"""Whether what a folder cuts is complete: every tensor with all that compute with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from scap_hub.errors import ModelError, PlanError
from scap_hub.graph.copies import without_weights
from scap_hub.graph.node import Node
from scap_hub.graph.record import capture

_ATEN = torch.ops.aten
_STRETCHES = (_ATEN.expand.default, _ATEN.copy_.default, _ATEN.prelu.default, _ATEN.linear.default)
"""Operators, besides those that work element by element, that repeat a dimension of size 1 without a word."""


def check_complete(dense: nn.Module, small: nn.Module, input_size: tuple[int, int, int]) -> None:
    """Runs both models on shapes alone.

    Layers that do not fit each other are an error of torch's. A width of 1 fits everything: it is repeated. So whatever
    has equally many elements in the dense model must have equally many in the pruned one.

    Args:
        dense: The model before; one that cannot be run on shapes is not looked at.
        small: The pruned model.
        input_size: (channels, height, width) in pixels.

    Raises:
        PlanError: A tensor is cut without the others that compute with it; names the operator and the module.
    """
    images = torch.zeros(1, *input_size, device="meta")
    try:
        before = capture(without_weights(dense), (images,)).called
    except ModelError:
        return
    try:
        after = capture(without_weights(small), (images,)).called
    except ModelError as error:
        raise PlanError(f"what is cut does not fit together: {error}") from None
    if [node.target for node in before] != [node.target for node in after]:
        raise PlanError("what is cut does not fit together: the pruned model runs other operators than the dense one")
    for theirs, ours in zip(before, after, strict=True):
        if _stretched(theirs, ours):
            raise PlanError(
                f"what is cut does not fit together: {ours.target} in {ours.owner!r} repeats a single channel where "
                "the dense model has one for each"
            )


def _stretched(dense: Node, small: Node) -> bool:
    """Whether sizes that are equal in an operator of the dense model differ in the pruned one."""
    if not (dense.target in _STRETCHES or torch.Tag.pointwise in getattr(dense.target, "tags", ())):
        return False
    sources = zip(dense.sources, small.sources, strict=False)
    pairs = [(_shape(theirs.value), _shape(ours.value)) for theirs, ours in sources]
    pairs.append((_shape(dense.value), _shape(small.value)))
    if dense.target is _ATEN.linear.default:  # of its weight, the rows and no columns meet the bias and the result
        _, (weight, small_weight), *rest = pairs
        pairs = [(weight[:-1], small_weight[:-1]), *rest]
    elif dense.target is _ATEN.prelu.default:  # the weight is one number for each channel
        pairs = [(x[1:2] if len(x) > 1 else x, y[1:2] if len(y) > 1 else y) for x, y in pairs]
    for before, after in pairs:
        for other, others in pairs:
            for dim in range(1, min(len(before), len(other)) + 1):
                if before[-dim] == other[-dim] and after[-dim] != others[-dim]:
                    return True
    return False


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) else ()
