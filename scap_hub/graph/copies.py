"""Copies of models: whole ones, and such without weights."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from scap_hub.errors import ModelError
from scap_hub.graph.shapes import ATOMS
from scap_hub.graph.values import tensors_of


def copied(model: nn.Module) -> nn.Module:
    """A deep copy, also of a model that keeps computed tensors (its last activation, a normalised weight).

    Torch refuses to copy tensors that are part of an autograd graph; the copy has their values alone.
    """
    return _copy(model, {id(tensor): tensor.detach().clone() for tensor in _computed(model)})


def _computed(model: nn.Module) -> list[Tensor]:
    """Tensors in attributes of modules that are results of a computation."""
    held = [value for module in model.modules() for name, value in vars(module).items() if name not in _HELD]
    return [tensor for tensor in tensors_of(held) if tensor.grad_fn is not None]


def index_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The one-dimensional integer buffers that are saved with a model's weights: they may hold channel numbers."""
    saved = model.state_dict().keys()
    return {
        name: buffer
        for name, buffer in model.named_buffers(remove_duplicate=False)
        if buffer.ndim == 1 and not buffer.is_floating_point() and buffer.dtype != torch.bool and name in saved
        and not buffer.is_meta
    }  # fmt: skip


def without_weights(model: nn.Module) -> nn.Module:
    """A copy on the meta device: it can be run for its shapes, and takes no memory."""
    memo: dict[int, Any] = {id(tensor): tensor.detach() for tensor in _computed(model)}
    for tensor in (t for module in model.modules() for t in (*module._parameters.values(), *module._buffers.values())):
        if tensor is not None and id(tensor) not in memo:
            empty = torch.empty_like(tensor, device="meta")
            memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return _copy(model, memo)


def without_parameters(model: nn.Module) -> nn.Module:
    """A copy with its parameters on the meta device; buffers have their values."""
    memo: dict[int, Any] = {id(tensor): tensor.detach().clone() for tensor in _computed(model)}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    return _copy(model, memo)


def _copy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """What deepcopy returns, at a fraction of its time: it is slow for the many small containers of a module."""
    plain = [module for module in model.modules() if _copied_by_state(type(module))]
    memo |= {id(module): module.__new__(type(module)) for module in plain}
    for module in reversed(plain):  # a compiled part asks the copy of what it holds, once it is copied itself
        state = {name: _held(module, name, value, memo) for name, value in module.__getstate__().items()}
        memo[id(module)].__setstate__(state)
    return copy.deepcopy(model, memo)


def _held(module: nn.Module, name: str, value: Any, memo: dict[int, Any]) -> Any:
    """A copy of one attribute of a module.

    Raises:
        ModelError: It holds what Python does not copy, such as the keys of a dict, a generator, or a lock.
    """
    try:
        return {key: _copied(item, memo) for key, item in value.items()} if name in _HELD else _copied(value, memo)
    except TypeError as error:
        raise ModelError(
            f"the model cannot be copied: {error}, which {type(module).__name__}.{name} holds; give it what can be "
            "copied, such as a list"
        ) from error


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """What deepcopy returns; it takes long for numbers and for the ten containers of a module that are empty."""
    if id(value) in memo:
        return memo[id(value)]
    if type(value) in ATOMS or (type(value) is tuple and all(type(item) in ATOMS for item in value)):
        return value
    empty = type(value) in (dict, OrderedDict, list, set) and not value
    return type(value)() if empty else copy.deepcopy(value, memo)


_HELD = ("_parameters", "_buffers", "_modules")


def _copied_by_state(kind: type) -> bool:
    """Whether a class of modules leaves it to Python what its state is."""
    own = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__")
    return all(getattr(kind, name, None) is getattr(nn.Module, name, None) for name in own)
