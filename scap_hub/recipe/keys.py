"""The keys of a recipe: where each stands, and which one was meant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import get_origin

from pydantic import BaseModel

from scap_hub.text import did_you_mean

NEAR = 0.5
"""How alike a name must be to be offered; recipes have few keys, so a far one is still a good guess."""


def key_paths(block: type[BaseModel], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of all blocks and keys within a block."""
    for name in block.model_fields:
        path = (*above, name)
        yield path
        inner = inner_block(block, name)
        if inner:
            yield from key_paths(inner, path)


def inner_block(block: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The block that stands under a key; None where a plain value does, or the key is unknown."""
    annotation = block.model_fields[key].annotation if key in block.model_fields else None
    if get_origin(annotation) is not None:  # Python 3.10 takes dict[str, Any] for a class, which it is not
        return None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def key_hint(wrong: str, valid: Mapping[str, tuple[str, ...]]) -> str:
    """The end of an error message that offers a key.

    Args:
        wrong: What was written.
        valid: Paths by how they are written.
    """
    # A right key in the wrong block is nearer than a similar spelling.
    last = wrong.rpartition(".")[2]
    same = [name for name, path in valid.items() if path[-1] == last]
    if same:
        return f"; did you mean {same[0]!r}?"
    blocks = ", ".join(name for name, path in valid.items() if len(path) == 1)
    return did_you_mean(wrong, valid, cutoff=NEAR) or f"; the blocks are {blocks}"
