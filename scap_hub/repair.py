"""After surgery, before training: say the removed channels in terms of those that stay.

Each layer that reads pruned channels is re-solved by ridge least squares, so that from the kept channels it computes
what it computed from all of them, and batch-norm statistics are taken anew. Neither needs labels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.state import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn

from scap_hub.channels.capture import evaluating
from scap_hub.criteria.taps import images_of
from scap_hub.plan import PruningPlan
from scap_hub.progress import track

_ROWS_AN_UNKNOWN = 8
"""Patches to collect for each weight of an output channel; more change the solution by less than the ridge does."""


@dataclass
class _Statistics:
    """Second moments of a layer's input patches, by group: G = P Pᵀ, a constant 1 appended where there is a bias.

    Fewer patches than unknowns are kept as they are: the dual problem is smaller then.
    """

    gram: Tensor | None = None
    rows: Tensor | None = None

    def add(self, patches: Tensor) -> None:
        """Adds (groups, patches, unknowns)."""
        if self.gram is None:
            self.rows = patches if self.rows is None else torch.cat([self.rows, patches], dim=1)
            if self.rows.shape[1] < self.rows.shape[2]:
                return
            patches, self.rows = self.rows, None
            self.gram = patches.new_zeros(patches.shape[0], patches.shape[2], patches.shape[2])
        self.gram.baddbmm_(patches.mT, patches)

    def reduced(self) -> _Statistics:
        """The sum over all processes."""
        if PartialState().num_processes == 1:
            return self
        gram = self.gram
        if gram is None:
            assert self.rows is not None  # every process has images
            gram = self.rows.mT @ self.rows
        return _Statistics(gram=reduce(gram, reduction="sum"))


def compensate(
    dense: nn.Module, small: nn.Module, plan: PruningPlan, batches: Iterable[Any], ridge: float = 1e-2
) -> dict[str, tuple[float, float]]:
    """Re-solves in place every convolution and linear layer of `small` that lost inputs.

    For a layer with dense weight W, patches P of its dense input and kept patch rows K, the new weight is the minimum
    of |W P - W' P_K|² + λ |W' - W_K|², with λ the ridge times the mean diagonal of P_K P_Kᵀ. The ridge pulls towards
    the weights that are there, so the error on the calibration patches is never larger than without repair.

    Args:
        dense: The model before surgery, in eval mode.
        small: `apply_plan(dense, plan)`; changed in place.
        plan: What stays.
        batches: Calibration batches (this process's share); images only are used.
        ridge: λ relative to the mean energy of a kept input.

    Returns:
        For each repaired layer the relative squared output error on the patches, before and after.
    """
    layers = {path: layer for path, layer in _readers(dense, plan)}
    statistics = _collect(dense, layers, batches)
    errors = {}
    for path in track(layers, "repair"):
        target = small.get_submodule(path)
        errors[path] = _resolve(layers[path], target, path, plan, statistics[path].reduced(), ridge)
    return errors


def recalibrate(model: nn.Module, batches: Iterable[Any]) -> None:
    """Takes the running statistics of every batch norm anew, as plain averages over the batches and all processes."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    if not norms:
        return
    batches = list(batches)
    with evaluating(model), torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average
            norm.train()
        for batch in track(batches, "batch-norm statistics"):
            model(_fed(model, batch))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            for statistic in (norm.running_mean, norm.running_var):
                assert statistic is not None  # it tracks running statistics
                statistic.copy_(_mean_over_processes(statistic, len(batches)))


def _mean_over_processes(value: Tensor, weight: int) -> Tensor:
    if PartialState().num_processes == 1:
        return value
    total = reduce(torch.cat([value * weight, value.new_tensor([weight])]), reduction="sum")
    return total[:-1] / total[-1]


def _readers(dense: nn.Module, plan: PruningPlan) -> Iterator[tuple[str, nn.Module]]:
    """Layers whose weight loses inputs (dimension 1), in the model's order.

    A subclass with a forward pass of its own (weight standardisation, other padding) applies another weight than it
    holds, so it is left as it is.
    """
    plain = {kind.forward for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)}
    for path, module in dense.named_modules():
        cut = plan.tensors.get(f"{path}.weight")
        if type(module).forward in plain and cut is not None and (1 in cut.keep or cut.blocks is not None):
            yield path, module


def _collect(dense: nn.Module, layers: dict[str, nn.Module], batches: Iterable[Any]) -> dict[str, _Statistics]:
    statistics = {path: _Statistics() for path in layers}
    batches = list(batches)
    with contextlib.ExitStack() as stack, evaluating(dense), torch.no_grad():
        for path, layer in layers.items():

            def watch(module: nn.Module, args: tuple[Any, ...], path: str = path) -> None:
                statistics[path].add(_patches(module, args[0].detach(), len(batches)))

            handle = layer.register_forward_pre_hook(watch)
            stack.callback(handle.remove)
        for batch in track(batches, "input statistics"):
            dense(_fed(dense, batch))
    return statistics


def _patches(layer: nn.Module, x: Tensor, batches: int) -> Tensor:
    """Input patches of a layer, (groups, patches, unknowns), thinned evenly to what the solution needs."""
    rows = x.reshape(1, -1, x.shape[-1]) if isinstance(layer, nn.Linear) else _unfold(layer, x, batches)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    wanted = -(-_ROWS_AN_UNKNOWN * rows.shape[2] // batches)
    if rows.shape[1] > wanted:
        rows = rows[:, torch.linspace(0, rows.shape[1] - 1, wanted, device=rows.device).long()]
    if layer.bias is not None:
        rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], dim=2)
    return rows


def _unfold(layer: Any, x: Tensor, batches: int) -> Tensor:
    """(groups, patches, in / groups * window) of a convolution's input, on a coarser grid where it has many places."""
    spatial = x.ndim - 2
    if isinstance(layer.padding, str):
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        sides = [(t // 2, t - t // 2) if layer.padding == "same" else (0, 0) for t in total]
    else:
        sides = [(p, p) for p in layer.padding]
    if any(side != (0, 0) for side in sides):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, [amount for side in reversed(sides) for amount in side], mode=mode)
    # Windows by dimension: (N, C, places..., window...).
    unknowns = layer.in_channels // layer.groups * int(torch.tensor(layer.kernel_size).prod())
    places = x.shape[0] * x[0, 0].numel() / int(torch.tensor(layer.stride).prod())
    thin = max(1, int((places * batches / (_ROWS_AN_UNKNOWN * unknowns)) ** (1 / spatial) / 2))
    for dim in range(spatial):
        reach = layer.dilation[dim] * (layer.kernel_size[dim] - 1) + 1
        x = x.unfold(2 + dim, reach, layer.stride[dim] * thin)[..., :: layer.dilation[dim]]
    x = x.unflatten(1, (layer.groups, -1))
    places_dims, window_dims = range(3, 3 + spatial), range(3 + spatial, 3 + 2 * spatial)
    return x.permute(1, 0, *places_dims, 2, *window_dims).reshape(layer.groups, -1, unknowns)


def _resolve(
    layer: Any, target: Any, path: str, plan: PruningPlan, statistics: _Statistics, ridge: float
) -> tuple[float, float]:
    """Solves for one layer's weight; works in residuals, which hold what the kept weights leave unsaid."""
    cut = plan.tensors[f"{path}.weight"]
    groups = getattr(layer, "groups", 1)
    window = layer.weight[0, 0].numel() if layer.weight.ndim > 2 else 1
    rows = torch.tensor(plan.indices(cut.keep[0])) if 0 in cut.keep else torch.arange(layer.weight.shape[0])
    wide = layer.weight.detach().double().flatten(1).unflatten(0, (groups, -1))
    before = after = total = 0.0
    solved = []
    for group in range(groups):
        own = rows[(rows >= group * wide.shape[1]) & (rows < (group + 1) * wide.shape[1])] - group * wide.shape[1]
        entry = cut.blocks[group] if cut.blocks is not None else cut.keep[1]
        columns = torch.tensor(plan.indices(entry))
        kept = (columns[:, None] * window + torch.arange(window)).flatten()
        dense = wide[group, own.to(wide.device)]
        if layer.bias is not None:
            constant = torch.tensor([dense.shape[1]])
            kept = torch.cat([kept, constant])
            dense = torch.cat([dense, layer.bias.detach().double()[own + group * wide.shape[1], None]], dim=1)
        change, errors = _solved(dense, kept.to(dense.device), statistics, group, ridge)
        solved.append(dense[:, kept] + change)
        before, after, total = before + errors[0], after + errors[1], total + errors[2]
    weight = torch.cat(solved)
    with torch.no_grad():
        if layer.bias is not None:
            target.bias.copy_(weight[:, -1])
            weight = weight[:, :-1]
        target.weight.copy_(weight.reshape(target.weight.shape))
    return before / max(total, 1e-30), after / max(total, 1e-30)


def _solved(
    dense: Tensor, kept: Tensor, statistics: _Statistics, group: int, ridge: float
) -> tuple[Tensor, tuple[float, float, float]]:
    """Change of the kept weights, and the squared output error before, after, and of an output of zero."""
    residual = dense.clone()
    residual[:, kept] = 0
    eye = torch.eye(kept.numel() if statistics.rows is None else statistics.rows.shape[1], dtype=dense.dtype).to(dense)
    if statistics.gram is not None:
        gram = statistics.gram[group].double()
        own, cross = gram[kept][:, kept], residual @ gram[:, kept]
        scale = ridge * own.diagonal().mean().clamp(min=1e-12)
        change = torch.linalg.solve(own + scale * eye, cross.mT).mT
        before = ((residual @ gram) * residual).sum()
        after = before - 2 * (cross * change).sum() + ((change @ own) * change).sum()
        return change, (float(before), float(after), float(((dense @ gram) * dense).sum()))
    assert statistics.rows is not None
    patches = statistics.rows[group].double()
    missing, own = residual @ patches.mT, patches[:, kept]
    scale = ridge * own.square().sum(0).mean().clamp(min=1e-12)
    change = torch.linalg.solve(own @ own.mT + scale * eye, missing.mT).mT @ own
    error, whole = missing - change @ own.mT, dense @ patches.mT
    return change, (float(missing.square().sum()), float(error.square().sum()), float(whole.square().sum()))


def _fed(model: nn.Module, batch: Any) -> Tensor:
    parameter = next(model.parameters())
    return images_of(batch).to(parameter.device, parameter.dtype)
