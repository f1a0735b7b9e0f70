"""Applies a PruningPlan to a model: a plain loop over tensors and attributes, the same for pruning and for loading."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from scap_hub.errors import PlanError
from scap_hub.plan import PruningPlan, TensorCut

RESHAPE = "forward.reshape"
"""In a plan's attributes, [rank, dim, ...]: a module's reshapes to `rank` sizes take that of `dim` from the tensor."""


class Reshaping(TorchFunctionMode):
    """Where a forward pass reshapes to a width that it read off another tensor, the tensor's own width counts."""

    def __init__(self, *places: int) -> None:
        self.dims = dict(zip(places[::2], places[1::2], strict=True))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.reshape, torch.Tensor.view, torch.reshape) and len(args) > 1:
            sizes = args[1] if isinstance(args[1], tuple | list) else args[1:]
            if len(sizes) in self.dims and -1 not in sizes and torch.Size(sizes).numel() != args[0].numel():
                args = (args[0], [-1 if dim == self.dims[len(sizes)] else size for dim, size in enumerate(sizes)])
        return func(*args, **kwargs or {})


def reshaping(module: nn.Module, places: tuple[int, ...], *args: Any, **kwargs: Any) -> Any:
    """The forward pass of its class; `places` says to how many sizes it reshapes and which one is such a width, ..."""
    with Reshaping(*places):
        return type(module).forward(module, *args, **kwargs)


def apply_plan(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """Returns the smaller model; the given one is untouched.

    Args:
        model: The dense model that the plan was made for, or an untrained copy of it.
        plan: What stays.

    Raises:
        PlanError: The model lacks a tensor or attribute that the plan names, or has it in another shape.
    """
    _check(model, plan)
    small = copy.deepcopy(model)
    # Tied names share one tensor before, and must share one after.
    cuts = {name: _tensor(small, name) for name in plan.tensors}
    smaller: dict[int, Any] = {id(tensor): _cut(tensor, plan.tensors[name], plan) for name, tensor in cuts.items()}
    for module in small.modules():
        for table in (module._parameters, module._buffers):
            table.update({own: smaller[id(tensor)] for own, tensor in table.items() if id(tensor) in smaller})
    set_attributes(small, plan.attributes)
    return small


def set_attributes(model: nn.Module, attributes: Mapping[str, Mapping[str, int | list[int]]]) -> None:
    """Gives modules, or their `config`, their new integers; a list takes the place of whatever sequence was there."""
    for path, values in attributes.items():
        module = model.get_submodule(path)
        for attribute, value in values.items():
            if attribute == RESHAPE and isinstance(value, list):
                module.forward = functools.partial(reshaping, module, tuple(value))
                continue
            holder, name = _holder(module, attribute)
            setattr(holder, name, _renewed(getattr(holder, name), value))


def _holder(module: Any, attribute: str) -> tuple[Any, str]:
    prefix, _, name = attribute.rpartition(".")
    return (getattr(module, "config", None) if prefix == "config" else module), name


def _renewed(old: Any, value: int | list[int]) -> Any:
    if isinstance(value, int):
        return value
    pairs = zip(old, value, strict=True)
    # timm's feature_info holds the width among other things.
    return type(old)({**item, "num_chs": new} if isinstance(item, dict) else new for item, new in pairs)


def _check(model: nn.Module, plan: PruningPlan) -> None:
    for name, cut in plan.tensors.items():
        tensor = _tensor(model, name)
        if tuple(tensor.shape) != cut.shape:
            raise PlanError(
                f"tensor {name!r} has shape {tuple(tensor.shape)}, the plan was made for {cut.shape}; "
                "apply it to the dense model that it was made for"
            )
    for path, values in plan.attributes.items():
        try:
            module = model.get_submodule(path)
        except AttributeError:
            raise PlanError(f"the model has no module {path!r}; the plan was made for another model") from None
        for attribute, value in values.items():
            if attribute == RESHAPE and isinstance(value, list) and len(value) % 2 == 0:
                continue
            holder, name = _holder(module, attribute)
            old = getattr(holder, "__dict__", {}).get(name)
            fits = (isinstance(value, int) and type(old) is int) or (
                isinstance(value, list) and _integers(old, len(value))
            )
            if not fits:
                raise PlanError(f"module {path!r} has no integer attribute {attribute!r} that could become {value!r}")


def _integers(old: object, count: int) -> bool:
    return (
        isinstance(old, list | tuple)
        and len(old) == count
        and all(type(item.get("num_chs") if isinstance(item, dict) else item) is int for item in old)
    )


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        module = nn.Module()
    tensor = module._parameters.get(leaf, module._buffers.get(leaf))
    if tensor is None:
        raise PlanError(f"the model has no tensor {name!r}; the plan was made for another model")
    return tensor


def _cut(tensor: Tensor, cut: TensorCut, plan: PruningPlan) -> Tensor:
    kept = {dim: torch.tensor(plan.indices(entry), device=tensor.device) for dim, entry in cut.keep.items()}
    small = tensor.detach()
    if cut.blocks is not None:
        small = _cut_blocks(small, [plan.indices(entry) for entry in cut.blocks])
    for dim, indices in kept.items():
        small = small.index_select(dim, indices)
    small = small.clone(memory_format=torch.preserve_format)
    return nn.Parameter(small, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else small


def _cut_blocks(weight: Tensor, blocks: list[list[int]]) -> Tensor:
    """Each block of rows keeps its own columns."""
    parts = zip(weight.chunk(len(blocks)), blocks, strict=True)
    return torch.cat([rows.index_select(1, torch.tensor(columns, device=rows.device)) for rows, columns in parts])
