"""The zoos there are. Each is asked in turn whether it knows a name, a config or a module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from scap_hub.errors import ModelError
from scap_hub.text import did_you_mean
from scap_hub.zoo.base import Zoo
from scap_hub.zoo.plain import PlainZoo
from scap_hub.zoo.timm.zoo import TimmZoo
from scap_hub.zoo.transformers.zoo import TransformersZoo

PLAIN = PlainZoo()
"""The zoo of modules that only their owner can build."""

# In the order in which they are asked: the last two say yes to any config and to any module.
_ZOOS: list[Zoo] = [TimmZoo(), TransformersZoo(), PLAIN]


def register(zoo: Zoo) -> None:
    """Adds a zoo; it is asked before those that are there.

    Args:
        zoo: Stateless; recognises only what is its own.

    Raises:
        ModelError: There is one of that name.
    """
    if any(known.name == zoo.name for known in _ZOOS):
        raise ModelError(f"there is a zoo {zoo.name!r} already: give this one another name")
    _ZOOS.insert(0, zoo)


def zoo_named(name: object) -> Zoo:
    """The zoo that a config.json names.

    Raises:
        ModelError: There is none of that name.
    """
    for zoo in _ZOOS:
        if zoo.name == name:
            return zoo
    near = did_you_mean(name, [zoo.name for zoo in _ZOOS])
    raise ModelError(f"no zoo {name!r}{near}: register it with scap_hub.zoo.register, or upgrade scap_hub")


def zoo_with_name(name: str) -> Zoo | None:
    """The zoo that has a model of this name, None if there is none."""
    return next((zoo for zoo in _ZOOS if zoo.knows_name(name)), None)


def zoo_of_config(config: Mapping[str, Any]) -> Zoo:
    """The zoo in whose layout a dense model's config.json is."""
    return next(zoo for zoo in _ZOOS if zoo.knows_config(config))


def zoo_of(module: nn.Module) -> Zoo:
    """The zoo that built a module; imports none for the question."""
    return next(zoo for zoo in _ZOOS if zoo.knows_module(module))


def nearest(name: str) -> list[str]:
    """The names of models that an unknown one may have meant, the nearest first; empty if none is near."""
    return next((found for zoo in _ZOOS if (found := zoo.nearest(name))), [])


def pruned_entry(config: dict[str, Any]) -> dict[str, Any] | None:
    """What scap_hub says in a config.json about a pruned model; None for a dense model's."""
    return config["scap"] if "scap" in config else zoo_of_config(config).lost_entry(config)
