"""A second opinion on pruned models: nothing of the package's oracle, labels or trace is used here, only the plan.

Removing a channel must be the same as nobody reading it. `reference` makes that model from the dense one, by two rules:

* `"readers"`: zero the weights' columns that would read a removed channel; nothing else changes. Exact where channels
  are read by weights alone.
* `"all"`: zero every removed element, at the producers too, so that the dense model really has zeros there. Exact also
  where activations read each other (a product of two feature maps, a sum over channels).

Layers whose result depends on how many channels there are (layer norm, group norm, weight standardisation) are defined
over the surviving channels. The reference swaps them for plain spellings of that, below.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import scap_hub

TOLERANCE = 1e-9
"""Relative difference in float64; rounding gives 1e-15 to 1e-12."""


def random_values(net: nn.Module, seed: int = 0) -> nn.Module:
    """Random parameters and statistics in place, so that no zero and no two equal numbers hide a fault."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
            if not tensor.is_floating_point() or not tensor.numel():
                continue
            noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            sign = torch.where(torch.rand(tensor.shape, generator=generator) < 0.5, -1.0, 1.0)
            if "running_var" in name:
                tensor.copy_(noise + 0.5)
            elif tensor.ndim < 2 or tensor.numel() == max(tensor.shape):
                tensor.copy_((noise + 0.5) * sign)
            else:
                tensor.copy_((noise - 0.5) * 2 * (3 / max(1, tensor[0].numel())) ** 0.5)
    return net


def leaves(output: Any) -> Iterator[Tensor]:
    """Every floating-point tensor of an output, also those inside dicts, named tuples and objects."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from leaves(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from leaves(value)
    elif hasattr(output, "__dict__"):
        yield from leaves(vars(output))


def difference(ours: Any, theirs: Any) -> float:
    """Largest difference, each tensor relative to its own largest element; infinite where shapes differ."""
    left, right = list(leaves(ours)), list(leaves(theirs))
    assert right, "the model returns no tensor that could be compared"
    if [x.shape for x in left] != [x.shape for x in right]:
        return float("inf")
    worst = 0.0
    for x, y in zip(left, right, strict=True):
        if y.numel():
            error = float((x - y).abs().max() / y.abs().max().clamp(min=1e-300))
            worst = max(worst, error if error == error else float("inf"))
    return worst


def double(value: Any) -> Any:
    """The same with every floating-point tensor in float64."""
    if isinstance(value, tuple):
        return tuple(map(double, value))
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def copied(net: nn.Module) -> nn.Module:
    """A deep copy, also of a model that holds tensors which belong to a graph (old weight norm, cached activations)."""
    held = [value for module in net.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    return copy.deepcopy(net, {id(value): value.detach().clone() for value in held if not value.is_leaf})


def reading_dims(net: nn.Module) -> dict[str, int]:
    """The dimension along which each convolution and linear layer reads, by its type alone."""
    return {
        f"{path}.weight" if path else "weight": 0 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 1
        for path, layer in net.named_modules()
        if isinstance(layer, nn.modules.conv._ConvNd | nn.Linear)
    }


def reference(
    net: nn.Module, plan: scap_hub.PruningPlan, mode: str, readers: Mapping[str, int] | None = None
) -> nn.Module:
    """A float64 copy of the dense model in which nobody reads what the plan removes.

    Args:
        net: The dense model.
        plan: What is removed.
        mode: "readers" or "all", see above.
        readers: Dimensions along which parameters read that belong to no convolution or linear layer.
    """
    dense = copied(net).double().eval()
    tensors = dict(dense.named_parameters(remove_duplicate=False)) | dict(dense.named_buffers(remove_duplicate=False))
    reading = reading_dims(dense) | dict(readers or {})
    for path, layer in list(dense.named_modules()):
        if type(layer) in _OVER_SURVIVORS and (cut := plan.tensors.get(f"{path}.weight")):
            alive = _alive(plan, cut, tensors[f"{path}.weight"])
            dense.set_submodule(path, _OVER_SURVIVORS[type(layer)](layer, alive))
    with torch.no_grad():
        for name, cut in plan.tensors.items():
            alive = _alive(plan, cut, tensors[name], None if mode == "all" else reading.get(name, -1))
            if tensors[name].is_floating_point():  # numbers of channels are no values
                tensors[name].mul_(alive)
    return dense


def _alive(plan: scap_hub.PruningPlan, cut: Any, tensor: Tensor, only: int | None = None) -> Tensor:
    """Ones where the tensor stays, zeros where the plan removes it; of one dimension alone if `only` is given."""
    alive = torch.ones(tensor.shape, dtype=torch.float64)
    for dim, entry in cut.keep.items():
        if only is None or dim == only:
            alive.index_fill_(dim, _gone(plan, entry, tensor.shape[dim]), 0)
    if cut.blocks is not None and only in (None, 1):
        for rows, entry in zip(alive.chunk(len(cut.blocks)), cut.blocks, strict=True):
            rows.index_fill_(1, _gone(plan, entry, tensor.shape[1]), 0)
    return alive


def _gone(plan: scap_hub.PruningPlan, entry: int, size: int) -> Tensor:
    return torch.tensor(sorted(set(range(size)) - set(plan.indices(entry))), dtype=torch.long)


class StandardisedConv2d(nn.Conv2d):
    """A convolution whose weight is standardised at run time, as in big transfer's ResNets."""

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.weight.mean((1, 2, 3), keepdim=True), self.weight.var((1, 2, 3), keepdim=True, unbiased=False)
        return F.conv2d(x, (self.weight - mean) / (var + 1e-6).sqrt(), self.bias, padding=self.padding)


class _SurvivingNorm(nn.Module):
    """Layer norm (last dimension) or group norm (dimension 1), with statistics over the surviving channels."""

    def __init__(self, norm: nn.LayerNorm | nn.GroupNorm, alive: Tensor) -> None:
        super().__init__()
        self.norm, self.alive = norm, alive

    def forward(self, x: Tensor) -> Tensor:
        last = isinstance(self.norm, nn.LayerNorm)
        y = (x.movedim(-1, 0) if last else x.movedim(1, 0)).double()
        groups = 1 if last else self.norm.num_groups
        parts = []
        for part, alive in zip(y.chunk(groups), self.alive.chunk(groups), strict=True):
            here = part[alive > 0]
            if not len(here):
                parts.append(torch.zeros_like(part))
                continue
            dims = [0] if last else [0, *range(2, here.ndim)]
            mean, var = here.mean(dims, keepdim=True), here.var(dims, keepdim=True, unbiased=False)
            parts.append((part - mean) / (var + self.norm.eps).sqrt())
        shape = (-1,) + (1,) * (x.ndim - 1)
        out = torch.cat(parts) * self.norm.weight.view(shape) + self.norm.bias.view(shape)
        out = out * self.alive.view(shape)
        return out.movedim(0, -1) if last else out.movedim(0, 1)


class _SurvivingStandardised(nn.Module):
    """A standardised convolution with statistics over the surviving weights."""

    def __init__(self, conv: StandardisedConv2d, alive: Tensor) -> None:
        super().__init__()
        self.conv, self.alive = conv, alive

    def forward(self, x: Tensor) -> Tensor:
        w, alive = self.conv.weight, self.alive
        count = alive.sum((1, 2, 3), keepdim=True).clamp(min=1)
        mean = (w * alive).sum((1, 2, 3), keepdim=True) / count
        var = ((w - mean) ** 2 * alive).sum((1, 2, 3), keepdim=True) / count
        w = (w - mean) / (var + 1e-6).sqrt() * alive
        return F.conv2d(x, w, self.conv.bias, padding=self.conv.padding)


_OVER_SURVIVORS = {
    nn.LayerNorm: _SurvivingNorm,
    nn.GroupNorm: _SurvivingNorm,
    StandardisedConv2d: _SurvivingStandardised,
}


def plans(
    groups: Sequence[scap_hub.ChannelGroup], seed: int, singles: int = 2
) -> Iterator[tuple[str, scap_hub.PruningPlan | Exception]]:
    """A uniform plan, uneven random ones, and several groups alone, of which every second loses a single channel.

    Yields:
        What kind of plan it is, and the plan; or the error in its place where the library refused to make one.
    """
    rng = np.random.default_rng(seed)
    free = [group for group in groups if group.prunable]
    scores = {group.name: torch.from_numpy(rng.random(group.size)) for group in free}
    chosen = partial(scap_hub.select, groups, round_to=1, floor=0.0)
    yield from _made("uniform", partial(chosen, scores, target="ratio=0.5"))
    for _ in range(2):
        yield from _made("uneven", partial(chosen, scores, target={name: rng.uniform(0.2, 0.85) for name in scores}))
    for number, index in enumerate(rng.permutation(len(free))[:singles]):
        group = free[index]
        if group.constraint is None and number % 2:
            keep = sorted(set(range(group.size)) - {int(rng.integers(group.size))})
            made = partial(scap_hub.PruningPlan.from_keep, groups, {group.name: keep})
            yield from _made(f"one channel of {group.name}", made)
        else:
            alone = partial(chosen, {group.name: scores[group.name]}, target={group.name: rng.uniform(0.3, 0.8)})
            yield from _made(f"{group.name} alone", alone)


def _made(
    kind: str, make: Callable[[], scap_hub.PruningPlan]
) -> Iterator[tuple[str, scap_hub.PruningPlan | Exception]]:
    try:
        plan = make()
    except Exception as error:
        yield kind, error
        return
    if plan.tensors:
        yield kind, plan
