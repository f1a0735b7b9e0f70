"""Captures a model's forward pass as a graph of ATen operators."""

from __future__ import annotations

import contextlib
import copy
import functools
import operator
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.schema_check_mode import SchemaCheckMode
from torch.nn.modules import module as module_hooks
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from scap_hub.errors import ModelError

_VALUES = (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
"""What turns a tensor into a Python number."""


@dataclass(frozen=True, eq=False)
class Capture:
    """A captured forward pass.

    Attributes:
        graph: The ATen graph; `node.meta["val"]` holds the shapes.
        states: Parameter or buffer name of each placeholder that is one.
        tensors: Those tensors by name.
        constants: Tensors that the forward pass made itself, by placeholder.
    """

    graph: fx.Graph
    states: dict[str, str]
    tensors: dict[str, Tensor]
    constants: dict[str, Tensor]


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
        self.graph = fx.Graph()
        self._last: fx.Node | None = None  # placeholder
        self.running: str | None = None
        self._paths = {id(module): name for name, module in model.named_modules()}
        self._stack: dict[str, tuple[str, type]] = {}
        self._calls = 0
        self._nodes: dict[int, fx.Node] = {}
        self._alive: list[Tensor] = []  # an id is a tensor's for as long as it lives
        self._states: dict[str, str] = {}
        self._constants: dict[str, Tensor] = {}
        self._owned = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        for name, tensor in self._owned.items():
            self._states[self._placeholder(tensor).name] = name
        leaves = [leaf for leaf in pytree.tree_leaves(inputs) if _is_tensor(leaf)]
        self._varying = {self._placeholder(leaf) for leaf in leaves}

    def run(self) -> Any:
        """Runs the model in eval mode and records what it does; returns its output. Caches are left in the model."""
        with evaluating(self.model), _no_autocast(), torch.no_grad(), self._watching(), enable_python_dispatcher():
            with self:
                output = self.model(*self.inputs)
            self.graph.output([self.node(leaf) for leaf in pytree.tree_leaves(output) if _is_tensor(leaf)])
        return output

    def made(self, node: fx.Node, value: Any) -> None:
        """Called for each operator, and for each part of a result that has parts."""

    def captured(self) -> Capture:
        """The graph and what it reads."""
        return Capture(self.graph, self._states, self._owned, self._constants)

    def node(self, tensor: Tensor) -> fx.Node:
        """The node that made a tensor; one that no operator made is a constant."""
        if id(tensor) not in self._nodes:
            constant = self._placeholder(tensor)
            self._constants[constant.name] = tensor
        return self._nodes[id(tensor)]

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
        kwargs = kwargs or {}
        self.running = str(func)
        leaves, structure = pytree.tree_flatten((args, kwargs))
        sources = {self.node(leaf) for leaf in leaves if _is_tensor(leaf)}
        if func in _VALUES and not sources.isdisjoint(self._varying):
            raise RuntimeError("it looks at the value of a tensor that depends on the input")
        result = _run(func, args, kwargs, leaves, structure)
        if func not in _VALUES:
            nodes = [self.node(leaf) if _is_tensor(leaf) else leaf for leaf in leaves]
            made = self._make(result, "call_function", func, *pytree.tree_unflatten(nodes, structure))
            if not sources.isdisjoint(self._varying):
                self._varying.add(made)
            parts: Iterable[Any] = result if isinstance(result, tuple | list) else ()
            for index, item in enumerate(parts):
                if _is_tensor(item):
                    part = self._make(item, "call_function", operator.getitem, (made, index), {})
                    self._varying |= {part} if made in self._varying else set()
        self.running = None
        return result

    def _make(self, value: Any, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        made = self.graph.create_node(op, target, args, kwargs)
        made.meta["val"] = _shape(value) if _is_tensor(value) else pytree.tree_map(_shape, value)
        made.meta["nn_module_stack"] = dict(self._stack)
        if op == "call_function":
            self.made(made, value)
        if _is_tensor(value):
            self._nodes[id(value)] = made
            self._alive.append(value)
        return made

    def _placeholder(self, tensor: Tensor) -> fx.Node:
        with self.graph.inserting_after(self._last):
            self._last = self._make(tensor, "placeholder", f"given_{len(self.graph.nodes)}", (), {})
        return self._last

    def _enter(self, module: nn.Module, *_: Any) -> None:
        if (path := self._paths.get(id(module))) is not None:
            self._calls += 1
            self._stack[f"{path}@{self._calls}"] = (path, type(module))

    def _leave(self, module: nn.Module, *_: Any) -> None:
        if id(module) in self._paths:
            self._stack.popitem()


class _Like(NamedTuple):
    """What is known of a tensor without values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> _Like:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def empty(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


def _run(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: list[Any], structure: pytree.TreeSpec
) -> Any:
    """What the operator returns; blocks repeat, and on tensors without values nothing is computed twice."""
    tensors = [leaf for leaf in leaves if _is_tensor(leaf)]
    if not tensors or not all(tensor.is_meta for tensor in tensors):
        return func(*args, **kwargs)
    if _in_place(func):
        return args[0]
    known = result_like(func, structure, *(_Like.of(leaf) if _is_tensor(leaf) else leaf for leaf in leaves))
    return func(*args, **kwargs) if known is None else known.empty()


@functools.cache
def _in_place(func: Any) -> bool:
    """Whether it writes to its first argument, returns that, and leaves its shape."""
    returned = [value.alias_info for value in func._schema.returns]
    first = func._schema.arguments[0].alias_info
    writes = len(returned) == 1 and first is not None and first.is_write and returned[0] is not None
    return writes and torch.Tag.inplace_view not in func.tags and func._schema.name.endswith("_")


@functools.lru_cache(maxsize=2**14, typed=True)
def result_like(func: Any, structure: pytree.TreeSpec, *leaves: Any) -> _Like | None:
    """What an operator makes of such tensors, if that is one new tensor, not a view or an argument itself."""
    if len(func._schema.returns) != 1 or func._schema.returns[0].alias_info is not None:
        return None
    empty = [leaf.empty() if isinstance(leaf, _Like) else leaf for leaf in leaves]
    args, kwargs = pytree.tree_unflatten(empty, structure)
    result = func(*args, **kwargs)
    if not _is_tensor(result) or not result.is_meta:
        return None
    if any(_is_tensor(leaf) and torch._C._is_alias_of(leaf, result) for leaf in empty):  # type: ignore[attr-defined]
        return None
    return _Like.of(result)


def _shape(leaf: Any) -> Any:
    """A tensor without its values."""
    return leaf.detach().to("meta") if _is_tensor(leaf) and not leaf.is_meta else leaf


def _is_tensor(leaf: Any) -> TypeGuard[Tensor]:
    return isinstance(leaf, Tensor)


def without_weights(model: nn.Module) -> nn.Module:
    """A copy on the meta device: it can be exported and run for its shapes, and takes no memory."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    for module in model.modules():
        # Every module has eight of them, for hooks, and they take longer to copy than all the rest.
        empties = [value for value in vars(module).values() if type(value) is OrderedDict and not value]
        memo |= {id(value): OrderedDict() for value in empties}
    return copy.deepcopy(model, memo)


def on_meta(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same inputs as shapes only."""
    return pytree.tree_map(_shape, inputs)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for the whole tree, every module's own mode restored afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Whatever modules cache in the meantime, in attributes or in dicts and lists of theirs, is gone afterwards."""
    held = {module: dict(vars(module)) for module in model.modules()}
    inside = [value for values in held.values() for value in values.values() if isinstance(value, dict | list)]
    copies = [value.copy() for value in inside]
    try:
        yield
    finally:
        for module, values in held.items():
            vars(module).clear()
            vars(module).update(values)
        for value, before in zip(inside, copies, strict=True):
            value.clear()
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
