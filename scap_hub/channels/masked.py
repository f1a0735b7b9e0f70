"""The dense model with the channels that a plan removes masked.

Every removed parameter element is zeroed, as the plan says, and the dense graph is run as it was captured. Operators
whose result depends on how many channels there are (norms, means) are run on the surviving channels alone. Nothing of
the surgery is used, so a wrong index anywhere shows as a difference.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scap_hub.channels.labels import Labels, restricted, support
from scap_hub.channels.operators import Call, Trace, flat, has_rule, operator_of
from scap_hub.channels.partition import Partition, solve
from scap_hub.channels.proof import expected_numbers
from scap_hub.channels.trace import trace
from scap_hub.errors import VerificationError
from scap_hub.graph.copies import index_buffers
from scap_hub.graph.node import Node, mapped
from scap_hub.graph.record import capture
from scap_hub.graph.shapes import allocates, in_place
from scap_hub.plan import PruningPlan


def masked_output(
    dense: nn.Module, plan: PruningPlan, inputs: tuple[Any, ...], rounding: float | None = None
) -> list[Tensor]:
    """Output of the dense graph with everything that the plan removes masked; a flat list of its outputs.

    Args:
        dense: The dense model.
        plan: What is removed.
        inputs: Positional arguments of its forward pass.
        rounding: Every operator whose results have at least this relative rounding error makes another one on top of
            its own, the same ones each time; how much the output changes tells how far rounding can take it.
    """
    captured = capture(dense, inputs, numbers=index_buffers(dense), known=has_rule)
    found = trace(captured)
    partition = solve(captured, found, dense)
    masked = _Masked(found, _staying(plan, partition)[partition.channel_of], rounding)
    readers = Counter(source for node in captured.called for source in node.sources)
    readers.update(captured.outputs)
    for node in captured.called:
        for source in node.sources:
            if source not in masked.values:
                masked.values[source] = _given(source, plan)
        masked.values[node] = masked.run(node)
        readers.subtract(node.sources)
        for read in (node, *node.sources):
            if not readers[read]:  # nothing needs it any more, and activations are large
                del masked.values[read]
    return [masked.values[node] if node in masked.values else _given(node, plan) for node in captured.outputs]


def _given(node: Node, plan: PruningPlan) -> Tensor:
    """A parameter, buffer or constant, masked; a copy, because the graph may write to it."""
    assert node.tensor is not None
    return _masked(node.tensor.detach(), node.state, plan) if node.state else node.tensor.clone()


def _staying(plan: PruningPlan, partition: Partition) -> np.ndarray:
    """(channels,) whether each channel stays, by what the plan does to tensors.

    Raises:
        VerificationError: A tensor is cut without others that hold the same channels.
    """
    stays = partition.everything()
    for name, cut in plan.tensors.items():
        labels = partition.tensors.get(name)
        for dim, entry in cut.keep.items():
            line = labels.along(dim) if labels is not None else None
            if line is None:
                raise VerificationError(f"the plan cuts dimension {dim} of {name!r}, which carries no channels")
            stays[np.delete(line, plan.indices(entry))] = False
        if cut.blocks is not None and labels is not None:
            array = next((own for own in labels.arrays if support(own) == (0, 1)), None)
            if array is None:
                raise VerificationError(f"the plan cuts {name!r} by blocks, which it does not have")
            rows = np.split(array.reshape(labels.shape[:2]), len(cut.blocks))
            for block, entry in zip(rows, cut.blocks, strict=True):
                stays[np.delete(block, plan.indices(entry), axis=1)] = False
    for name, labels in partition.tensors.items():
        own = plan.tensors.get(name)
        left = restricted(labels, stays).shape
        cuts = {dim: len(plan.indices(entry)) for dim, entry in own.keep.items()} if own else {}
        if own and own.blocks is not None:
            cuts[1] = len(plan.indices(own.blocks[0]))
        if left != tuple(cuts.get(dim, size) for dim, size in enumerate(labels.shape)):
            raise VerificationError(
                f"the plan is wrong: {left} is what stays of the channels of {name!r}, and not what it leaves"
            )
    return stays


class _Masked:
    """Runs the dense operators; those that count channels see the survivors only."""

    def __init__(self, found: Trace, stays: np.ndarray, rounding: float | None) -> None:
        self.found, self.labels, self.stays, self.rounding = found, found.labels, stays, rounding
        self.values: dict[Node, Any] = {}
        self.generator = torch.Generator().manual_seed(0)

    def run(self, n: Node) -> Any:
        """What the node's operator makes of the values so far."""
        result = self._cleared(n, self._result(n))
        return mapped(result, self._rounded) if self.rounding and n.is_operator and allocates(n.target) else result

    def _cleared(self, n: Node, result: Any) -> Any:
        """A result in which removed elements that nobody should read are zero.

        Those of a weight that is computed, as those of a given one: `softplus(weight)` makes no zero of a zero. And
        those that are not finite: masked with zeros, a channel may be divided by zero, and NaN passes through weights
        that are zero.
        """
        labels = self.labels.get(n)
        if not isinstance(result, Tensor) or not result.is_floating_point() or not isinstance(labels, Labels):
            return result
        computed = not n.varies and n.is_operator and (allocates(n.target) or in_place(n.target))
        if computed or not result.sum().isfinite():
            gone = self._scatter(self._survivors(torch.ones(labels.shape), labels), labels).to(result.device) == 0
            result.masked_fill_(gone if computed else gone & ~result.isfinite(), 0)
        return result

    def _rounded(self, value: Any) -> Any:
        """A result with further rounding errors, relative to its elements or to their root mean square."""
        if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
            return value
        eps, sizes = torch.finfo(value.dtype).eps, value.abs()
        if self.rounding is None or eps < self.rounding:
            return value
        errors = torch.randn(value.shape, generator=self.generator).to(value)
        return value + eps * errors * sizes.maximum(sizes.square().mean().sqrt())

    def _result(self, n: Node) -> Any:
        known = operator_of(n) if n.is_operator else None
        if known is None or not known.counts(Call(n, self.found)) or not self._loses(n):
            return n.target(*self._read(n.args), **dict(zip(n.kwargs, self._read(n.kwargs.values()), strict=True)))
        compact = (mapped(value, self._compact) for value in n.arguments.values())
        arguments = dict(zip(n.arguments, compact, strict=True))
        for number in expected_numbers(Call(n, self.found), self.stays):
            if number.index is None:
                arguments[number.argument] = number.pruned
            else:
                arguments[number.argument] = list(arguments[number.argument])
                arguments[number.argument][number.index] = number.pruned
        result = n.target(**arguments)
        labels = flat(self.labels[n])
        if isinstance(result, Tensor):
            return _laid_out(self._scatter(result, labels[0]), n.value)
        full = [self._scatter(value, own) for value, own in zip(result, labels, strict=True)]
        return [_laid_out(value, like) for value, like in zip(full, n.value, strict=True)]

    def _read(self, values: Iterable[Any]) -> list[Any]:
        return [mapped(value, lambda leaf: self.values[leaf] if isinstance(leaf, Node) else leaf) for value in values]

    def _loses(self, n: Node) -> bool:
        read = [labels for node in n.sources for labels in flat(self.labels[node])]
        return any(not self.stays[array].all() for labels in read for array in labels.arrays)

    def _kept(self, labels: Labels) -> list[tuple[int, Tensor]]:
        """Of each dimension that loses elements which ones stay: a shape that broadcasts, indices along the dimension.

        The blocks of a grouped convolution's weight lose different columns, equally many each.
        """
        masks = {support(array): torch.from_numpy(self.stays[array]) for array in labels.arrays if support(array)}
        kept = []
        for dims, mask in sorted(masks.items(), key=lambda item: len(item[0])):
            for dim in dims[:-1]:
                if (dim,) in masks:
                    mask = mask.index_select(dim, masks[dim,].flatten().nonzero().flatten())
            stay = mask.movedim(dims[-1], -1)
            columns = stay.nonzero()[:, -1].view(*stay.shape[:-1], -1)
            kept.append((dims[-1], columns.movedim(-1, dims[-1])))
        return kept

    def _compact(self, leaf: Any) -> Any:
        if not isinstance(leaf, Node):
            return leaf
        value, labels = self.values[leaf], self.labels[leaf]
        return self._survivors(value, labels) if isinstance(value, Tensor) and isinstance(labels, Labels) else value

    def _survivors(self, value: Tensor, labels: Labels) -> Tensor:
        for dim, kept in self._kept(labels):
            value = value.take_along_dim(_stretched(kept.to(value.device), value.shape, dim), dim)
        return value

    def _scatter(self, value: Tensor, labels: Labels) -> Tensor:
        for dim, kept in reversed(self._kept(labels)):
            full = list(value.shape)
            full[dim] = labels.shape[dim]
            value = value.new_zeros(full).scatter(dim, _stretched(kept.to(value.device), value.shape, dim), value)
        return value


def _laid_out(value: Tensor, like: Tensor) -> Tensor:
    """The same values where the dense model has them in memory, because of some orders there are no views."""
    if value.stride() == like.stride():
        return value
    return value.new_empty_strided(like.shape, like.stride()).copy_(value)


def _stretched(indices: Tensor, shape: Sequence[int], dim: int) -> Tensor:
    """Indices along `dim` for a tensor of this shape."""
    return indices.expand([indices.shape[dim] if d == dim else size for d, size in enumerate(shape)])


def _masked(tensor: Tensor, name: str, plan: PruningPlan) -> Tensor:
    """The dense tensor with the removed elements zeroed."""
    cut = plan.tensors.get(name)
    if cut is None:
        return tensor.clone()
    mask = torch.ones_like(tensor, dtype=torch.bool)
    for dim, entry in cut.keep.items():
        gone = torch.ones(tensor.shape[dim], dtype=torch.bool, device=tensor.device)
        gone[plan.indices(entry)] = False
        mask.index_fill_(dim, gone.nonzero().flatten(), False)
    if cut.blocks is not None:
        for rows, entry in zip(mask.chunk(len(cut.blocks)), cut.blocks, strict=True):
            gone = torch.ones(tensor.shape[1], dtype=torch.bool, device=tensor.device)
            gone[plan.indices(entry)] = False
            rows.index_fill_(1, gone.nonzero().flatten(), False)
    return torch.where(mask, tensor, torch.zeros_like(tensor))
