"""Criteria in a user's Python file."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from scap_hub.errors import RecipeError, ScapHubError
from scap_hub.files import path_of
from scap_hub.text import did_you_mean

T = TypeVar("T")


def class_in_file(name: str, base: type[T]) -> type[T]:
    """Runs a Python file and takes a class from it.

    Args:
        name: "path.py:ClassName"; a relative path starts at the working directory.
        base: What the class must derive from.

    Raises:
        RecipeError: There is no such file, it fails, it has no such class, or the class does not derive from `base`.
    """
    file, _, wanted = name.rpartition(":")
    path = path_of(file)
    if not path.is_file():
        raise RecipeError(
            f"criterion {name!r}: there is no file {file!r}; "
            "name a registered criterion, or a class in a file as path.py:MyCriterion"
        )
    module = _run(path.resolve(), name)
    offered = [key for key, value in vars(module).items() if isinstance(value, type) and issubclass(value, base)]
    found = getattr(module, wanted, None)
    if found is None:
        near = did_you_mean(wanted, offered)
        raise RecipeError(f"criterion {name!r}: {file!r} defines no {wanted!r}{near}")
    if wanted not in offered:
        raise RecipeError(f"criterion {name!r}: {wanted!r} is no scap_hub.Criterion; derive it from that class")
    return found


def _run(path: Path, name: str) -> ModuleType:
    # The module's name is its path: the same file keeps it, so that its criteria replace their former selves, and
    # messages say where a class comes from.
    module = ModuleType(str(path))
    module.__file__ = str(path)
    before = sys.modules.get(module.__name__)
    sys.modules[module.__name__] = module  # dataclasses look the module of their class up there
    try:
        # Compiled here and not imported, because Python's cache misses a change within the same second.
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    except Exception as error:
        del sys.modules[module.__name__]
        if before is not None:
            sys.modules[module.__name__] = before
        if isinstance(error, ScapHubError):
            raise
        raise RecipeError(f"criterion {name!r}: {str(path)!r} fails with {type(error).__name__}: {error}") from error
    return module
