"""Recipe values that a call gives beside the recipe, and how they replace the recipe's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from scap_hub.errors import RecipeError
from scap_hub.recipe.keys import inner_block, key_hint, key_paths
from scap_hub.recipe.settings import CriterionSettings, TargetSettings, written_out
from scap_hub.selection.target import KINDS

_SHORT = {"round_to": ("target", "round_to"), "part": ("model", "part")}
"""Options that need not name their block."""


def overridden(recipe: type[BaseModel], document: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's document with values replaced, the later ones last.

    Args:
        recipe: The model of the whole recipe.
        document: What is set in it, short forms written out.
        overrides: Values by option: a block's name, or `<block>_<key>`; also "round_to" and "part".

    Raises:
        RecipeError: Unknown option, or a target that is not understood.
    """
    paths = {"_".join(path): path for path in key_paths(recipe)} | _SHORT
    merged = dict(document)
    for name, value in overrides.items():
        if name not in paths:
            raise RecipeError(f"unknown option {name!r}{key_hint(name, paths)}")
        merged = _merged(recipe, merged, _as_document(recipe, paths[name], value))
    return merged


def _as_document(recipe: type[BaseModel], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """One override as a nested mapping."""
    block = inner_block(recipe, path[0]) if len(path) == 1 else None
    if block is TargetSettings and isinstance(value, Mapping) and value and not set(value) & set(block.model_fields):
        value = {"ratio": value}  # {group name: fraction}
    try:
        document = value if block is None else written_out(block, value)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    for key in reversed(path):
        document = {key: document}
    return document


def _merged(block: type[BaseModel], old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces the keys that are given, block by block."""
    merged = dict(old)
    if block is TargetSettings and set(new) & set(KINDS):
        merged |= dict.fromkeys(KINDS)  # a new target replaces the old one
    if block is CriterionSettings and "name" in new:
        merged["options"] = {}  # those of another criterion
    for key, value in new.items():
        inner = inner_block(block, key)
        merged[key] = _merged(inner, old.get(key) or {}, value) if inner and isinstance(value, Mapping) else value
    return merged
