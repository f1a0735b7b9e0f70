"""Records a model's forward pass as ATen operators."""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from scap_hub.errors import ModelError
from scap_hub.graph.constants import VALUES, Constants
from scap_hub.graph.modes import emptied_caches, evaluating, running, uncompiled, untouched
from scap_hub.graph.node import Form, Node, Site, flattened, mapped, numbers_in, op_of, rebuilt
from scap_hub.graph.shapes import in_place, run
from scap_hub.graph.values import is_tensor, separate, sized_by_values, tensors_of, without_values
from scap_hub.private import (
    PreDispatchMode,
    enable_python_dispatcher,
    is_composite,
    memory_of,
    no_autocast,
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

_ATEN = torch.ops.aten
_LOOKS = ("tolist", "numpy", "__array__", "__dlpack__", "data_ptr")
"""Functions of a tensor that look at its values without an operator."""
_SAME = ("__deepcopy__", "__copy__", "__reduce_ex__")
"""Functions that copy a tensor without an operator."""
Known = Callable[[str], bool]
"""Whether an operator ("conv2d.default") is recorded whole if torch computes it from others."""


class LooksAtValues(RuntimeError):
    """A forward pass does something that depends on what the tensors hold, with or without weights."""


@dataclass(frozen=True, eq=False)
class Capture:
    """A recorded forward pass.

    Attributes:
        given: The model's parameters and buffers, the inputs, and what the forward pass made without an operator.
        called: The operators' results, in the order in which they were computed.
        outputs: The nodes that the forward pass returns.
        tensors: The parameters and buffers by name.
        numbers: Values of the integer buffers by name, (n,) each, where they are known.
    """

    given: list[Node]
    called: list[Node]
    outputs: list[Node]
    tensors: dict[str, Tensor]
    numbers: dict[str, np.ndarray] = field(default_factory=dict)


def capture(
    model: nn.Module,
    inputs: tuple[Any, ...],
    training: bool = False,
    numbers: Mapping[str, Tensor] | None = None,
    known: Known | None = None,
) -> Capture:
    """Records one forward pass of `model`; the model is left as it was.

    On the meta device nothing is computed. `torch.export` records the same operators at five times the price, because
    of its symbolic shapes and guards, which pruning has no use for.

    Args:
        model: Any module whose forward pass does not depend on the values of its inputs.
        inputs: Example positional arguments, on the model's device.
        training: Whether to record what it does in training mode; by default eval mode.
        numbers: Values of one-dimensional integer buffers, which a model without weights has lost.
        known: Which composite operators are recorded whole; the others are as those that torch computes them from. Left
            out, all are.

    Raises:
        ModelError: The forward pass fails, looks at values (`LooksAtValues` is its cause then), or returns no tensor;
            names the module and the operator.
    """
    recorder = Recorder(model, inputs, training, known)
    try:
        with untouched(model), emptied_caches(model):
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
    captured = recorder.captured()
    for node in captured.given:
        if node.state is not None and numbers and node.state in numbers:
            node.numbers = captured.numbers[node.state] = numbers[node.state].detach().cpu().numpy()
    return captured


def overwritten(tensor: Tensor, *written: Tensor) -> Tensor:
    """What a tensor is after parts of its memory were written to through other views of it."""
    return tensor


@dataclass
class _Running:
    """A call of a module that has not returned yet: its number, its path, and how often it called each function."""

    number: int
    path: str
    functions: Counter[str] = field(default_factory=Counter)


class Recorder(PreDispatchMode):
    """Writes every ATen operator into a graph, composite ones whole where they are known.

    Torch lets few classes of dispatch mode see operators that early; deriving from one of them is the way in.
    """

    def __init__(
        self, model: nn.Module, inputs: tuple[Any, ...], training: bool = False, known: Known | None = None
    ) -> None:
        super().__init__()
        self.known = known
        self.model, self.inputs, self.training = model, separate(inputs), training
        self.running: Any = None
        self.site: Site | None = None
        self._paths = {id(module): name for name, module in model.named_modules()}
        self._stack: list[_Running] = []
        self._calls: tuple[tuple[int, str], ...] = ()
        self._count = itertools.count()
        self._nodes: dict[int, Node] = {}
        self._alive: list[Tensor] = []  # an id is a tensor's for as long as it lives
        self._constants = Constants()
        self._sharing: dict[int, list[Tensor]] = {}  # tensors by the memory that they show
        self._stale: dict[int, tuple[Node, ...]] = {}  # tensors that were written to through other views
        self._given: list[Node] = []
        self._called: list[Node] = []
        self._outputs: list[Node] = []
        self._owned = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        for name, tensor in self._owned.items():
            self._give(tensor, state=name)
        for leaf in tensors_of(self.inputs):
            self._give(leaf, varies=True)

    def run(self) -> Any:
        """Runs the model and records what it does; returns its output. Caches are left in the model."""
        mode = _training(self.model) if self.training else evaluating(self.model)
        drawn = torch.random.fork_rng(devices=[])  # what is drawn here is not drawn from the caller's numbers
        watching = self._watching()
        with watching, mode, uncompiled(), no_autocast(), torch.no_grad(), drawn, enable_python_dispatcher():
            with self, _Functions(self):
                output = self.model(*self.inputs)
            returned = tensors_of(output)
            if not returned:
                raise RuntimeError(f"it returns {type(output).__name__}, in which no tensor was found")
            self._outputs = [self.node(leaf) for leaf in returned]
        return output

    def called(self, target: Any, form: Form, leaves: list[Any]) -> None:
        """Called before an operator runs, with nodes in the place of tensors; see `rebuilt`."""

    def made(self, node: Node, value: Any) -> None:
        """Called for each operator, and for each part of a result that has parts."""

    def captured(self) -> Capture:
        """What was recorded."""
        return Capture(self._given, self._called, self._outputs, self._owned)

    def node(self, tensor: Tensor) -> Node:
        """The node that made a tensor; one that no operator made is a constant."""
        if stale := self._stale.pop(id(tensor), None):
            varies = any(node.varies for node in stale)
            return self._call(overwritten, stale, {}, tensor, varies)
        return self._nodes.get(id(tensor)) or self._give(tensor)

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        """Follows which module is running, while no other thread records."""
        with self.alone:
            before = register_module_forward_pre_hook(self._enter)
            after = register_module_forward_hook(self._leave, always_call=True)
            try:
                yield
            finally:
                before.remove()
                after.remove()

    def function(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a torch function that the forward pass called, and remembers which call it was."""
        name = getattr(func, "__name__", "")
        if name == "__get__":  # of a property; what `x.data` returns has the same values, but is another tensor
            result = func(*args, **kwargs)
            if is_tensor(result) and is_tensor(args[0]) and id(result) not in self._nodes:
                self._alias(result, args[0])
            return result
        subject = args[0] if args and is_tensor(args[0]) else None
        if name in _LOOKS and subject is not None and self.node(subject).varies:
            raise LooksAtValues(f"it looks at the values of a tensor that depends on the input ({name})")
        if func == Tensor.data.__set__ and args[0].shape == args[1].shape:  # type: ignore[attr-defined]
            return args[0].copy_(args[1])  # the same values, and an operator says so
        outer, self.site = self.site, self.place(name, args, kwargs)
        try:
            result = func(*args, **kwargs)
            if name == "contiguous" and result is subject:
                result = self._unmoved(subject, *args[1:], **kwargs)
        finally:
            self.site = outer
        if is_tensor(result) and id(result) not in self._nodes:
            if name in _SAME and subject is not None:
                self._alias(result, subject)
            elif (made := self._shown_by(result)) is not None:  # torch wraps what a factory such as zeros has made
                self._alias(result, made)
        return result

    def _unmoved(self, tensor: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
        """Records a call of `contiguous` on a tensor that is so, which torch returns without running an operator.

        Whether one runs depends on sizes: a transposed tensor is contiguous as soon as it has a single channel.
        """
        same = tensor.data  # another tensor, made by no operator: the given one may be read again
        self._alias(same, tensor)
        made: Tensor = _ATEN.contiguous.default(same, memory_format=memory_format)
        return made

    def place(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Site | None:
        """Where the forward pass calls a torch function; None where nobody asks."""
        for call in self._stack:
            call.functions[name] += 1
        number = self._stack[-1].functions[name] if self._stack else 0
        return Site(name, number, tuple(numbers_in(args, kwargs)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._taken_apart(func):
            with self:
                return func.decompose(*args, **kwargs or {})
        self.running = func
        form, leaves = flattened(args, kwargs or {})
        nodes = [self.node(leaf) if is_tensor(leaf) else leaf for leaf in leaves]
        varies = any(isinstance(node, Node) and node.varies for node in nodes)
        if func in VALUES:
            if varies:
                raise LooksAtValues("it looks at the value of a tensor that depends on the input")
            if (number := self._constants.number(func, leaves[0])) is not None:
                self.running = None
                return number
        if varies and sized_by_values(func, leaves, nodes):
            raise LooksAtValues("it makes a tensor whose size depends on the values of the input")
        if torch.Tag.inplace_view in func.tags and is_tensor(leaves[0]):
            _remember(nodes[0])
        self.called(func, form, nodes)
        result = run(func, form, leaves)
        if not varies:
            self._constants.follow(func, form, leaves, result)
        if func is _ATEN.set_.source_Storage_storage_offset and (shown := self._shown_by(result)) is not None:
            self._alias(result, shown)  # as `copy.copy` makes a tensor: of the memory of another
        elif func not in VALUES:
            whole = self._call(func, *rebuilt(form, nodes), result, varies)
            for index, item in enumerate(result if isinstance(result, tuple | list) else ()):
                if is_tensor(item):
                    self._call(operator.getitem, (whole, index), {}, item, varies)
            if in_place(func) and is_tensor(leaves[0]):
                self._written(leaves[0], whole)
        self.running = None
        return result

    def _call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any, varies: bool) -> Node:
        made = Node(target, args, kwargs, mapped(value, without_values), self._calls, varies, site=self.site)
        self.made(made, value)
        self._called.append(made)
        return self._known_as(made, value)

    def _taken_apart(self, func: Any) -> bool:
        """Whether an operator is recorded as others. One whose result's size follows from values says so by itself."""
        if self.known is None or func in VALUES or torch.Tag.dynamic_output_shape in func.tags:
            return False
        return is_composite(func) and not self.known(op_of(func))

    def _give(self, tensor: Tensor, state: str | None = None, varies: bool = False) -> Node:
        # A copy of an input or of a constant, because the forward pass may write to it.
        kept = tensor if state or tensor.is_meta else tensor.detach().clone()
        made = Node(value=without_values(tensor), calls=self._calls, tensor=kept, state=state, varies=varies)
        self._given.append(made)
        return self._known_as(made, tensor)

    def _known_as(self, made: Node, value: Any) -> Node:
        if is_tensor(value):
            self._nodes[id(value)] = made
            self._alive.append(value)
            self._sharing.setdefault(memory_of(value), []).append(value)
        return made

    def _alias(self, tensor: Tensor, source: Tensor) -> None:
        """A tensor with the values of another, that no operator made."""
        self._known_as(self.node(source), tensor)

    def _shown_by(self, tensor: Tensor) -> Tensor | None:
        """A known tensor that shows the same elements of the same memory."""
        known = self._sharing.get(memory_of(tensor), ())
        return next((other for other in reversed(known) if _same_place(other, tensor)), None)

    def _written(self, view: Tensor, made: Node) -> None:
        """What else shows the memory that an operator has just written to has new values too.

        A tensor that is the whole of what was written is that result; any other is looked at when it is read again.
        """
        for other in self._sharing.get(memory_of(view), ()):
            if other is view:
                continue
            if _same_place(other, view):
                self._nodes[id(other)] = made
                self._stale.pop(id(other), None)
            else:
                self._stale[id(other)] = (*self._stale.get(id(other), (self._nodes[id(other)],)), made)

    def _enter(self, module: nn.Module, *_: Any) -> None:
        if (path := self._paths.get(id(module))) is not None:
            self._stack.append(_Running(next(self._count), path))
            self._calls += ((self._stack[-1].number, path),)

    def _leave(self, module: nn.Module, *_: Any) -> None:
        if id(module) in self._paths:
            self._stack.pop()
            self._calls = self._calls[:-1]


def opened(function: Any) -> Any:
    """Torch's attention for modes to see the calls in it, without its check of the projections' shapes."""
    names: dict[str, Any] = {**function.__globals__, "has_torch_function": lambda _: False}
    names["_in_projection"] = lambda *parts: tuple(map(nn.functional.linear, parts[:3], parts[3:6], parts[6:]))
    made = FunctionType(function.__code__, names, None, function.__defaults__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


class _Functions(TorchFunctionMode):
    """Tells a recorder of the torch functions that a forward pass calls; operators do not show who called them."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.multi_head_attention_forward:
            with self:
                return opened(func)(*args, **kwargs or {})
        return self.recorder.function(func, args, kwargs or {})


def _remember(node: Node) -> None:
    """Keeps the shape of a tensor that is about to get another one, as by `unsqueeze_`."""
    node.value = torch.empty_strided(node.value.shape, node.value.stride(), dtype=node.value.dtype, device="meta")
    if node.target is operator.getitem:
        whole, index = node.args
        whole.value[index] = node.value


def _same_place(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors that share memory show the same elements in the same order."""
    return (one.shape, one.stride(), one.storage_offset()) == (other.shape, other.stride(), other.storage_offset())


@contextlib.contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Training mode for the whole tree, every module's own mode restored afterwards."""
    resting = [module for module in model.modules() if not module.training]
    model.train()
    try:
        yield
    finally:
        for module in resting:
            module.training = False
