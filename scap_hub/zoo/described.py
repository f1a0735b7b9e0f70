"""Numbers that tell other code how wide a model's features are, and how they are found in any model.

The forward pass does not read them, but a new classifier, a neck, a decoder or a fused layer is built from them. Each
is found by its name and by what it says of the dense model, and gets what the pruned model has in that place. Here is
what models of every zoo have: blocks that say how many channels they take and give.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from scap_hub.graph.modes import no_fast_path, untouched
from scap_hub.graph.shapes import Remembering
from scap_hub.private import enable_python_dispatcher

Shape = tuple[int, ...]
Calls = dict[str, tuple[Shape, Shape]]
"""Shapes of input and output of every module that maps one tensor to one, by path."""
Widths = dict[str, dict[str, Any]]
"""New values by module path and attribute."""

_INPUTS = ("in_chs", "in_channels", "in_dim", "dim_in", "dim", "groups")
_OUTPUTS = ("out_chs", "out_channels", "out_dim", "dim_out")


@dataclass
class Features:
    """Shapes of what a model makes on its way; zoos add what their own conventions describe.

    Attributes:
        calls: Of every module that maps one tensor to one.
    """

    calls: Calls = field(default_factory=dict)


def observed(model: nn.Module, inputs: tuple[Any, ...], **options: Any) -> tuple[Calls, Any]:
    """Runs a model once in eval mode; what is hooked into it or cached in it meanwhile is gone afterwards.

    Args:
        model: Any.
        inputs: Positional arguments of its forward pass.
        options: Keyword arguments.

    Returns:
        The shapes of its modules' inputs and outputs, and its output.
    """
    calls: Calls = {}
    with untouched(model), no_fast_path(), torch.no_grad():
        for path, module in model.eval().named_modules():

            def note(_: Any, arguments: tuple[Any, ...], output: Any, path: str = path) -> None:
                if arguments and isinstance(arguments[0], Tensor) and isinstance(output, Tensor):
                    calls[path] = tuple(arguments[0].shape), tuple(output.shape)

            module.register_forward_hook(note)
        with enable_python_dispatcher(), Remembering():
            output = model(*inputs, **options)
    return calls, output


def block_widths(model: nn.Module, dense: Calls, small: Calls) -> Widths:
    """New values of `in_chs`, `out_chs` and their like in a model's blocks.

    Args:
        model: The dense model.
        dense: The shapes in it.
        small: Those in the pruned model.
    """
    found: Widths = {}
    for path in (path for path in dense if path in small):
        held = vars(model.get_submodule(path))
        for side, names in enumerate((_INPUTS, _OUTPUTS)):
            for name in names:
                if type(held.get(name)) is int:
                    new = narrowed(held[name], dense[path][side], small[path][side])
                    if new != held[name]:
                        found.setdefault(path, {})[name] = new
    return found


def narrowed(width: int, before: Shape, after: Shape) -> int:
    """What a width in the dense shape has become: the size that changed, if it was that wide."""
    changed = [new for old, new in zip(before, after, strict=True) if old == width and new != old]
    return changed[0] if changed else width


def merged(*found: Mapping[str, Mapping[str, Any]]) -> Widths:
    """Widths from several sources as one; the later ones win, and modules without any are left out."""
    together: Widths = {}
    for widths in found:
        for path, values in widths.items():
            if values:
                together.setdefault(path, {}).update(values)
    return together
