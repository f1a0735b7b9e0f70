"""Captures a model's forward pass as ATen operators."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import math
import operator
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType
from typing import Any, NamedTuple, TypeGuard
from unittest import mock

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.schema_check_mode import SchemaCheckMode
from torch.nn.modules import module as module_hooks
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from scap_hub.errors import ModelError
from scap_hub.graph.node import Form, Node, flattened, mapped, rebuilt

_ATEN = torch.ops.aten
_VALUES = (_ATEN.item.default, _ATEN._local_scalar_dense.default, _ATEN.is_nonzero.default)
"""What turns a tensor into a Python number."""


@dataclass(frozen=True, eq=False)
class Capture:
    """A captured forward pass.

    Attributes:
        given: The model's parameters and buffers, the inputs, and what the forward pass made without an operator.
        called: The operators' results, in the order in which they were computed.
        outputs: The nodes that the forward pass returns.
        tensors: The parameters and buffers by name.
    """

    given: list[Node]
    called: list[Node]
    outputs: list[Node]
    tensors: dict[str, Tensor]


def capture(model: nn.Module, inputs: tuple[Any, ...]) -> Capture:
    """Records one forward pass of `model` in eval mode; the model is left as it was.

    On the meta device nothing is computed. `torch.export` records the same operators at five times the price, because
    of its symbolic shapes and guards, which pruning has no use for.

    Args:
        model: Any module whose forward pass does not depend on the values of its inputs.
        inputs: Example positional arguments, on the model's device.

    Raises:
        ModelError: The forward pass fails, or looks at values; names the module and the operator where it did.
    """
    recorder = Recorder(model, inputs)
    try:
        with untouched(model):
            recorder.run()
    except Exception as error:
        message = str(error).strip().splitlines() or ["no message"]
        at = f" at {recorder.running}" if recorder.running else ""
        path = running(model, error)[0]
        raise ModelError(
            f"cannot capture {type(model).__name__}: {type(error).__name__} in "
            f"{f'module {path!r}' if path else 'its forward()'}{at}: {message[0]}. Check that it runs on these inputs; "
            "prune the submodules that can be captured, or remove what depends on values of tensors from forward()"
        ) from error
    return recorder.captured()


class Recorder(SchemaCheckMode):
    """Writes every ATen operator into a graph before composite ones are taken apart.

    Torch lets few classes of dispatch mode see operators that early; deriving from one of them is the way in.
    """

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        TorchDispatchMode.__init__(self, torch._C.DispatchKey.PreDispatch)
        self.model, self.inputs = model, inputs
        self.running: Any = None
        self._paths = {id(module): name for name, module in model.named_modules()}
        self._calls: tuple[tuple[int, str], ...] = ()
        self._count = itertools.count()
        self._nodes: dict[int, Node] = {}
        self._alive: list[Tensor] = []  # an id is a tensor's for as long as it lives
        self._given: list[Node] = []
        self._called: list[Node] = []
        self._outputs: list[Node] = []
        self._owned = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        for name, tensor in self._owned.items():
            self._give(tensor, state=name)
        for leaf in pytree.tree_leaves(inputs):
            if _is_tensor(leaf):
                self._give(leaf, varies=True)

    def run(self) -> Any:
        """Runs the model in eval mode and records what it does; returns its output. Caches are left in the model."""
        with evaluating(self.model), _no_autocast(), torch.no_grad(), self._watching(), enable_python_dispatcher():
            with self:
                output = self.model(*self.inputs)
            self._outputs = [self.node(leaf) for leaf in pytree.tree_leaves(output) if _is_tensor(leaf)]
        return output

    def made(self, node: Node, value: Any) -> None:
        """Called for each operator, and for each part of a result that has parts."""

    def captured(self) -> Capture:
        """What was recorded."""
        return Capture(self._given, self._called, self._outputs, self._owned)

    def node(self, tensor: Tensor) -> Node:
        """The node that made a tensor; one that no operator made is a constant."""
        return self._nodes.get(id(tensor)) or self._give(tensor)

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        """Follows which module is running."""
        before = module_hooks.register_module_forward_pre_hook(self._enter)
        after = module_hooks.register_module_forward_hook(self._leave, always_call=True)
        try:
            yield
        finally:
            before.remove()
            after.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.running = func
        form, leaves = flattened(args, kwargs or {})
        nodes = [self.node(leaf) if _is_tensor(leaf) else leaf for leaf in leaves]
        varies = any(isinstance(node, Node) and node.varies for node in nodes)
        if func in _VALUES and varies:
            raise RuntimeError("it looks at the value of a tensor that depends on the input")
        result = _run(func, form, leaves)
        if func not in _VALUES:
            whole = self._call(func, *rebuilt(form, nodes), result, varies)
            for index, item in enumerate(result if isinstance(result, tuple | list) else ()):
                if _is_tensor(item):
                    self._call(operator.getitem, (whole, index), {}, item, varies)
        self.running = None
        return result

    def _call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any, varies: bool) -> Node:
        made = Node(target, args, kwargs, mapped(value, _shape), self._calls, varies)
        self.made(made, value)
        self._called.append(made)
        return self._known_as(made, value)

    def _give(self, tensor: Tensor, state: str | None = None, varies: bool = False) -> Node:
        made = Node(value=_shape(tensor), calls=self._calls, tensor=tensor, state=state, varies=varies)
        self._given.append(made)
        return self._known_as(made, tensor)

    def _known_as(self, made: Node, value: Any) -> Node:
        if _is_tensor(value):
            self._nodes[id(value)] = made
            self._alive.append(value)
        return made

    def _enter(self, module: nn.Module, *_: Any) -> None:
        if (path := self._paths.get(id(module))) is not None:
            self._calls += ((next(self._count), path),)

    def _leave(self, module: nn.Module, *_: Any) -> None:
        if id(module) in self._paths:
            self._calls = self._calls[:-1]


class _Like(NamedTuple):
    """What is known of a tensor without values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

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


def _run(func: Any, form: Form, leaves: list[Any]) -> Any:
    """What the operator returns; blocks repeat, and on tensors without values nothing is computed twice."""
    tensors = [leaf for leaf in leaves if _is_tensor(leaf)]
    if tensors and all(tensor.is_meta for tensor in tensors):
        if _in_place(func):
            return tensors[0]
        known = result_like(func, form, *(_Like.of(leaf) if _is_tensor(leaf) else leaf for leaf in leaves))
        if known is not None:
            return known.empty()
    args, kwargs = rebuilt(form, leaves)
    return func(*args, **kwargs)


@functools.cache
def _in_place(func: Any) -> bool:
    """Whether it writes to its first argument, returns that, and leaves its shape."""
    returned = [value.alias_info for value in func._schema.returns]
    first = func._schema.arguments[0].alias_info
    writes = len(returned) == 1 and first is not None and first.is_write and returned[0] is not None
    return writes and torch.Tag.inplace_view not in func.tags and func._schema.name.endswith("_")


@functools.lru_cache(maxsize=2**14, typed=True)
def result_like(func: Any, form: Form, *leaves: Any) -> _Like | None:
    """What an operator makes of such tensors, if that is one new tensor, not a view or an argument itself."""
    if len(func._schema.returns) != 1 or func._schema.returns[0].alias_info is not None:
        return None
    if (shape := _layer(func, *leaves)) is not None:
        return _Like.contiguous(shape, leaves[0].dtype)
    if (shape := _elementwise(func, leaves)) is not None:
        # It makes of every shape what it makes of the smallest.
        ones = [leaf.ones() if isinstance(leaf, _Like) else leaf for leaf in leaves]
        made = result_like(func, form, *ones)
        return None if made is None else _Like.contiguous(shape, made.dtype)
    empty = [leaf.empty() if isinstance(leaf, _Like) else leaf for leaf in leaves]
    args, kwargs = rebuilt(form, empty)
    result = func(*args, **kwargs)
    if not _is_tensor(result) or not result.is_meta:
        return None
    if any(_is_tensor(leaf) and torch._C._is_alias_of(leaf, result) for leaf in empty):  # type: ignore[attr-defined]
        return None
    return _Like.of(result)


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
    simple = all(type(leaf) in _ATOMS for leaf in leaves if not isinstance(leaf, _Like))
    small = all(math.prod(like.shape) == 1 for like in likes)
    if torch.Tag.pointwise not in func.tags or small or not simple or not all(like.is_contiguous for like in likes):
        return None
    return tuple(torch.broadcast_shapes(*(like.shape for like in likes)))


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _shape(leaf: Any) -> Any:
    """A tensor without its values."""
    return leaf.detach().to("meta") if _is_tensor(leaf) and not leaf.is_meta else leaf


def _is_tensor(leaf: Any) -> TypeGuard[Tensor]:
    return isinstance(leaf, Tensor)


def without_weights(model: nn.Module) -> nn.Module:
    """A copy on the meta device: it can be exported and run for its shapes, and takes no memory."""
    memo: dict[int, Any] = {}
    modules = list(model.modules())
    for tensor in (t for module in modules for t in (*module._parameters.values(), *module._buffers.values())):
        if tensor is not None and id(tensor) not in memo:
            empty = torch.empty_like(tensor, device="meta")
            memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    plain = [module for module in modules if _copied_by_state(type(module))]
    memo |= {id(module): module.__new__(type(module)) for module in plain}
    for module in plain:
        state = {
            name: {key: _copied(item, memo) for key, item in value.items()} if name in _HELD else _copied(value, memo)
            for name, value in vars(module).items()
        }
        memo[id(module)].__setstate__(state)
    return copy.deepcopy(model, memo)


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """What deepcopy returns; it takes long for numbers and for the ten containers of a module that are empty."""
    if id(value) in memo:
        return memo[id(value)]
    if type(value) in _ATOMS or (type(value) is tuple and all(type(item) in _ATOMS for item in value)):
        return value
    empty = type(value) in (dict, OrderedDict, list, set) and not value
    return type(value)() if empty else copy.deepcopy(value, memo)


_ATOMS = (bool, int, float, str, NoneType)
_HELD = ("_parameters", "_buffers", "_modules")


def _copied_by_state(kind: type) -> bool:
    """Whether a class of modules leaves it to Python what its state is."""
    own = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__")
    return all(getattr(kind, name, None) is getattr(nn.Module, name, None) for name in own)


def on_meta(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same inputs as shapes only."""
    return pytree.tree_map(_shape, inputs)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for the whole tree, every module's own mode restored afterwards."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Whatever modules cache in the meantime, in attributes or in dicts and lists of theirs, is gone afterwards."""
    held = {module: dict(vars(module)) for module in model.modules()}
    inside = [value for values in held.values() for value in values.values() if isinstance(value, dict | list)]
    copies = [value.copy() if value else None for value in inside]
    try:
        yield
    finally:
        for module, values in held.items():
            vars(module).clear()
            vars(module).update(values)
        for value, before in zip(inside, copies, strict=True):
            if value:
                value.clear()
            if before:
                value.update(before) if isinstance(value, dict) else value.extend(before)


@contextlib.contextmanager
def _no_autocast() -> Iterator[None]:
    # An autocast region becomes an opaque subgraph in the export; precision does not matter for shapes.
    with (
        mock.patch.object(torch.autocast, "__enter__", lambda self: self),
        mock.patch.object(torch.autocast, "__exit__", lambda self, *_: None),
    ):
        yield


def running(model: nn.Module, error: BaseException) -> list[str]:
    """Paths of the modules whose code was running when the error was raised, innermost first and the model last."""
    names = {id(module): name for name, module in model.named_modules()}
    found, step = [""], error.__traceback__
    while step is not None:
        path = names.get(id(step.tb_frame.f_locals.get("self")))
        if path and path != found[0]:
            found.insert(0, path)
        step = step.tb_next
    return found
