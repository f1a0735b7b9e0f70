"""Teaches timm and transformers to load pruned models, whenever they are imported.

Neither has a plugin entry point that runs by itself, and importing them here would cost seconds. So `import scap_hub`
leaves a note with Python's import system: as soon as one of the two modules below has run, ours adds to it; where it
has run already, ours adds at once. Nothing else is imported and nothing is patched before that.

- timm gets the architecture "scap_pruned" in its registry, which is its own way to add models.
- transformers builds the class that `model_type` names and knows no way to alter it, so the method that ends every
  model's `__init__` also shrinks the model, if its config has sizes of ours; otherwise it does what it always did.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def _teach_timm(_: ModuleType) -> None:
    _code().register()


def _teach_transformers(modeling_utils: Any) -> None:
    post_init = modeling_utils.PreTrainedModel.post_init

    @functools.wraps(post_init)
    def post_init_and_shrink(self: Any) -> None:
        post_init(self)
        _code().shrink_pretrained(self)

    modeling_utils.PreTrainedModel.post_init = post_init_and_shrink


_LESSONS: dict[str, Callable[[ModuleType], None]] = {
    "timm.models": _teach_timm,
    "transformers.modeling_utils": _teach_transformers,
}


def _code() -> Any:
    return importlib.import_module("scap_hub.zoo.modeling_scap")


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds the modules as Python would, and adds our lesson to what runs when they are loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        lesson = _waiting.pop(fullname, None)
        spec = importlib.util.find_spec(fullname) if lesson else None
        if lesson is None or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_teach(module: ModuleType) -> None:
            execute(module)
            lesson(module)

        spec.loader.exec_module = execute_and_teach  # type: ignore[method-assign]
        return spec


_waiting: dict[str, Callable[[ModuleType], None]] = {}


def install() -> None:
    """Teaches both libraries, now or when they are imported; `import scap_hub` calls it once."""
    for name, lesson in _LESSONS.items():
        if name in sys.modules:
            lesson(sys.modules[name])
        else:
            _waiting[name] = lesson
    sys.meta_path.insert(0, _AfterImport())
