"""The values of what a forward pass computes from constants alone, where it runs without any."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from scap_hub.graph.node import Form, rebuilt
from scap_hub.graph.values import is_tensor, tensors_of
from scap_hub.private import memory_of, schema

_ATEN = torch.ops.aten
VALUES = (_ATEN.item.default, _ATEN._local_scalar_dense.default, _ATEN.is_nonzero.default)
"""Operators that turn a tensor into a Python number."""
_LARGEST = 2**22
"""Elements of a tensor that is still computed: more of them hardly decide what a forward pass does."""


_Place = tuple[int, torch.dtype, torch.Size, tuple[int, ...], int | torch.SymInt]
"""Where a tensor's elements lie: torch hands out the same tensor as several objects."""


def _place(tensor: Tensor) -> _Place:
    return memory_of(tensor), tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()


class Constants:
    """CPU tensors beside the meta tensors of a forward pass that follow from no input, parameter or buffer.

    Code asks whether a mask is all ones, or whether sizes that it has written into a tensor add up. On the meta device
    there is no answer; here is one.
    """

    def __init__(self) -> None:
        self._values: dict[_Place, Tensor] = {}
        self._alive: list[Tensor] = []  # memory is a tensor's for as long as it lives

    def value(self, tensor: Tensor) -> Tensor | None:
        """What a tensor holds; None if it is not known. It shares memory with the values of the tensor's views."""
        return self._values.get(_place(tensor)) if tensor.is_meta else tensor

    def number(self, func: Any, tensor: Tensor) -> Any:
        """What one of `VALUES` makes of a tensor; None if it is not known."""
        value = self.value(tensor)
        return None if value is None else func(value)

    def follow(self, func: Any, form: Form, leaves: list[Any], result: Any) -> None:
        """Does with the values what an operator did with the tensors."""
        made = [tensor for tensor in tensors_of(result) if tensor.is_meta]
        if not made and not any(is_tensor(leaf) and leaf.is_meta for leaf in leaves):
            return  # the operator has seen the values itself
        values = [self.value(leaf) if is_tensor(leaf) else leaf for leaf in leaves]
        known = all(value is not None or not is_tensor(leaf) for value, leaf in zip(values, leaves, strict=True))
        small = all(tensor.numel() <= _LARGEST for tensor in made)
        if known and small and torch.Tag.nondeterministic_seeded not in func.tags:
            own = [torch.device("cpu") if isinstance(value, torch.device) else value for value in values]
            args, kwargs = rebuilt(form, own)
            with contextlib.suppress(RuntimeError):
                self._values.update(zip(map(_place, made), tensors_of(func(*args, **kwargs)), strict=True))
                self._alive += made
                return
        if schema(func).is_mutable:
            self._forget(leaves)

    def _forget(self, tensors: list[Any]) -> None:
        """Nothing is known any more of the memory that these tensors show."""
        memory = {memory_of(tensor) for tensor in tensors if is_tensor(tensor)}
        self._values = {place: value for place, value in self._values.items() if place[0] not in memory}
