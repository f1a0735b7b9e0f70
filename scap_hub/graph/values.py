"""Tensors inside whatever a forward pass takes or returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from scap_hub.private import tree_map

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
