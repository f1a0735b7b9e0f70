"""Applies a PruningPlan to a model: a plain loop over tensors and attributes, the same for pruning and for loading."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from scap_hub.errors import PlanError
from scap_hub.graph.copies import copied
from scap_hub.graph.record import opened
from scap_hub.plan import PruningPlan, TensorCut
from scap_hub.private import ConvNd, NormBase

_SIZED = (
    "view", "reshape", "unflatten", "expand", "repeat", "tile", "narrow", "split", "split_with_sizes", "__getitem__",
    "__setitem__", "zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "layer_norm", "rms_norm", "group_norm",
    "conv1d", "conv2d", "conv3d", "pad",
)  # fmt: skip
SCALED, SCALES = "scaled_dot_product_attention", ("mul", "mul_", "div", "div_")
_WIDTHS = frozenset((
    "in_channels", "out_channels", "groups", "num_channels", "num_groups", "in_features", "out_features",
    "num_features", "normalized_shape", "num_parameters", "kdim", "vdim", "unflattened_size", "embedding_dim",
))  # fmt: skip


def exchangeable(function: str, old: Any, new: Any) -> bool:
    """Whether a call's number may become another: a size, or a scale that is the root of a width."""
    if function == SCALED:  # left to torch, which takes it from a width: it gets the dense one's, after its numbers
        return old is None and type(new) is float and 0 < new <= 1
    if function in SCALES:
        widths = [max(own, 1 / own) ** 2 for own in (old, new) if type(own) is float and 1e-9 < own < 1e9]
        return len(widths) == 2 and all(abs(own - round(own)) < 1e-9 * own for own in widths)
    return function in _SIZED and type(old) is type(new) in (int, float) and -1e18 < old - new < 1e18


CHANGEABLE = frozenset((*_SIZED, SCALED, *SCALES))
"""Functions of which a plan may change numbers."""


def changeable(module: nn.Module, name: str) -> bool:
    """Whether pruning may change an integer: in torch's layers only a count of channels, elsewhere any public size."""
    kinds = [kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn") and kind is not nn.Module]
    fixed = {*nn.Conv2d.__constants__, *(own for kind in kinds for own in getattr(kind, "__constants__", ()))}
    return name in _WIDTHS or not (name in fixed or name.startswith("_") or type(module) in kinds)


def is_integer(value: object) -> TypeGuard[int]:
    """Whether it is an integer, also one of numpy's, which widths often are that somebody has computed."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def narrower(model: nn.Module, cut: Any) -> Any:
    """Whether something shrinks at a module's path; one without tensors goes by the nearest around it that has some.

    `cut`: ids of the tensors that shrink.
    """
    held: dict[str, bool] = {}
    tensors = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    for name, tensor in (pair for pairs in tensors for pair in pairs):
        while name and tensor.numel() > 1:  # a single number belongs to no channel
            name = name.rpartition(".")[0]
            held[name] = held.get(name, False) or id(tensor) in cut

    def shrinks(path: str) -> bool:
        while path and path not in held:
            path = path.rpartition(".")[0]
        return held.get(path, False)

    return shrinks


class Numbers(TorchFunctionMode):
    """Gives calls of torch functions other numbers than the forward pass has for them."""

    def __init__(self, changes: Any) -> None:
        super().__init__()
        self.changes = {tuple(change[:3]): tuple(change[3:]) for change in changes}
        self.calls = {function: 0 for function, _, _ in self.changes}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.multi_head_attention_forward:
            with self:
                return opened(func)(*args, **kwargs or {})
        if (name := getattr(func, "__name__", "")) in self.calls:
            place = iter(range(2**31))
            self.calls[name] += 1
            args = self.changed(args, name, place)
            kwargs = {key: self.changed(value, name, place) for key, value in (kwargs or {}).items()}
            if (scale := self.number(kwargs.get("scale"), name, place)) is not None:
                kwargs["scale"] = scale
        return func(*args, **kwargs or {})

    def number(self, value: Any, name: str, place: Any) -> Any:
        old, new = self.changes.get((name, self.calls[name], next(place)), (value, value))
        if value is not old and value != old:
            raise ValueError(f"pruned for a forward pass that computes {old} where it now computes {value}")
        return new

    def changed(self, value: Any, name: str, place: Any) -> Any:
        traced = torch.jit.is_tracing() and getattr(value, "ndim", 1) == 0 and value.dtype == torch.int64
        if traced or (isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool)):
            return self.number(value, name, place)
        if isinstance(value, slice):
            return slice(*(self.changed(part, name, place) for part in (value.start, value.stop, value.step)))
        if isinstance(value, tuple | list):
            parts = [self.changed(part, name, place) for part in value]
            return parts if isinstance(value, list) else tuple(parts)
        return value


def renumbered(module: nn.Module, changes: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward pass of a module's class, with other numbers in some calls of torch functions."""
    with Numbers(changes):
        return type(module).forward(module, *args, **kwargs)


_Call = tuple[str, int, int, "float | None", float]
"""The fields of a `CallNumber`."""


def apply_plan(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """Returns the smaller model; the given one is untouched.

    Args:
        model: The dense model that the plan was made for, or an untrained copy of it.
        plan: What stays.

    Raises:
        PlanError: The model lacks a tensor or attribute that the plan names, or has it in another shape.
    """
    _check(model, plan)
    small = copied(model)
    # Tied names share one tensor before, and must share one after.
    cuts = {name: _tensor(small, name) for name in plan.tensors}
    smaller: dict[int, Any] = {id(tensor): _cut(tensor, plan.tensors[name], plan) for name, tensor in cuts.items()}
    for module in small.modules():
        for table in (module._parameters, module._buffers):
            table.update({own: smaller[id(tensor)] for own, tensor in table.items() if id(tensor) in smaller})
    set_attributes(small, plan.attributes)
    for (path, dense), module in zip(model.named_modules(), small.modules(), strict=True):
        if _agrees(dense) and not _agrees(module):
            raise PlanError(f"the plan is incomplete: the tensors and the widths of {path!r} do not fit each other")
        if len(rows := _rows(path, dense, plan)) > 1:
            raise PlanError(f"the plan keeps different channels of the tensors of {path!r}: {' and '.join(rows)}")
    set_calls(small, {path: [tuple(dict(change).values()) for change in own] for path, own in plan.calls.items()})
    return small


def _agrees(module: Any) -> bool:
    """Whether the tensors of one of torch's layers are as wide as it says, and as each other; true of any other."""
    if "weight" not in module._parameters:  # computed from others
        return True
    shapes = [tuple(own.shape) for own in (*module._parameters.values(), *module._buffers.values()) if own is not None]
    vectors = {shape for shape in shapes if len(shape) == 1}
    if isinstance(module, nn.Linear):
        return {(module.out_features, module.in_features)} >= {*shapes} - vectors and vectors <= {
            (module.out_features,)
        }
    if isinstance(module, ConvNd):
        ends = (module.in_channels, module.out_channels // module.groups)
        if not module.transposed:
            ends = (module.out_channels, module.in_channels // module.groups)
        matrices = {shape[:2] for shape in shapes if len(shape) > 1}
        return matrices <= {ends} and vectors <= {(module.out_channels,)}
    if isinstance(module, NormBase):
        return vectors <= {(module.num_features,)}
    if isinstance(module, nn.GroupNorm):
        return vectors <= {(module.num_channels,)}
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return {*shapes} <= {tuple(module.normalized_shape)}
    if isinstance(module, nn.Embedding):
        return {*shapes} <= {(module.num_embeddings, module.embedding_dim)}
    return True


def _rows(path: str, module: Any, plan: PruningPlan) -> list[str]:
    """The different lists of output channels that a plan keeps of one of torch's layers; sizes alone do not tell."""
    if not isinstance(module, nn.Linear | ConvNd | NormBase | nn.GroupNorm):
        return []
    kept: dict[str, None] = {}
    for own in ("weight", "bias", "running_mean", "running_var"):
        cut = plan.tensors.get(f"{path}.{own}".lstrip("."))
        if cut is not None:
            dim = 1 if own == "weight" and getattr(module, "transposed", False) and module.groups == 1 else 0
            if dim == 0 and getattr(module, "transposed", False) and own == "weight":
                continue  # rows of a grouped transposed convolution are its inputs
            kept[plan.keeps[cut.keep[dim]] if dim in cut.keep else "all"] = None
    return list(kept)


def set_calls(model: nn.Module, calls: Mapping[str, Sequence[_Call]]) -> None:
    """Gives calls of torch functions in the forward passes of modules their new numbers; see `CallNumber`."""
    for path, changes in calls.items():
        module = model.get_submodule(path)
        module.forward = functools.partial(renumbered, module, _composed(earlier_calls(module), changes))


def earlier_calls(module: nn.Module) -> Sequence[_Call]:
    """Changes that an earlier plan has made in a module's calls."""
    forward: Any = vars(module).get("forward")
    # What loads without this file has a function of that name of its own.
    renumbers = getattr(getattr(forward, "func", None), "__name__", None) == renumbered.__name__
    return forward.args[1] if renumbers else ()


def _composed(earlier: Sequence[_Call], later: Sequence[_Call]) -> tuple[_Call, ...]:
    """Changes after changes: of one place, the last one counts."""
    changes = {tuple(change[:3]): change for change in (*earlier, *later)}
    return tuple(changes.values())


def set_attributes(model: nn.Module, attributes: Mapping[str, Mapping[str, int | list[int]]]) -> None:
    """Gives modules, or their `config`, their new integers; a list takes the place of whatever sequence was there."""
    for path, values in attributes.items():
        module = model.get_submodule(path)
        for attribute, value in values.items():
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
        if cut.refers is not None and (tensor.is_floating_point() or tensor.ndim != 1):
            raise PlanError(f"the plan renumbers {name!r}, which holds no channel numbers")
    for path, changes in plan.calls.items():
        _module(model, path)
        for change in changes:
            if change.function not in CHANGEABLE:
                raise PlanError(f"the plan changes numbers of {change.function!r} in {path!r}, which no plan may")
            if not exchangeable(change.function, change.old, change.new):
                raise PlanError(f"the plan gives {change.function!r} in {path!r} {change.new} instead of {change.old}")
    shrinks = narrower(model, {id(_tensor(model, name)) for name in plan.tensors})
    for path, values in plan.attributes.items():
        module = _module(model, path)
        for attribute, value in values.items():
            holder, name = _holder(module, attribute)
            old = getattr(holder, "__dict__", {}).get(name)
            if not (_fits(old, value) and changeable(holder, name)):
                raise PlanError(f"module {path!r} has no integer attribute {attribute!r} that could become {value!r}")
            if _renewed(old, value) != old and not shrinks(path):
                raise PlanError(f"the plan sets {attribute!r} in {path!r}, where no tensor shrinks")
    known = {path for path, _ in model.named_modules(remove_duplicate=False)}
    for group in plan.groups:
        if group not in known:
            _module(model, group.rpartition("#")[0] if "#" in group else group)


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise PlanError(f"the model has no module {path!r}; the plan was made for another model") from None


def _fits(old: object, new: int | list[int], least: int = 1) -> bool:
    """Whether the old value is an integer, or integers, and the new one no larger.

    A list may hold the -1 of a view beside the sizes that change, and parts of which nothing is left.
    """
    if isinstance(new, list):
        if not isinstance(old, list | tuple) or len(old) != len(new):
            return False
        return all(
            _fits(item.get("num_chs"), own) if isinstance(item, dict) else _fits(item, own, 0)
            for item, own in zip(old, new, strict=True)
        )
    return is_integer(old) and type(new) is int and (new == old or least <= new <= old)


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
    if cut.refers is not None and not small.is_meta:
        small = torch.searchsorted(torch.tensor(plan.indices(cut.refers), device=small.device), small).to(small.dtype)
    small = small.clone(memory_format=torch.preserve_format)
    return nn.Parameter(small, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else small


def _cut_blocks(weight: Tensor, blocks: list[list[int]]) -> Tensor:
    """Each block of rows keeps its own columns."""
    parts = zip(weight.chunk(len(blocks)), blocks, strict=True)
    return torch.cat([rows.index_select(1, torch.tensor(columns, device=rows.device)) for rows, columns in parts])
