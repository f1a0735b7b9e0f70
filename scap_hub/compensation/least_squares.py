"""Least squares: say the removed channels in terms of those that stay.

Each layer that reads pruned channels is re-solved, so that from what it reads now it computes what it computed in the
dense model.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from functools import partial
from math import ceil
from typing import Any

import torch
from accelerate.state import PartialState
from torch import Tensor, nn

from scap_hub.compensation.batch_norm import fresh_statistics
from scap_hub.compensation.processes import one_process, sum_over_processes
from scap_hub.criteria.calibration import images_of, input_of, total_images
from scap_hub.criteria.patches import PatchLayer, outputs_at_patches, patches
from scap_hub.errors import CalibrationError, RecipeError
from scap_hub.graph.record import evaluating
from scap_hub.placement import fed
from scap_hub.plan import PruningPlan
from scap_hub.private import tree_leaves, unobserved
from scap_hub.progress import track

_PATCHES = 8  # for each weight of an output channel, over all images
_PLACES = 16  # of each image, at least: with fewer, narrow layers fit the noise of their patches
_RIDGE = 1e-10  # at least: inputs may be constant or the same
_BYTES = 2**30  # of the largest map in the model: all images pass through it together
_ROWS = 4096  # that are brought to double precision at a time


def compensate(
    dense: nn.Module,
    small: nn.Module,
    plan: PruningPlan,
    batches: Iterable[Any],
    ridge: float = 1e-2,
    *,
    batch_norm: bool = False,
) -> dict[str, tuple[float, float]]:
    """Re-solves in place every convolution and linear layer of `small` that lost inputs, in the order they run in.

    For a layer with weight W that reads patches P, behind layers that are re-solved already, and the outputs Y that it
    has in `dense` at the same places, the new weight is the minimum of |Y - W' P|² + λ |W' - W|², with λ the ridge
    times the mean diagonal of P Pᵀ; the bias is free of it. The ridge pulls towards the weights that are there, so the
    error on the patches is never larger than with them; and what the layers before have got wrong is made good where it
    can be (asymmetric reconstruction: Zhang et al., 2015, arXiv 1505.06798). It takes one forward pass of each model.

    Args:
        dense: The model before surgery, in eval mode.
        small: `apply_plan(dense, plan)`; changed in place.
        plan: What stays.
        batches: Calibration batches (this process's share); images only are used, as many as pass through together.
        ridge: λ relative to the mean energy of an input.
        batch_norm: Whether batch norms take their statistics anew on the way, as `recalibrate` does afterwards.

    Returns:
        For each repaired layer the relative squared output error on the patches, before and after.

    Raises:
        CalibrationError: Fewer than 2 images, or images that give NaN or Inf.
        RecipeError: The ridge is negative, or not finite.
    """
    if not 0 <= ridge < math.inf:
        raise RecipeError(f"ridge = {ridge}: give a number that is not negative, such as 0.01")
    paths = list(_lost_inputs(dense, plan))
    shares = [images_of(batch) for batch in batches]
    total_images(sum(map(len, shares)))
    images = fed(dense, torch.cat(shares))
    images = images[: max(1, _BYTES // _largest(dense, images[:1]))]
    places = {path: _places(small.get_submodule(path), len(images)) for path in paths}
    wanted = _outputs(dense, plan, places, images)
    errors: dict[str, tuple[float, float]] = {}

    @unobserved
    def solve(path: str, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if path in wanted:  # a layer that runs several times is solved when it runs first
            rows = patches(layer, input_of(args, kwargs), len(images), places[path])
            errors[path] = _resolve(path, layer, rows, wanted.pop(path), ridge)
            bar.update()

    with track(paths, "repair") as bar, evaluating(small), torch.no_grad(), contextlib.ExitStack() as stack:
        if batch_norm:
            stack.enter_context(fresh_statistics(small, 1))
        for path in paths:
            layer = small.get_submodule(path)
            stack.callback(layer.register_forward_pre_hook(partial(solve, path), with_kwargs=True).remove)
        small(fed(small, images))
    return errors


def _lost_inputs(dense: nn.Module, plan: PruningPlan) -> Iterator[str]:
    """Layers whose weight loses inputs (dimension 1).

    A subclass with a forward pass of its own (weight standardisation, other padding) applies another weight than it
    holds, so it is left as it is; and so is one of which a hook changes what goes in or out.
    """
    plain = {kind.forward for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)}
    for path, module in dense.named_modules():
        cut = plan.tensors.get(f"{path}.weight")
        hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        loses = cut is not None and (1 in cut.keep or cut.blocks is not None)
        if type(module).forward in plain and loses and not hooked:
            yield path


def _largest(dense: nn.Module, image: Tensor) -> int:
    """Bytes of the largest map that a module gives for one image."""
    found = [image.nbytes]
    with contextlib.ExitStack() as stack, evaluating(dense), torch.no_grad():
        for module in dense.modules():

            def after(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
                found.extend(leaf.nbytes for leaf in tree_leaves(result) if isinstance(leaf, Tensor))

            stack.callback(module.register_forward_hook(after).remove)
        dense(fed(dense, image))
    return max(found)


def _places(layer: Any, images: int) -> int:
    """How many places of each image to read."""
    return max(_PLACES, ceil(_PATCHES * layer.weight[0].numel() / (images * PartialState().num_processes)))


def _outputs(dense: nn.Module, plan: PruningPlan, places: dict[str, int], images: Tensor) -> dict[str, Tensor]:
    """What each layer computes for the channels that stay, (blocks, patches, O / blocks)."""
    found: dict[str, Tensor] = {}

    def read(path: str, layer: PatchLayer, x: Tensor, y: Tensor) -> None:
        if path not in found:
            keep = plan.tensors[f"{path}.weight"].keep
            rows = outputs_at_patches(layer, y, len(images), places[path])
            rows = rows[:, plan.indices(keep[0])] if 0 in keep else rows
            found[path] = rows.unflatten(1, (getattr(layer, "groups", 1), -1)).transpose(0, 1)

    with _watched(dense, places, read):
        dense(fed(dense, images))
    return found


@contextlib.contextmanager
def _watched(dense: nn.Module, paths: Iterable[str], read: Any) -> Iterator[None]:
    """Eval mode without gradients, in which these layers, once they have run, are read: `read(path, layer, x, y)`."""

    @unobserved
    def after(path: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
        read(path, layer, input_of(args, kwargs), y)

    with contextlib.ExitStack() as stack, evaluating(dense), torch.no_grad():
        for path in paths:
            layer = dense.get_submodule(path)
            stack.callback(layer.register_forward_hook(partial(after, path), with_kwargs=True).remove)
        yield


def _resolve(path: str, layer: Any, rows: Tensor, wanted: Tensor, ridge: float) -> tuple[float, float]:
    """Changes a layer's weight so that it computes the wanted outputs, (blocks, patches, O), from these patches."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    weight = layer.weight.detach().to(rows.dtype).flatten(1)
    if layer.bias is not None:
        rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], dim=2)
        weight = torch.cat([weight, layer.bias.detach().to(rows.dtype)[:, None]], dim=1)
    try:
        blocks = [
            _solved(inputs, y.to(rows.dtype), block, ridge, layer.bias is not None)
            for inputs, y, block in zip(rows, wanted, weight.chunk(len(rows)), strict=True)
        ]
        weight = torch.cat([solved for solved, _ in blocks])
        if not weight.isfinite().all():
            raise FloatingPointError
    except FloatingPointError:
        raise CalibrationError(
            f"NaN or Inf in what layer {path!r} is given; check the images and the weights"
        ) from None
    if layer.bias is not None:
        layer.bias.copy_(weight[:, -1])
        weight = weight[:, :-1]
    layer.weight.copy_(weight.reshape(layer.weight.shape))
    before, after, total = torch.stack([errors for _, errors in blocks]).sum(0).tolist()
    return before / max(total, 1e-30), after / max(total, 1e-30)


def _solved(rows: Tensor, wanted: Tensor, weight: Tensor, ridge: float, intercept: bool) -> tuple[Tensor, Tensor]:
    """The new weight, float64, and the squared errors before, after, and of an output of zero.

    Works in residuals, which hold what the weights that are there leave unsaid. With fewer patches than unknowns, the
    dual problem is smaller; there an intercept, the last column, is taken out by centring.
    """
    residual = wanted - rows @ weight.T
    errors = torch.stack([residual.double().square().sum(), wanted.double().square().sum()])
    if one_process() and len(rows) < rows.shape[1]:
        rows, residual = rows.double(), residual.double()
        at, over = (x.mean(0) if intercept else torch.zeros_like(x[0]) for x in (rows, residual))
        centred = rows - at  # which leaves a column of zeros for the intercept
        energy = _energy(rows.square().sum(0), intercept)
        change = _regular(centred @ centred.T, residual - over, ridge, energy.expand(len(rows))).T @ centred
        if intercept:
            change[:, -1] = over - change @ at
        after = (residual - rows @ change.T).square().sum()
    else:
        gram, cross = (sum_over_processes(_product(rows, other)) for other in (rows, residual))
        errors = sum_over_processes(errors)
        penalty = _energy(gram.diagonal(), intercept).repeat(len(gram))
        if intercept:
            penalty[-1] = 0
        change = _regular(gram, cross, ridge, penalty).T
        after = errors[0] - 2 * (cross.T * change).sum() + ((change @ gram) * change).sum()
    return weight.double() + change, torch.stack([errors[0], after.clamp(min=0), errors[1]])


def _product(left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ right in double precision: in single precision its rounding is as large as a ridge of 1e-6."""
    parts = zip(left.split(_ROWS), right.split(_ROWS), strict=True)
    return sum(a.double().T @ b.double() for a, b in parts)


def _energy(squares: Tensor, intercept: bool) -> Tensor:
    """Mean energy of the inputs, which the ridge is relative to; it may be zero."""
    return (squares[:-1] if intercept and len(squares) > 1 else squares).mean().clamp(min=1e-12)


def _regular(gram: Tensor, right: Tensor, ridge: float, penalty: Tensor) -> Tensor:
    """Solves with the diagonal raised by the ridge times each unknown's penalty."""
    if not gram.isfinite().all():
        raise FloatingPointError
    factor, failed = torch.linalg.cholesky_ex(gram + torch.diag(max(ridge, _RIDGE) * penalty))
    if failed:
        raise RecipeError(f"ridge = {ridge:g} leaves a layer's normal equations singular; raise it, such as to 0.01")
    return torch.cholesky_solve(right, factor)
