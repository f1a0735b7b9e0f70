"""Parts of a model that can be recorded where the whole cannot, such as the backbone of a detector."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from scap_hub.channels.operators import has_rule
from scap_hub.errors import ModelError
from scap_hub.graph.copies import copied, index_buffers, without_weights
from scap_hub.graph.modes import evaluating, untouched
from scap_hub.graph.record import capture
from scap_hub.graph.values import on_meta, separate, tensors_of
from scap_hub.text import one_line

_DEPTH = 2
"""How many levels below the model parts are looked for."""
_NAMED = 3


class Part(nn.Module):
    """A part of a model, at the path that it has there: names and plans are those of the whole. It holds no copy.

    `constants` are arguments that follow those that it is called with.
    """

    def __init__(self, model: nn.Module, path: str, constants: tuple[Any, ...] = ()) -> None:
        super().__init__()
        self.scap_part, self.scap_constants = path, constants
        *above, name = path.split(".")
        owner: nn.Module = self
        for step in above:
            owner.add_module(step, nn.Module())
            owner = owner.get_submodule(step)
        owner.add_module(name, model.get_submodule(path))
        self.eval()

    def forward(self, *inputs: Any) -> Any:
        return self.get_submodule(self.scap_part)(*inputs, *self.scap_constants)


def part_of(model: nn.Module, path: str, inputs: tuple[Any, ...]) -> tuple[Part, tuple[Any, ...]]:
    """A part of a model, and what reaches it when the whole model runs on these inputs; see `reaching`."""
    arguments = reaching(model, path, inputs)
    return Part(model, path), arguments


def reaching(model: nn.Module, path: str, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a part of a model is called with, the first time, when the whole model runs on these inputs.

    Args:
        model: The whole model, with values; left as it was.
        path: Of the part, such as "backbone".
        inputs: Positional arguments of the whole model.

    Raises:
        ModelError: There is no such part, the model does not run, or it calls the part not at all, or by keywords.
    """
    if path not in dict(model.named_modules()) or not path:
        near = ", ".join(repr(name) for name, _ in model.named_children())
        raise ModelError(f"{type(model).__name__} has no part {path!r}: its parts are {near}, and theirs")
    module = model.get_submodule(path)
    reached: list[tuple[Any, ...]] = []

    def stop(_: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> NoReturn:
        if options:
            raise ModelError(f"the part {path!r} is called with keyword arguments ({', '.join(options)}), so that it "
                             "cannot be recorded by itself: choose one around it or inside it")  # fmt: skip
        reached.append(separate(arguments))
        raise _ReachedError

    with untouched(model), evaluating(model), torch.no_grad():
        hook = module.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            model(*separate(inputs))
        except _ReachedError:
            pass
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(f"{type(model).__name__} does not run on these inputs: {one_line(error)}") from error
        finally:
            hook.remove()
    if not reached:
        raise ModelError(f"{type(model).__name__} does not call its part {path!r} on these inputs: choose another")
    return reached[0]


class _ReachedError(Exception):
    """The part was called; the rest of the model need not run."""


def offered(model: nn.Module, inputs: tuple[Any, ...]) -> str:
    """Names the parts that can be recorded, for an error message; "" where there are none.

    Those that are given a row for each image come first: a run can feed them by themselves.
    """
    whole = _parameters(model)
    found = dict(_capturable(model, inputs))
    sizes = {path: _parameters(model.get_submodule(path)) for path in found}
    largest = sorted(sizes, key=lambda path: (not by_image(found[path], len(inputs[0])), -sizes[path]))[:_NAMED]
    named = [f"part={path!r} ({sizes[path] / whole:.0%} of the parameters)" for path in largest if sizes[path]]
    return f". Parts of it can be pruned by themselves: {', '.join(named)}" if named else ""


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def by_image(arguments: tuple[Any, ...], images: int) -> bool:
    """Whether a part is called with one tensor of numbers that has a row for each of so many images.

    What follows it holds no tensor, and so is the same for all images.
    """
    first, *constants = arguments or (None,)
    alone = isinstance(first, Tensor) and not tensors_of(constants)
    return alone and first.is_floating_point() and first.ndim > 1 and len(first) == images


def _capturable(model: nn.Module, inputs: tuple[Any, ...]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The outermost modules below the model that can be recorded with what reaches them, and that."""
    waiting = _below(model, "", _DEPTH)
    while waiting:
        path, depth = waiting.pop(0)
        with contextlib.suppress(Exception):  # whatever else it is that cannot be recorded
            part, arguments = part_of(model, path, inputs)
            _record(part, arguments)
            yield path, arguments
            continue
        waiting += _below(model.get_submodule(path), f"{path}.", depth)


def _below(module: nn.Module, prefix: str, depth: int) -> list[tuple[str, int]]:
    """The modules inside one, with the levels left below each; one that holds all its parameters is no level."""
    own = _parameters(module)
    children = [(f"{prefix}{name}", depth - (_parameters(child) < own)) for name, child in module.named_children()]
    return [(path, left) for path, left in children if left >= 0]


def _record(part: Part, arguments: tuple[Any, ...]) -> None:
    """Records a part without weights, or else with them, as the analysis does.

    Raises:
        ModelError: It cannot be recorded either way.
    """
    numbers = index_buffers(part)
    try:
        capture(without_weights(part), on_meta(arguments), numbers=numbers, known=has_rule)
    except ModelError:
        capture(copied(part), arguments, numbers=numbers, known=has_rule)
