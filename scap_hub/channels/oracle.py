"""The masking oracle: a pruned model must compute what the dense one does with the pruned channels masked.

Every removed parameter element is zeroed, as the plan says, and the dense graph is run as it was captured. Operators
whose result depends on how many channels there are (norms, means) are run on the surviving channels alone. Nothing of
the surgery is used, so a wrong index anywhere shows as a difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scap_hub.channels.labels import Labels, restricted, support
from scap_hub.channels.operators import Call, Trace, flat, operator_of
from scap_hub.channels.partition import Partition, solve
from scap_hub.channels.proof import expected_numbers
from scap_hub.channels.trace import trace
from scap_hub.errors import ScapHubError, UnverifiableError, VerificationError
from scap_hub.graph.copies import copied, index_buffers
from scap_hub.graph.modes import evaluating
from scap_hub.graph.node import Node, mapped
from scap_hub.graph.record import capture
from scap_hub.graph.values import is_tensor, tensors_of
from scap_hub.placement import placement
from scap_hub.plan import PruningPlan
from scap_hub.private import tree_map
from scap_hub.surgery import apply_plan

TOLERANCE = 1e-9
"""Largest relative difference in float64 that counts as equal; rounding gives 1e-15 to 1e-12."""
_CONDITIONING, _WORST_CONDITIONED = 100, 1e-6
"""A chaotic model (products of activations, large weights) amplifies rounding: it may differ by this many times what a
rounding error of its inputs makes of its outputs, and never by more than the second number."""
_NOTHING = PruningPlan(keeps=(), groups={}, tensors={})


def verify(model: nn.Module, plan: PruningPlan, inputs: tuple[Any, ...] | Tensor) -> float:
    """Compares the pruned model with the masked one, in float64 where the model runs so.

    Args:
        model: The dense model; untouched.
        plan: The plan to prove.
        inputs: Positional arguments of its forward pass; a single tensor stands for one argument.

    Returns:
        Largest absolute difference over all outputs, relative to the largest element of each.

    Raises:
        VerificationError: The pruned model does not run, or its outputs differ by more than 1e-9; where the model
            itself turns rounding errors of its inputs into more, by a hundred times that, at most 1e-6. In the
            model's own precision the bound is a hundred of its rounding errors, or of what the model makes of them.
        UnverifiableError: It is the dense model that cannot be compared: it is random, or computes what its operators
            do not show, or has no values, or no output to compare.
        PlanError: The plan does not fit the model.
    """
    arguments = (inputs,) if isinstance(inputs, Tensor) else inputs
    if any(tensor.is_meta for tensor in (*model.parameters(), *tensors_of(arguments))):
        raise UnverifiableError("the model or its input has no values (meta device): load its weights, then verify it")
    dense, arguments, tolerance, worst = _comparable(model, arguments)
    small = apply_plan(dense, plan)
    with torch.no_grad(), evaluating(small):
        try:
            pruned = _floats(small(*arguments))
        except Exception as error:
            raise VerificationError(f"the pruned model does not run: {type(error).__name__}: {error}") from error
        masked = _replayed(dense, plan, arguments)
        difference, allowed = _difference(pruned, masked), tolerance
        if difference > allowed:
            nudged = _floats(small(*_nudged(arguments)))
            allowed = min(max(allowed, _CONDITIONING * _difference(nudged, pruned)), worst)
        if not difference <= allowed:
            _check_dense(dense, arguments, allowed)
    if not difference <= allowed:
        wrong = VerificationError(
            f"the pruned model differs from the masked one by {difference:.1e} (relative; allowed {allowed:.0e}): "
            "the plan is wrong for this model, do not use it, and please report it"
        )
        wrong.difference = difference
        raise wrong
    return difference


def _comparable(model: nn.Module, arguments: tuple[Any, ...]) -> tuple[nn.Module, tuple[Any, ...], float, float]:
    """A copy and its inputs in float64, or in the model's own precision, with the bounds that go with it.

    Raises:
        UnverifiableError: The model does not run on these inputs, or returns nothing that can be compared.
    """
    reasons = []
    for dtype in (torch.float64, placement(model).dtype):
        try:
            dense = copied(model).to(dtype).eval()
            given = tree_map(lambda x: x.to(dtype) if is_tensor(x) and x.is_floating_point() else x, arguments)  # noqa: B023
            with torch.no_grad():
                returned = _floats(dense(*given))
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
            continue
        if not returned:
            raise UnverifiableError("the model returns no floating-point tensor, so there is nothing to compare")
        if dtype == torch.float64:
            return dense, given, TOLERANCE, _WORST_CONDITIONED
        rounding = torch.finfo(dtype).eps
        return dense, given, _CONDITIONING * rounding, _CONDITIONING**2 * rounding
    raise UnverifiableError(f"the dense model does not run on these inputs, in float64 or its own type: {reasons[-1]}")


def _check_dense(dense: nn.Module, arguments: tuple[Any, ...], allowed: float) -> None:
    """Tells whether it is the dense model that cannot be compared, once a comparison has failed."""
    with evaluating(dense):
        once, again = _floats(dense(*arguments)), _floats(dense(*arguments))
    if not _difference(once, again) <= allowed:
        raise UnverifiableError(
            "the dense model differs from itself between two runs, so nothing can be compared with it: something in it "
            "is random in eval mode (a dropout that is always on?)"
        )
    if not _difference(_replayed(dense, _NOTHING, arguments), once) <= allowed:
        raise UnverifiableError(
            "the dense model computes something that its recorded operators do not show (a fast path, values that pass "
            "through .data or numpy), so the pruned model cannot be compared with it"
        )


def _replayed(dense: nn.Module, plan: PruningPlan, arguments: tuple[Any, ...]) -> list[Tensor]:
    try:
        return [value for value in masked_output(dense, plan, arguments) if value.is_floating_point()]
    except ScapHubError:
        raise
    except Exception as error:
        if plan is _NOTHING:
            raise UnverifiableError(f"the dense model cannot be replayed: {type(error).__name__}: {error}") from error
        _replayed(dense, _NOTHING, arguments)  # accuses the dense model, if it is at fault
        raise VerificationError(
            f"the dense model with the pruned channels masked does not run: {type(error).__name__}: {error}"
        ) from error


def _floats(output: Any) -> list[Tensor]:
    """The floating-point tensors of an output."""
    return [tensor for tensor in tensors_of(output) if tensor.is_floating_point()]


def _difference(ours: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference over all outputs, each relative to its own largest element."""
    if len(ours) != len(expected) or not ours:
        raise VerificationError(f"{len(ours)} outputs cannot be compared with {len(expected)}")
    worst = 0.0
    for own, other in zip(ours, expected, strict=True):
        if own.shape != other.shape:
            raise VerificationError(f"an output has shape {tuple(own.shape)} instead of {tuple(other.shape)}")
        if other.numel():
            scale = other.abs().max().clamp(min=torch.finfo(other.dtype).tiny)
            worst = max(worst, float(((own - other).abs().max() / scale).nan_to_num(nan=float("inf"))))
    return worst


def _nudged(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs with a rounding error of their own."""
    generator = torch.Generator().manual_seed(0)

    def nudge(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return x * (1 + torch.finfo(x.dtype).eps * torch.randn(x.shape, generator=generator).to(x))

    return tree_map(nudge, inputs)


def masked_output(dense: nn.Module, plan: PruningPlan, inputs: tuple[Any, ...]) -> list[Tensor]:
    """Output of the dense graph with everything that the plan removes masked; a flat list of its outputs."""
    captured = capture(dense, inputs, numbers=index_buffers(dense))
    found = trace(captured)
    partition = solve(captured, found, dense)
    masked = _Masked(found, _staying(plan, partition)[partition.channel_of])
    for node in captured.given:
        assert node.tensor is not None
        # A copy, because the graph may write to it.
        masked.values[node] = _masked(node.tensor.detach(), node.state, plan) if node.state else node.tensor.clone()
    for node in captured.called:
        masked.values[node] = masked.run(node)
    return [masked.values[node] for node in captured.outputs]


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

    def __init__(self, found: Trace, stays: np.ndarray) -> None:
        self.found, self.labels, self.stays = found, found.labels, stays
        self.values: dict[Node, Any] = {}

    def run(self, n: Node) -> Any:
        """What the node's operator makes of the values so far."""
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
            return self._scatter(result, labels[0])
        return [self._scatter(value, own) for value, own in zip(result, labels, strict=True)]

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
        if isinstance(value, Tensor) and isinstance(labels, Labels):
            for dim, kept in self._kept(labels):
                value = value.take_along_dim(_stretched(kept.to(value.device), value.shape, dim), dim)
        return value

    def _scatter(self, value: Tensor, labels: Labels) -> Tensor:
        for dim, kept in reversed(self._kept(labels)):
            full = list(value.shape)
            full[dim] = labels.shape[dim]
            value = value.new_zeros(full).scatter(dim, _stretched(kept.to(value.device), value.shape, dim), value)
        return value


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
    return torch.where(mask, tensor, 0)


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every parameter and buffer a random value in place, so that no zero hides a fault; returns the model.

    Default initialisation zeroes gammas and biases, and fresh norm statistics are all alike: an index swap among
    equal numbers cannot be seen. Scales stay near 1 so that deep networks neither vanish nor overflow.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            if name.endswith("running_var"):
                tensor.copy_(0.5 + noise)
            elif tensor.ndim < 2:
                sign = torch.where(noise * 1000 % 2 < 1, 1.0, -1.0) if tensor.ndim else 1.0
                tensor.copy_((0.5 + noise) * sign)
            else:
                fan_in = max(1, tensor[0].numel())
                tensor.copy_((noise - 0.5) * 2 * (3 / fan_in) ** 0.5)
    return model
