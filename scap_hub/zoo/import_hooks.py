"""Makes timm and transformers load pruned models through their own calls, as soon as they are imported.

Neither has a plugin entry point that runs by itself, and importing them here would cost seconds. So `import scap_hub`
puts a finder in front of Python's import system. When one of the two modules named below has run, the finder calls our
function for it. If the module has run already, the function is called at once. Nothing else is imported, and nothing
is changed before that.

- timm offers a registry of architectures; "scap_pruned" is added to it.
- transformers builds the class that `model_type` names and offers no way to alter the result. But every model ends its
  `__init__` with the method `post_init`, so this is wrapped: a model whose config has our sizes is then shrunk to them,
  all others are left as they are.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from scap_hub.zoo import modeling_scap


def _extend_timm(_: ModuleType) -> None:
    modeling_scap.register()


def _extend_transformers(modeling_utils: Any) -> None:
    post_init = modeling_utils.PreTrainedModel.post_init

    @functools.wraps(post_init)
    def post_init_and_shrink(self: Any) -> None:
        post_init(self)
        modeling_scap.shrink_pretrained(self)

    modeling_utils.PreTrainedModel.post_init = post_init_and_shrink


_EXTENSIONS: dict[str, Callable[[ModuleType], None]] = {
    "timm.models": _extend_timm,
    "transformers.modeling_utils": _extend_transformers,
}
_waiting: dict[str, Callable[[ModuleType], None]] = {}
"""What is still to be called, by the module that was not imported yet."""


def install() -> None:
    """Extends both libraries, now or when they are imported; `import scap_hub` calls it once."""
    for name, extend in _EXTENSIONS.items():
        if name in sys.modules:
            extend(sys.modules[name])
        else:
            _waiting[name] = extend
    sys.meta_path.insert(0, _AfterImport())


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds the modules as Python would, and adds our function to what runs when they are loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        extend = _waiting.pop(fullname, None)
        spec = importlib.util.find_spec(fullname) if extend else None
        if extend is None or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_extend(module: ModuleType) -> None:
            execute(module)
            extend(module)

        spec.loader.exec_module = execute_and_extend  # type: ignore[method-assign]
        return spec
