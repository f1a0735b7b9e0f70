"""The private names of other libraries that we rely on, each with its reason, under names of ours.

A private name can change in any release, so nothing else in the package may use one. Each is tested for what it does in
`tests/test_private.py`, which names the installed version when a name is gone or behaves in another way. Last run with
torch 2.14, accelerate 1.15 and datasets 5.2, and with the oldest supported: torch 2.9, accelerate 1.10, datasets 4.0.

Three things stay outside. `modeling_scap.py` travels with published weights and may import nothing of ours; its
uses of timm's private modules are tested with timm itself. `cli.py` finds typer's error class by itself, because
`scap-hub --help` should not wait for torch. `_parameters` and `_buffers` of modules have been torch's own data layout
since its first release, and every library of modules relies on them.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

# Turns the Python part of torch's dispatcher on. Without it a PreDispatchMode sees no operator, and nobody complains.
from torch._dispatch.python import enable_python_dispatcher

# The class of ATen operators, which a graph of them holds.
from torch._ops import OpOverload

# Runs a model on shapes while other inputs are real tensors. torch.export and torch.compile depend on it.
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.schema_check_mode import SchemaCheckMode

# The bases of all batch norms, and of those and the instance norms: torch has no public name for either.
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.batchnorm import _NormBase as NormBase

# The base of all convolutions, transposed ones included, and of the dropouts.
from torch.nn.modules.conv import _ConvNd as ConvNd
from torch.nn.modules.dropout import _DropoutNd as DropoutNd

# Hooks on the forward pass of every module there is; documented, but marked as something that may change.
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

# The tensors inside whatever a forward pass takes or returns: tuples, dicts, and the output classes of transformers,
# which register themselves here.
from torch.utils._pytree import tree_leaves, tree_map, tree_structure, treespec_dumps

__all__ = [
    "BatchNorm",
    "ConvNd",
    "DropoutNd",
    "FakeTensorMode",
    "NormBase",
    "OpOverload",
    "PreDispatchMode",
    "column_types",
    "enable_python_dispatcher",
    "is_alias_of",
    "is_composite",
    "memory_of",
    "models_of",
    "no_autocast",
    "register_module_forward_hook",
    "register_module_forward_pre_hook",
    "schema",
    "tree_json",
    "tree_leaves",
    "tree_map",
    "unobserved",
    "versioned",
    "write_count",
]


class PreDispatchMode(SchemaCheckMode):
    """A dispatch mode that sees operators as they were called, before composite ones are taken apart.

    Use it inside `enable_python_dispatcher()`.

    torch admits three classes at that stage, and SchemaCheckMode is the only one that asks for nothing more than to
    see the operators. An ordinary TorchDispatchMode is refused there with an AssertionError. What SchemaCheckMode
    itself does is left out: its constructor is passed over, and a subclass brings its own `__torch_dispatch__`.

    Attributes:
        alone: Held while one is on: torch has one place for such a mode, which all threads share.
    """

    alone = threading.RLock()

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self, torch._C.DispatchKey.PreDispatch)

    def __enter__(self) -> Any:
        with contextlib.ExitStack() as undone:
            undone.enter_context(self.alone)
            entered = super().__enter__()
            undone.pop_all()  # the lock is kept until the mode is left
            return entered

    def __exit__(self, *error: Any) -> None:
        try:
            super().__exit__(*error)
        finally:
            self.alone.release()


def models_of(auto_class: Any, config_class: type) -> tuple[str, ...]:
    """The names of the classes that an auto class of transformers builds from a config of this class.

    transformers has public names for these mappings, but none that leads from an auto class to its own.
    """
    mapping = auto_class._model_mapping
    if config_class not in mapping:
        return ()
    found = mapping[config_class]
    return tuple(kind.__name__ for kind in (found if isinstance(found, tuple) else (found,)))


@contextlib.contextmanager
def no_autocast() -> Iterator[None]:
    """Makes `torch.autocast` regions do nothing.

    A region with an autocast casts its inputs, which shows up as operators that are not the model's own. There is no
    public way to switch off regions that a model's own code opens.
    """
    with (
        mock.patch.object(torch.autocast, "__enter__", lambda self: self),
        mock.patch.object(torch.autocast, "__exit__", lambda self, *_: None),
    ):
        yield


def is_alias_of(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors share storage; on the meta device too, where there are no addresses to compare."""
    return bool(torch._C._is_alias_of(a, b))  # type: ignore[attr-defined]


def memory_of(tensor: Tensor) -> int:
    """A number of the memory that a tensor shows; the same for its views, on the meta device too."""
    return tensor.untyped_storage()._cdata


def versioned(module: nn.Module, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Tensors for `module.load_state_dict`, said to lie as this release's classes have them.

    A state dict holds beside its tensors the version of each class, which files do not keep. Some classes refuse
    tensors without it, such as torchvision's MNASNet.
    """
    state = OrderedDict(weights)
    state._metadata = module.state_dict()._metadata  # type: ignore[attr-defined]
    return state


def schema(operator: Any) -> Any:
    """The declaration of an ATen operator: names, defaults and aliases of its arguments and returns."""
    return operator._schema


@functools.cache
def is_composite(operator: Any) -> bool:
    """Whether torch computes an ATen operator from others, so that `operator.decompose` runs those in its place.

    Each operator's table of kernels says so, and there is no public way to read it.
    """
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), composite)


def tree_json(value: Any) -> str:
    """How tensors lie in whatever a forward pass takes or returns, as torch writes it down: JSON without the tensors.

    transformers rebuilds the outputs of an exported file from it. There is no public way to write one.
    """
    return treespec_dumps(tree_structure(value))


def unobserved(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, whose calls of torch functions no `TorchFunctionMode` sees.

    For hooks: what they compute inside the forward pass of a module whose calls are counted and changed
    (`scap_hub.surgery.Numbers`) is not the module's. There is no public way to leave a mode from within.
    """

    @functools.wraps(function)
    def quietly(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return function(*args, **kwargs)

    return quietly


def write_count(tensor: Tensor) -> int:
    """How often a tensor, or a view of it, was written to in place; autograd keeps this count for its own checks."""
    return tensor._version


def column_types(rows: Any) -> Any:
    """The features of a `datasets` data set; a stream without a schema finds them from its first rows."""
    return rows.features or rows._resolve_features().features
