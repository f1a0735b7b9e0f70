"""Builds models anew from the documents that describe them; a stranger's document may claim any size."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from scap_hub.errors import ModelError
from scap_hub.private import TorchDispatchMode, schema, tree_leaves, tree_map
from scap_hub.zoo.base import Zoo
from scap_hub.zoo.weights import Stored

_MARGIN = 2**28
"""Bytes that any constructor may use besides."""
_MOST_PRUNED = 400
"""How many times as large as its pruned model a dense one may be: a twentieth of the inputs and of the outputs stays;
more, as long as it stays within the margin."""
_MODULES = 30
"""How many modules, activations and dropouts included, there may be for each stored tensor."""
_FEW = 2000
_SMALL = 2**22
"""Elements that are not worth a look."""
_LARGEST_NUMBER = 2**19
"""Number in a config that is above suspicion; libraries make a list as long as some of them, such as class names."""


class _TooLargeError(Exception):
    """A constructor wants more than the weights on disk account for."""


def rebuild(zoo: Zoo, config: dict[str, Any]) -> nn.Module:
    """Builds an untrained copy of a model from `LoadedModel.config`; runs no code but the zoo's own.

    Raises:
        ModelError: A model that only its owner can build, or a config that the zoo refuses.
    """
    try:
        return zoo.rebuild(config)
    except (KeyError, IndexError, TypeError) as error:
        raise ModelError(f"config.json lacks what it takes to build a {zoo.name} model: {error!r}") from None


def skeleton(zoo: Zoo, config: dict[str, Any]) -> nn.Module:
    """As `rebuild`, without memory for the weights where the zoo can.

    Raises:
        ModelError: As `rebuild`.
    """
    try:
        with torch.device("meta"):
            return rebuild(zoo, config)
    except ModelError:
        # Some constructors compute with tensors, which have no values there.
        return rebuild(zoo, config)


def hollow(zoo: Zoo, config: dict[str, Any], stored: Mapping[str, Stored]) -> nn.Module:
    """As `rebuild`, with parameters on the meta device; buffers have their values.

    Args:
        zoo: Builds it.
        config: Of the dense model; a stranger may have written it.
        stored: The weights of the pruned model, as their file's header has them.

    Raises:
        ModelError: As `rebuild`; or the config claims a size that these weights cannot come from.
    """
    largest = max([_LARGEST_NUMBER, *(size for own in stored.values() for size in own.shape)])
    if (number := _beyond(config, largest)) is not None:
        raise ModelError(f"config.json says {number:,}, and no tensor of the weights is that large: save it again")
    try:
        with _Limits(stored, empty=True):
            return rebuild(zoo, config)
    except ModelError as error:
        if isinstance(error.__cause__, _TooLargeError):
            raise
    # A few constructors compute with the values of their parameters.
    with _Limits(stored, empty=False):
        return rebuild(zoo, config)


def _beyond(value: Any, largest: int) -> int | None:
    """The first integer in a document that is larger."""
    if isinstance(value, dict | list):
        items = value.values() if isinstance(value, dict) else value
        return next((found for item in items if (found := _beyond(item, largest)) is not None), None)
    return value if type(value) is int and abs(value) > largest else None


class _Limits(TorchDispatchMode):
    """Stops a constructor as soon as it wants more than the weights on disk account for.

    Every result of an operator is measured on shapes alone before it is computed.
    """

    def __init__(self, stored: Mapping[str, Stored], empty: bool) -> None:
        """Args: stored: The pruned model's weights. empty: Whether parameters lose their memory once they are made."""
        super().__init__()
        nbytes = sum(own.nbytes for own in stored.values())
        self.empty = empty
        self.at_once = 2 * nbytes + _MARGIN
        self.parameters = max(_MOST_PRUNED * nbytes, _MARGIN) if empty else self.at_once
        self.buffers = self.at_once
        self.modules = _MODULES * len(stored) + _FEW
        self._hooks: list[Any] = []
        self._made: dict[int, tuple[Any, Any]] = {}

    def __enter__(self) -> Any:
        parameter: Any = self._parameter  # torch declares that it returns nothing, and takes what it returns
        self._hooks = [
            register_module_parameter_registration_hook(parameter),
            register_module_buffer_registration_hook(self._buffer),
            register_module_module_registration_hook(self._module),
        ]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def _parameter(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None
        known, meta = self._made.get(id(parameter), (None, None))
        if known is not None and known() is parameter:  # one that two modules share
            return meta
        self.parameters -= parameter.nbytes
        if self.parameters < 0:
            raise _TooLargeError(f"its {type(module).__name__} is larger than what these weights can be left of")
        meta = nn.Parameter(parameter.to("meta"), parameter.requires_grad) if self.empty else parameter
        self._made[id(parameter)] = weakref.ref(parameter), meta
        return meta

    def _buffer(self, module: nn.Module, name: str, buffer: Tensor | None) -> None:
        self.buffers -= 0 if buffer is None else buffer.nbytes
        if self.buffers < 0:
            raise _TooLargeError(f"the buffer {name!r} of its {type(module).__name__} is too large for its weights")

    def _module(self, *_: Any) -> None:
        self.modules -= 1
        if self.modules < 0:
            raise _TooLargeError("it has many more layers than its weights")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _scale(args) * _scale(kwargs.values()) > _SMALL and not func.is_view:
            self._measure(func, args, kwargs)
        return func(*args, **kwargs)

    def _measure(self, func: Any, args: Any, kwargs: Any) -> None:
        made = schema(func).returns and not any(own.alias_info for own in schema(func).returns)
        try:
            made = made and func(*tree_map(_shape_alone, args), **tree_map(_shape_alone, kwargs))
        except (RuntimeError, NotImplementedError):  # it looks at values: its result is small
            return
        nbytes = sum(leaf.nbytes for leaf in tree_leaves(made) if isinstance(leaf, Tensor))
        # Memory that is only reserved, for a parameter that is to lose it, is not used.
        if nbytes > (self.parameters if func is torch.ops.aten.empty.memory_format else self.at_once):
            raise _TooLargeError(f"it computes {nbytes:,} bytes at once, more than these weights account for")


def _shape_alone(leaf: Any) -> Any:
    if isinstance(leaf, torch.device):
        return torch.device("meta")
    return leaf.detach().to("meta") if isinstance(leaf, Tensor) else leaf


def _scale(values: Any) -> float:
    """More than the elements of anything that an operator can make of these arguments, roughly."""
    scale = 1.0
    for value in values:
        if isinstance(value, Tensor):
            scale *= max(1, value.numel())
        elif isinstance(value, list | tuple):
            scale *= _scale(value)
        elif type(value) in (int, float) and math.isfinite(value):
            scale *= max(1.0, abs(value))
    return scale
