"""Criteria that the command line names."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from scap_hub.errors import RecipeError
from scap_hub.text import did_you_mean


def criterion_name(text: str) -> str:
    """The name of a criterion; one of the user's own is defined first.

    Args:
        text: The name of a registered criterion, or "path.py:MyCriterion": a class in a file, which is run.

    Raises:
        RecipeError: The file cannot be run, or holds no such criterion.
    """
    path, _, kind = text.rpartition(":")
    if not path.endswith(".py"):
        return text
    from scap_hub.criteria.base import Criterion

    module = _module(Path(path))
    found = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, Criterion)
        and value.__module__ == module.__name__
        and "name" in vars(value)
    }
    if kind not in found:
        names = ", ".join(found) or "none"
        raise RecipeError(
            f"{path} has no criterion {kind!r}{did_you_mean(kind, found)} (it has {names}): a criterion is a subclass "
            "of scap_hub.Criterion with a name"
        )
    return found[kind].name


def _module(path: Path) -> ModuleType:
    """Runs a file, once a process: its classes are registered by their definition."""
    name = f"scap_hub criteria of {path.expanduser().resolve()}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path.expanduser())
    assert spec is not None and spec.loader is not None  # its name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise RecipeError(f"criterion file {str(path)!r} cannot be run: {type(error).__name__}: {error}") from error
    return module
