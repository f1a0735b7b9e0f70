"""Captures a model as a graph of ATen operators with `torch.export`."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from scap_hub.errors import ModelError


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
    """Exports `model` in eval mode; nothing is computed and the model is left as it was.

    Args:
        model: Any module whose forward pass has no data-dependent control flow.
        inputs: Example positional arguments.

    Raises:
        ModelError: The model cannot be exported; names the module where it failed.
    """
    try:
        with evaluating(model), _no_autocast():
            program = torch.export.export(model, inputs, strict=False)
    except Exception as error:
        raise ModelError(
            f"cannot capture {type(model).__name__}: {type(error).__name__} in {_culprit(model, error)}: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}. "
            "Check that it runs on these inputs; prune the submodules that can be exported, or remove "
            "data-dependent control flow from forward()"
        ) from error
    signature = program.graph_signature
    states = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    owned = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    lifted = signature.inputs_to_lifted_tensor_constants
    return Capture(
        graph=program.graph,
        states=states,
        tensors={name: owned[name] for name in states.values()},
        constants={placeholder: program.constants[name] for placeholder, name in lifted.items()},
    )


def without_weights(model: nn.Module) -> nn.Module:
    """A copy on the meta device: it can be exported and run for its shapes, and takes no memory."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def on_meta(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same inputs as shapes only."""
    return pytree.tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, inputs)


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
def _no_autocast() -> Iterator[None]:
    # An autocast region becomes an opaque subgraph in the export; precision does not matter for shapes.
    with (
        mock.patch.object(torch.autocast, "__enter__", lambda self: self),
        mock.patch.object(torch.autocast, "__exit__", lambda self, *_: None),
    ):
        yield


def _culprit(model: nn.Module, error: BaseException) -> str:
    """The innermost submodule whose code was running when the error was raised."""
    names = {id(module): name for name, module in model.named_modules()}
    found, step = "the model's forward()", error.__traceback__
    while step is not None:
        owner = names.get(id(step.tb_frame.f_locals.get("self")))
        if owner:
            found = f"module {owner!r}"
        step = step.tb_next
    return found
