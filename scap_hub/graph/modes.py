"""Modes in which a model runs for us, and what is undone afterwards."""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def evaluating(model: nn.Module, compiled: bool = False) -> Iterator[None]:
    """Eval mode for the whole tree, every module's own mode restored afterwards.

    What was compiled runs as it was written, unless `compiled` is given: it would pass over hooks that are newer.
    """
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        with contextlib.nullcontext() if compiled else uncompiled():
            yield
    finally:
        for module in training:
            module.training = True


def uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Runs what `torch.compile` made as it was written, so that nothing is compiled only to be looked at."""
    compiles = "torch._dynamo" in sys.modules  # else nothing is compiled, and importing it would take seconds
    return torch.compiler.set_stance("force_eager") if compiles else contextlib.nullcontext()


_SELDOM = (50_000, 50, 50)


@contextlib.contextmanager
def collecting_seldom() -> Iterator[None]:
    """Garbage is looked for every 50,000 objects, where Python does it every few hundred.

    A recorded forward pass has many objects and little garbage, and each search goes through all of torch, too: that
    took a tenth of the time in which channel groups are found.
    """
    before = gc.get_threshold()
    gc.set_threshold(*_SELDOM)
    try:
        yield
    finally:
        if before != _SELDOM:  # another thread has set it, and sets it back
            gc.set_threshold(*before)


@contextlib.contextmanager
def no_fast_path() -> Iterator[None]:
    """Torch's attention in parts: as one operator it counts for nothing, and an encoder hands on nested tensors."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Whatever modules cache in the meantime, in attributes or in dicts and lists of theirs, is gone afterwards."""
    held = {module: dict(vars(module)) for module in model.modules()}
    inside = [value for values in held.values() for value in values.values() if isinstance(value, dict | list)]
    empty = [value for value in inside if not value]  # most are, and a module has ten
    filled = [(value, value.copy(), _identities(value)) for value in inside if value]
    try:
        yield
    finally:
        for module, values in held.items():
            vars(module).clear()
            vars(module).update(values)
        for value in empty:
            if value:
                value.clear()
        for value, before, identities in filled:
            if _identities(value) == identities:
                continue  # some may not be written to at all, such as a config
            value.clear()
            value.update(before) if isinstance(value, dict) else value.extend(before)


def _identities(value: dict[Any, Any] | list[Any]) -> list[int]:
    """What a dict or a list holds, and where."""
    return list(map(id, (*value, *value.values()) if isinstance(value, dict) else value))


@contextlib.contextmanager
def emptied_caches(model: nn.Module) -> Iterator[None]:
    """Functions that remember tensors (`functools.lru_cache`) forget them before and afterwards.

    A table that was computed once is a constant of every later run, on whatever device it was made. Emptied caches
    cost a computation and change no result. They are looked for where the code of the model's classes can reach them.
    """
    caches = _caches(tuple({type(module) for module in model.modules()}))
    for cache in caches:
        cache.cache_clear()
    try:
        yield
    finally:
        for cache in caches:
            cache.cache_clear()


_CACHE = type(functools.lru_cache(lambda: None))
_SEARCHED: dict[type, tuple[Any, ...]] = {}


def _caches(kinds: tuple[type, ...]) -> list[Any]:
    """The caches in the modules that define these classes, and in the classes' methods."""
    found: dict[int, Any] = {}
    for kind in kinds:
        if kind not in _SEARCHED:
            _SEARCHED[kind] = tuple(_caches_of(kind))
        found |= {id(cache): cache for cache in _SEARCHED[kind]}
    return list(found.values())


def _caches_of(kind: type) -> Iterator[Any]:
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        for holder in (vars(sys.modules.get(base.__module__, base)), vars(base)):
            for value in list(holder.values()):
                yield from _caches_in(value)


def _caches_in(value: Any) -> Iterator[Any]:
    """A cache, or what a decorator closed over."""
    # Other objects are not asked: what stands for a package that is missing raises at any attribute.
    value = value.__func__ if isinstance(value, classmethod | staticmethod | MethodType) else value
    if isinstance(value, _CACHE):
        yield value
    elif isinstance(value, FunctionType):
        for cell in value.__closure__ or ():
            with contextlib.suppress(ValueError):  # an empty cell
                if isinstance(cell.cell_contents, _CACHE):
                    yield cell.cell_contents


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
