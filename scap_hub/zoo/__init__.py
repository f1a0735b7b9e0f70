"""Models of every zoo, loaded through one call; what is particular to a zoo stands in its object, a `Zoo`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scap_hub.zoo.base import Door, LoadedModel, Preprocessing, Uniform, Wanted, Zoo, logits
    from scap_hub.zoo.building import rebuild, skeleton
    from scap_hub.zoo.loading import load_model
    from scap_hub.zoo.registry import pruned_entry, register, zoo_named, zoo_of

# Imported when first asked for: `import scap_hub` needs the import hooks of this package, and not what they hook into.
_HOMES = {
    "Door": "base",
    "LoadedModel": "base",
    "Preprocessing": "base",
    "Uniform": "base",
    "Wanted": "base",
    "Zoo": "base",
    "logits": "base",
    "rebuild": "building",
    "skeleton": "building",
    "load_model": "loading",
    "pruned_entry": "registry",
    "register": "registry",
    "zoo_named": "registry",
    "zoo_of": "registry",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


__all__ = [
    "Door",
    "LoadedModel",
    "Preprocessing",
    "Uniform",
    "Wanted",
    "Zoo",
    "load_model",
    "logits",
    "pruned_entry",
    "rebuild",
    "register",
    "skeleton",
    "zoo_named",
    "zoo_of",
]
