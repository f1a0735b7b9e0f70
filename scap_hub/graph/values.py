"""Tensors inside whatever a forward pass takes or returns, and sizes that follow from their values."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from scap_hub.private import tree_map

_ATEN = torch.ops.aten
_FINDS = (_ATEN.where.default, _ATEN.argwhere.default, _ATEN.nonzero_numpy.default)
"""Operators that return the places of what is true, and do not say so in their tags."""
_LEAVES = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.Size, nn.Module)


def is_tensor(leaf: Any) -> TypeGuard[Tensor]:
    """Whether it is a tensor."""
    return isinstance(leaf, Tensor)


def without_values(leaf: Any) -> Any:
    """A tensor without its values, on the meta device; whatever else as it is."""
    # `leaf.to("meta")` takes a millisecond where torch's operators are written in Python, as while a model is recorded.
    return torch.empty_like(leaf, device="meta", requires_grad=False) if is_tensor(leaf) and not leaf.is_meta else leaf


def on_meta(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same inputs as shapes only."""
    return tree_map(without_values, inputs)


def separate(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same inputs in memory of their own, for a forward pass that may write to them."""
    return tree_map(lambda leaf: leaf.detach().clone() if is_tensor(leaf) else leaf, inputs)


def tensors_of(value: Any) -> list[Tensor]:
    """Every tensor in a structure, in a fixed order: mappings, sequences, dataclasses and plain objects are walked.

    Args:
        value: What a forward pass took or returned.
    """
    return list(_walk(value, set()))


def _walk(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    if isinstance(value, _LEAVES) or id(value) in seen:
        return
    seen.add(id(value))
    for part in _parts(value):
        yield from _walk(part, seen)


def _parts(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, set | frozenset):
        return sorted(value, key=id)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    held = dict(getattr(value, "__dict__", {}))
    held |= {name: getattr(value, name, None) for name in getattr(type(value), "__slots__", ())}
    return list(held.values())


def sized_by_values(func: Any, leaves: list[Any], nodes: list[Any]) -> bool:
    """Whether the shape of the result depends on values that depend on the input.

    Of indices only masks set it; and classes that are counted beforehand set none.
    """
    if func not in _FINDS and torch.Tag.dynamic_output_shape not in func.tags:
        return False
    if func in (_ATEN.index.Tensor, _ATEN.masked_select.default):
        pairs = zip(leaves[1:], nodes[1:], strict=True)
        return any(is_tensor(leaf) and leaf.dtype == torch.bool and node.varies for leaf, node in pairs)
    return func is not _ATEN.one_hot.default or len(leaves) < 2 or leaves[1] < 0
