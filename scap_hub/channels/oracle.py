"""The masking oracle: a pruned model must compute what the dense one does with the pruned channels masked.

The comparison runs in float64 where the model runs so and memory allows it, because there rounding is far below what
any wrong index does. In float32 the bound is what rounding errors in every operator do to the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scap_hub.channels.masked import masked_output
from scap_hub.channels.memory import fits
from scap_hub.channels.part import Part, part_of
from scap_hub.errors import ScapHubError, UnverifiableError, VerificationError
from scap_hub.graph.copies import copied
from scap_hub.graph.modes import evaluating
from scap_hub.graph.values import is_tensor, separate, tensors_of
from scap_hub.placement import placement
from scap_hub.plan import PruningPlan
from scap_hub.private import tree_map
from scap_hub.surgery import apply_plan
from scap_hub.text import one_line

TOLERANCE = 1e-9
"""Largest relative difference in float64 that counts as equal; rounding gives 1e-15 to 1e-12."""
_CONDITIONING, _WORST_CONDITIONED = 100, 1e-6
"""A chaotic model (products of activations, large weights) amplifies rounding: it may differ by this many times what a
rounding error of its inputs makes of its outputs, and never by more than the second number."""
_ROUNDING, _WORST_ROUNDING = 8, 1e-4
"""In other types the two may differ by this many times what a rounding error of every operator makes of the outputs;
where that is more than the second number, a wrong plan might hide in it."""
_SEEDS = 4
_NOTHING = PruningPlan(keeps=(), groups={}, tensors={})


@dataclass(frozen=True)
class Comparison:
    """What a right plan was found to be right by.

    Attributes:
        difference: Largest absolute difference over all outputs, relative to the largest element of each.
        allowed: Largest difference that counts as rounding.
        dtype: What the two models were compared in.
    """

    difference: float
    allowed: float
    dtype: torch.dtype


def verify(model: nn.Module, plan: PruningPlan, inputs: tuple[Any, ...] | Tensor, part: str | None = None) -> float:
    """Compares the pruned model with the masked one, in float64 where the model runs so and memory allows it.

    Args:
        model: The dense model; untouched.
        plan: The plan to prove.
        inputs: Positional arguments of its forward pass; a single tensor stands for one argument.
        part: Path of the part that the plan was made for by `channel_groups(..., part=...)`. It is compared by itself,
            with what reaches it, and then the whole model with the pruned part in it and with the masked one. Outputs
            of the whole that rounding changes, such as a choice among boxes of equal scores, are not compared.

    Returns:
        Largest absolute difference over all outputs, relative to the largest element of each.

    Raises:
        VerificationError: The pruned model does not run, or its outputs differ by more than 1e-9; where the model
            itself turns rounding errors of its inputs into more, by a hundred times that, at most 1e-6. In float32 the
            bound is eight times what a rounding error of every operator makes of the outputs.
        UnverifiableError: It is the dense model that cannot be compared: it is random, or computes what its operators
            do not show, or has no values, or no output to compare, or rounding hides what a wrong plan would do.
        PlanError: The plan does not fit the model.
    """
    if part is None:
        return compare(model, plan, inputs).difference
    whole = (inputs,) if isinstance(inputs, Tensor) else inputs
    alone, arguments = part_of(model, part, whole)
    return max(compare(alone, plan, arguments).difference, compare_whole(model, plan, whole, part).difference)


@dataclass(frozen=True)
class WholeComparison:
    """What a right plan of a part was found to be right by, with the part in its model.

    Attributes:
        difference: As in `Comparison`, over the part's outputs, and the model's where these are compared.
        outputs: Whether the model's outputs are compared. Not where a rounding error of the part's outputs changes
            them beyond that: a choice among boxes of equal scores is one thing or the other.
    """

    difference: float
    outputs: bool


def compare_whole(model: nn.Module, plan: PruningPlan, inputs: tuple[Any, ...], path: str) -> WholeComparison:
    """Compares a model in which one part is pruned with the one in which that part is masked, in float64.

    Args:
        model: The dense model; untouched.
        plan: Of the part; names are the model's.
        inputs: Positional arguments of the model, with values.
        path: Of the part.

    Raises:
        VerificationError: They differ, or the pruned model does not run.
        UnverifiableError: The dense model does not run in float64.
    """
    dense = copied(model).to(torch.float64).eval()
    given = tree_map(lambda x: x.to(torch.float64) if is_tensor(x) and x.is_floating_point() else x, inputs)
    alone = Part(copied(dense), path)

    def mask(arguments: tuple[Any, ...], output: Any) -> Any:
        masked = iter(masked_output(alone, plan, arguments))
        return tree_map(lambda leaf: next(masked) if is_tensor(leaf) else leaf, output)

    with torch.no_grad(), evaluating(dense):
        try:
            expected, of_part = _through(dense, path, given, mask)
        except ScapHubError:
            raise
        except Exception as error:
            raise UnverifiableError(
                f"the dense model does not run on these inputs in float64: {one_line(error)}"
            ) from error
        try:
            pruned, own = _through(apply_plan(dense, plan).eval(), path, given)
        except Exception as error:
            raise VerificationError(
                f"the model does not run with its part {path!r} pruned: {one_line(error)}"
            ) from error
        part, whole = _difference(own, of_part), _distance(pruned, expected)
        if part <= TOLERANCE < whole:
            for seed in range(_SEEDS):
                nudged, _ = _through(dense, path, given, lambda *call, seed=seed: _nudged(mask(*call), seed))
                if _distance(nudged, expected) > TOLERANCE:
                    return WholeComparison(part, False)
    if not max(part, whole) <= TOLERANCE:
        raise VerificationError(
            f"with its part {path!r} pruned the whole model differs by {max(part, whole):.1e} from the one with that "
            f"part masked (relative; allowed {TOLERANCE:.0e}): the plan is wrong for this model, do not use it"
        )
    return WholeComparison(max(part, whole), bool(expected))


def _through(
    model: nn.Module,
    path: str,
    inputs: tuple[Any, ...],
    change: Callable[[tuple[Any, ...], Any], Any] = lambda arguments, output: output,
) -> tuple[list[Tensor], list[Tensor]]:
    """Runs a model, with what one part returns changed on the way: its own outputs, and the part's."""
    found: list[Tensor] = []
    given: list[tuple[Any, ...]] = []

    def before(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        given.append(separate(arguments))

    def after(_: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        changed = change(given.pop(), output)
        found.extend(_floats(changed))
        return changed

    part = model.get_submodule(path)
    handles = part.register_forward_pre_hook(before), part.register_forward_hook(after)
    try:
        return _outputs(model, inputs), found
    finally:
        for handle in handles:
            handle.remove()


def _distance(ours: list[Tensor], expected: list[Tensor]) -> float:
    """As `_difference`; infinite where shapes differ, 0 where there is nothing to compare."""
    if [own.shape for own in ours] != [other.shape for other in expected]:
        return float("inf")
    return _difference(ours, expected) if expected else 0.0


def compare(model: nn.Module, plan: PruningPlan, inputs: tuple[Any, ...] | Tensor) -> Comparison:
    """As `verify`, and says in what precision and by which bound."""
    arguments = (inputs,) if isinstance(inputs, Tensor) else inputs
    if any(tensor.is_meta for tensor in (*model.parameters(), *tensors_of(arguments))):
        raise UnverifiableError("the model or its input has no values (meta device): load its weights, then verify it")
    reasons = ["there is too little memory"]
    for dtype in _precisions(model, arguments):
        try:
            dense, given = _comparable(model, arguments, dtype)
        except _DoesNotRunError as error:
            reasons.append(str(error))
            continue
        try:
            return _compared(dense, plan, given, dtype)
        except torch.OutOfMemoryError as error:
            reasons.append(str(error))
    raise UnverifiableError(f"the dense model does not run on these inputs, in float64 or its own type: {reasons[-1]}")


def _precisions(model: nn.Module, arguments: tuple[Any, ...]) -> Iterator[torch.dtype]:
    """The types to compare in, the best first."""
    if fits(model, arguments, torch.float64):
        yield torch.float64
    yield torch.float32
    if (own := placement(model).dtype) not in (torch.float64, torch.float32):
        yield own


def _compared(dense: nn.Module, plan: PruningPlan, arguments: tuple[Any, ...], dtype: torch.dtype) -> Comparison:
    """Compares the two in the type that the dense model has."""
    small = apply_plan(dense, plan)
    with torch.no_grad(), evaluating(small):
        try:
            pruned = _outputs(small, arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise VerificationError(f"the pruned model does not run: {type(error).__name__}: {error}") from error
        masked = _replayed(dense, plan, arguments)
        difference = _difference(pruned, masked)
        allowed = TOLERANCE if dtype == torch.float64 else 0.0
        if difference > TOLERANCE and dtype == torch.float64:
            nudged = _outputs(small, _nudged(arguments))
            allowed = min(max(allowed, _CONDITIONING * _difference(nudged, pruned)), _WORST_CONDITIONED)
        if difference > allowed or dtype != torch.float64:  # a model in float64 may compute a part of it in float32
            errors = _replayed(dense, plan, arguments, max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps))
            allowed = max(allowed, _ROUNDING * _difference(errors, masked))
        most = min(allowed, _WORST_ROUNDING)
        if not difference <= most:
            _check_dense(dense, arguments, most)
    if not difference <= allowed:
        wrong = VerificationError(
            f"the pruned model differs from the masked one by {difference:.1e} (relative; allowed {allowed:.0e}): "
            "the plan is wrong for this model, do not use it, and please report it"
        )
        wrong.difference = difference
        raise wrong
    if difference > _WORST_ROUNDING:
        raise UnverifiableError(
            f"rounding alone, with the model in {str(dtype).removeprefix('torch.')}, changes the outputs of the dense "
            f"model by {allowed / _ROUNDING:.0e}, behind which a wrong plan could hide"
        )
    return Comparison(difference, allowed, dtype)


class _DoesNotRunError(Exception):
    """The dense model does not run in some type."""


def _comparable(model: nn.Module, arguments: tuple[Any, ...], dtype: torch.dtype) -> tuple[nn.Module, tuple[Any, ...]]:
    """A copy and its inputs in some type.

    Where it returns the same for any image, such as zeros from a fresh head, all plans look right, and where it returns
    NaN, all look wrong: it gets random weights.

    Raises:
        _DoesNotRunError: The model does not run on these inputs.
        UnverifiableError: It returns nothing that can be compared.
    """
    try:
        dense = copied(model).to(dtype).eval()
        given = tree_map(lambda x: x.to(dtype) if is_tensor(x) and x.is_floating_point() else x, arguments)
        with torch.no_grad():
            for seed in (None, *range(_SEEDS)):
                if seed is not None:
                    randomize(dense, seed)
                returned = _outputs(dense, given)
                if says_something := _says_something(dense, given, returned):
                    break
    except Exception as error:
        raise _DoesNotRunError(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}") from error
    if not returned:
        raise UnverifiableError("the model returns no floating-point tensor, so there is nothing to compare")
    if not says_something and not _finite(returned):
        raise UnverifiableError("the model returns NaN or Inf for these inputs, which cannot be compared")
    if not says_something:
        raise UnverifiableError("the model returns the same for any input, in which a wrong plan would hide")
    return dense, given


def _says_something(dense: nn.Module, given: tuple[Any, ...], returned: Sequence[Tensor]) -> bool:
    """Whether outputs are numbers that depend on the images."""
    if not any(tensor.any() for tensor in returned) or not _finite(returned):
        return False
    noise = torch.Generator().manual_seed(0)

    def disturbed(x: Any) -> Any:
        if not is_tensor(x):
            return x
        if x.is_floating_point():
            return x + torch.randn(x.shape, generator=noise).to(x)
        # Pixels or indices in another order are as valid as they were.
        return x.flatten()[torch.randperm(x.numel(), generator=noise).to(x.device)].reshape(x.shape)

    try:
        changed = _outputs(dense, tree_map(disturbed, given))
    except Exception:
        return True  # it takes these images alone
    return len(returned) != len(changed) or not all(map(torch.equal, returned, changed))


def _finite(outputs: Sequence[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in outputs)


def _check_dense(dense: nn.Module, arguments: tuple[Any, ...], allowed: float) -> None:
    """Tells whether it is the dense model that cannot be compared, once a comparison has failed."""
    with evaluating(dense):
        once, again = _outputs(dense, arguments), _outputs(dense, arguments)
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


def _replayed(
    dense: nn.Module, plan: PruningPlan, arguments: tuple[Any, ...], rounding: float | None = None
) -> list[Tensor]:
    try:
        return [value for value in masked_output(dense, plan, arguments, rounding) if value.is_floating_point()]
    except (ScapHubError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if plan is _NOTHING:
            raise UnverifiableError(f"the dense model cannot be replayed: {type(error).__name__}: {error}") from error
        _replayed(dense, _NOTHING, arguments)  # accuses the dense model, if it is at fault
        raise VerificationError(
            f"the dense model with the pruned channels masked does not run: {type(error).__name__}: {error}"
        ) from error


def _outputs(model: nn.Module, arguments: tuple[Any, ...]) -> list[Tensor]:
    """What a model returns, which may write to what it is given."""
    return _floats(model(*separate(arguments)))


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


def _nudged(inputs: Any, seed: int = 0) -> Any:
    """The inputs with a rounding error of their own."""
    generator = torch.Generator().manual_seed(seed)

    def nudge(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return x * (1 + torch.finfo(x.dtype).eps * torch.randn(x.shape, generator=generator).to(x))

    return tree_map(nudge, inputs)


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every parameter and buffer a random value in place, so that no zero hides a fault; returns the model.

    Default initialisation zeroes gammas and biases, and fresh norm statistics are all alike: an index swap among
    equal numbers cannot be seen. Scales stay near 1 so that deep networks neither vanish nor overflow.
    """
    generator = torch.Generator().manual_seed(seed)
    buffers = dict(model.named_buffers())
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *buffers.items()]:
            if not tensor.is_floating_point():
                continue
            noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            if name.endswith("running_var"):
                tensor.copy_(0.5 + noise)
            elif name in buffers and tensor.numel() and tensor.min() > 0:
                tensor.copy_(1 + noise)  # a variance, say, of which a root is taken, or the probability 1
            elif tensor.ndim < 2:
                sign = torch.where(noise * 1000 % 2 < 1, 1.0, -1.0) if tensor.ndim else 1.0
                tensor.copy_((0.5 + noise) * sign)
            else:
                fan_in = max(1, tensor.shape[1:].numel())
                tensor.copy_((noise - 0.5) * 2 * (3 / fan_in) ** 0.5)
    return model
