"""JSON documents and small files of strangers: read whole, within bounds, or refused."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

LARGEST = 16 * 2**20
"""Bytes of the largest document that is read; plans of the largest models have a few million."""
DEEPEST = 60
"""How far lists and objects may lie in each other."""


def parse_json(text: str | bytes) -> Any:
    """What JSON text says; more is refused than Python's parser does.

    Raises:
        ValueError: Not JSON, too long, nested too deeply, with NaN or infinities, or with a key twice; in one line.
    """
    if len(text) > LARGEST:
        raise ValueError(f"it is longer than {LARGEST} bytes")
    try:
        document = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        document = None
        deep = True
    else:
        deep = _depth_exceeds(document)
    if deep:
        raise ValueError(f"it is nested more than {DEEPEST} deep")
    return document


def read_document(folder: Path, name: str) -> str:
    """The text of a file in a folder.

    Raises:
        OSError: It is absent, no file, a link that leads out of the folder, or too long.
        UnicodeDecodeError: It is not UTF-8.
    """
    path = own_file(folder, name)
    with path.open("rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise OSError(f"{name} is longer than {LARGEST} bytes")
    return content.decode("utf-8")


def own_file(folder: Path, name: str) -> Path:
    """The path of a file that lies in a folder, or in the cached Hub repository that the folder is a snapshot of.

    Raises:
        OSError: It is absent, no file, or a link that leads elsewhere.
    """
    home, path = (Path(os.path.realpath(own, strict=True)) for own in (folder, folder / name))
    homes = [home, *([home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [])]
    if not any(own in path.parents for own in homes):
        raise OSError(f"{name} is a link that leads out of {folder}")
    if not path.is_file():
        raise OSError(f"{name} is no file")
    return path


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)[:40]!r} stands twice")
    return document


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:40]} is too large a number")
    return number


def _depth_exceeds(document: Any) -> bool:
    layer = [document]
    for _ in range(DEEPEST):
        layer = [
            item
            for own in layer
            if isinstance(own, dict | list)
            for item in (own.values() if isinstance(own, dict) else own)
            if isinstance(item, dict | list)
        ]
    return bool(layer)
