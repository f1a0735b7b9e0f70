"""What operators make of shapes, remembered: on tensors without values nothing is computed twice."""

from __future__ import annotations

import functools
import math
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scap_hub.graph.constants import VALUES, Constants
from scap_hub.graph.node import Form, flattened, rebuilt
from scap_hub.graph.values import is_tensor
from scap_hub.private import PreDispatchMode, is_alias_of, memory_of, schema

_ATEN = torch.ops.aten
ATOMS = (bool, int, float, str, NoneType)


class _Like(NamedTuple):
    """What is known of a tensor without values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: int = 0
    """Of a view, from the start of what it shows."""
    shows: int | None = None
    """Of a view, which of the tensors it shows."""

    @classmethod
    def of(cls, tensor: Tensor) -> _Like:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    @classmethod
    def contiguous(cls, shape: tuple[int, ...], dtype: torch.dtype) -> _Like:
        return cls(shape, _contiguous(shape), dtype)

    @property
    def is_contiguous(self) -> bool:
        return self.stride == _contiguous(self.shape)

    def ones(self) -> _Like:
        """The smallest of as many dimensions."""
        return _Like.contiguous((1,) * len(self.shape), self.dtype)

    def empty(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")

    def made_of(self, tensors: list[Tensor]) -> Tensor:
        """Such a tensor anew, or such a view of one of these."""
        if self.shows is None:
            return self.empty()
        shown = tensors[self.shows]
        return shown.as_strided(self.shape, self.stride, shown.storage_offset() + self.offset)


def run(func: Any, form: Form, leaves: list[Any]) -> Any:
    """What the operator returns; blocks repeat, and on tensors without values nothing is computed twice."""
    tensors = [leaf for leaf in leaves if is_tensor(leaf)]
    if tensors and all(tensor.is_meta for tensor in tensors):
        if in_place(func):
            return tensors[0]
        likes = [_Like.of(leaf) if is_tensor(leaf) else leaf for leaf in leaves]
        if len(schema(func).returns) > 1:
            if (several := results_like(func, form, *likes)) is not None:
                return tuple(like.empty() for like in several)
        elif (known := result_like(func, form, *likes)) is not None:
            return known.made_of(tensors)
    args, kwargs = rebuilt(form, leaves)
    return func(*args, **kwargs)


class Remembering(PreDispatchMode):
    """A mode in which operators on tensors without values are computed once for all models: see `run`.

    Use it inside `enable_python_dispatcher()`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._constants = Constants()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        form, leaves = flattened(args, kwargs or {})
        if func in VALUES and (number := self._constants.number(func, leaves[0])) is not None:
            return number
        result = run(func, form, leaves)
        self._constants.follow(func, form, leaves, result)
        return result


@functools.cache
def in_place(func: Any) -> bool:
    """Whether it writes to its first argument, returns that, and leaves its shape."""
    returned = [value.alias_info for value in schema(func).returns]
    first = schema(func).arguments[0].alias_info
    writes = len(returned) == 1 and first is not None and first.is_write and returned[0] is not None
    return writes and torch.Tag.inplace_view not in func.tags and schema(func).name.endswith("_")


@functools.cache
def allocates(func: Any) -> bool:
    """Whether its results are new memory: neither views of its arguments nor these themselves."""
    return all(value.alias_info is None for value in schema(func).returns)


@functools.lru_cache(maxsize=2**14, typed=True)
def result_like(func: Any, form: Form, *leaves: Any) -> _Like | None:
    """What an operator makes of such tensors, if that is one tensor: a new one or a view, not an argument itself."""
    returned = schema(func).returns
    alias = returned[0].alias_info if len(returned) == 1 else None
    if len(returned) != 1 or (alias is not None and (alias.is_write or func is _ATEN.as_strided.default)):
        return None  # `as_strided` is told where in its memory a tensor begins, which `_Like` does not hold
    if (shape := _layer(func, *leaves)) is not None:
        return _Like.contiguous(shape, leaves[0].dtype)
    if alias is None and (shape := _elementwise(func, leaves)) is not None:
        # It makes of every shape what it makes of the smallest.
        ones = [leaf.ones() if isinstance(leaf, _Like) else leaf for leaf in leaves]
        made = result_like(func, form, *ones)
        return None if made is None else _Like.contiguous(shape, made.dtype)
    empty = [leaf.empty() if isinstance(leaf, _Like) else leaf for leaf in leaves]
    args, kwargs = rebuilt(form, empty)
    result = func(*args, **kwargs)
    if not is_tensor(result) or not result.is_meta:
        return None
    given = [leaf for leaf in empty if is_tensor(leaf)]
    shown = [number for number, leaf in enumerate(given) if is_alias_of(leaf, result)]
    if not shown:
        return _Like.of(result)
    if result is given[shown[0]] or result.dtype != given[shown[0]].dtype or result.is_complex():
        return None
    return _Like.of(result)._replace(offset=int(result.storage_offset()), shows=shown[0])


@functools.lru_cache(maxsize=2**14, typed=True)
def results_like(func: Any, form: Form, *leaves: Any) -> tuple[_Like, ...] | None:
    """What an operator with several results makes of such tensors, if all of them are new and tensors.

    An LSTM, which torch takes apart on tensors without values, takes a second for each shape.
    """
    empty = [leaf.empty() if isinstance(leaf, _Like) else leaf for leaf in leaves]
    args, kwargs = rebuilt(form, empty)
    made = func(*args, **kwargs)
    if not all(is_tensor(own) and own.is_meta for own in made):
        return None
    tensors = [*filter(is_tensor, empty), *made]
    return tuple(map(_Like.of, made)) if len(set(map(memory_of, tensors))) == len(tensors) else None


def _layer(func: Any, x: Any, *rest: Any) -> tuple[int, ...] | None:
    """What a layer whose sizes fit makes of a shape, for those that torch takes a millisecond for."""
    states = {leaf.shape for leaf in rest if isinstance(leaf, _Like)}
    sizes = tuple(leaf for leaf in rest if type(leaf) is int)
    if func is _ATEN.batch_norm.default and states <= {x.shape[1:2]}:
        return tuple(x.shape)
    if func is _ATEN.layer_norm.default and states <= {sizes} and sizes == x.shape[-len(sizes) :]:
        return tuple(x.shape)
    if func is _ATEN.linear.default and len(rest[0].shape) == 2:
        rows, columns = rest[0].shape
        return (*x.shape[:-1], rows) if x.shape[-1] == columns and states <= {(rows, columns), (rows,)} else None
    return None


def _elementwise(func: Any, leaves: tuple[Any, ...]) -> tuple[int, ...] | None:
    """The shape that an elementwise operator makes of contiguous tensors."""
    likes = [leaf for leaf in leaves if isinstance(leaf, _Like)]
    simple = all(type(leaf) in ATOMS for leaf in leaves if not isinstance(leaf, _Like))
    small = all(math.prod(like.shape) == 1 for like in likes)
    if torch.Tag.pointwise not in func.tags or small or not simple or not all(like.is_contiguous for like in likes):
        return None
    return tuple(torch.broadcast_shapes(*(like.shape for like in likes)))


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
